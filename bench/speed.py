"""
How fast and how large: one table per name given.

    python bench/speed.py load          time and peak memory of loading a Pythia-shaped checkpoint, beside transformers
    python bench/speed.py decode        tokens per second of batch decoding, beside transformers and beside the linear layers alone
    python bench/speed.py vpt           frames per second of each stage from a recording to its latents, a network of the 1x geometry
    python bench/speed.py exp1          arithmetic: what a step of config/exp1.py computes and keeps in memory
    python bench/speed.py               all of them

Weights are random, shapes those of Pythia-70m and -160m. Contenders take turns in small portions, so that what else the machine does
hits all alike; the fastest portion is printed, since noise only adds. Needs `pip install transformers` for the comparison.
"""
import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from model import Config, GPTNeoX  # noqa: E402

SHAPES = {"70m": Config(), "160m": Config(hidden_size=768, num_hidden_layers=12, num_attention_heads=12)}


def seconds(work):
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def take_turns(contenders, rounds):
    """name -> seconds of its fastest call."""
    took = {name: [] for name in contenders}
    for i in range(rounds + 1):
        for name, work in contenders.items():
            duration = seconds(work)
            if i: took[name].append(duration)                # the first round warms up
    return {name: min(times) for name, times in took.items()}


LOAD = """
import sys, time, torch
folder, which = sys.argv[1:]
if which == "ours": from model import GPTNeoX as Model
else: from transformers import GPTNeoXForCausalLM as Model
def memory(key): return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) * 1024
before, start = memory("VmRSS"), time.perf_counter()
model = Model.from_pretrained(folder, dtype=torch.float32)
print(time.perf_counter() - start, (memory("VmHWM") - before) / sum(p.numel() * 4 for p in model.parameters()))
"""


def load(rounds=5):
    print("load, float16 file to a float32 model    seconds    peak memory / model")
    for shape, config in SHAPES.items():
        with tempfile.TemporaryDirectory() as folder:
            GPTNeoX(config).save_pretrained(folder, torch.float16)
            found = {"ours": [], "transformers": []}
            for _ in range(rounds):
                for which, rows in found.items():
                    command = [sys.executable, "-c", LOAD, folder, which]
                    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
                    rows.append([float(x) for x in out.split()])
            for which, rows in found.items():
                took, peak = map(min, zip(*rows, strict=True))
                print(f"{shape:5} {which:32} {took:9.2f} {peak:14.2f}")


def linear_layers(model, B, steps):
    """The linear layers alone, as plain F.linear: what decoding `steps` tokens of B texts cannot do without."""
    layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
    x = {m.in_features: torch.randn(B, 1, m.in_features) for m in layers}
    return lambda: [F.linear(x[m.in_features], m.weight, m.bias) for _ in range(steps) for m in layers]


def decoder(forward, rewind, new, steps):
    """Writes `steps` tokens greedily after the context, then forgets them."""
    def run(new=new):
        for _ in range(steps): new = forward(new)[:, -1:].max(-1).indices
        rewind()
    return run


@torch.no_grad()
def decode_after(context, config, B=16, steps=4, rounds=25):
    """name -> seconds for `steps` tokens of B texts whose first `context` tokens are in the cache."""
    from transformers import DynamicCache, GPTNeoXConfig, GPTNeoXForCausalLM
    ours, theirs = GPTNeoX(config), GPTNeoXForCausalLM(GPTNeoXConfig(**vars(config))).eval()
    theirs.load_state_dict({name.replace("embed_out", "lm_head"): p for name, p in ours.state_dict().items()}, assign=True)
    text, cache, their_cache = torch.randint(config.vocab_size, (B, context)), ours.new_cache(B, context + steps), DynamicCache()
    assert torch.allclose(ours(text, cache)[:, -1], theirs(text, past_key_values=their_cache, logits_to_keep=1).logits[:, -1], atol=1e-3)
    def rewind():
        for layer in cache: layer.length = context
    forward = lambda tok: theirs(tok, past_key_values=their_cache).logits
    return take_turns({
        "linear layers": linear_layers(ours, B, steps),
        "transformers": decoder(forward, lambda: their_cache.crop(-steps), text[:, :1], steps),
        "ours": decoder(lambda tok: ours(tok, cache), rewind, text[:, :1], steps),
    }, rounds)


def decode(B=16, steps=4):
    print(f"decode, batch {B}       context   tokens/s   / transformers   time / linear layers")
    for shape, config in SHAPES.items():
        for context in (64, 512):
            took = decode_after(context, config, B, steps)
            for name, t in took.items():
                versus = f"{took['transformers'] / t:14.2f} {t / took['linear layers']:16.2f}"
                print(f"{shape:5} {name:16} {context:7} {B * steps / t:10.0f} {versus}", flush=True)


def film(path, frames=200):
    """A video as the recordings are, 640x360 at 20 frames per second, of drifting noise."""
    import av
    noise = np.random.default_rng(0).integers(0, 256, (360, 640, 3), dtype=np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=20)
        stream.width, stream.height, stream.pix_fmt = 640, 360, "yuv420p"
        for n in range(frames):
            for packet in stream.encode(av.VideoFrame.from_ndarray(np.roll(noise, n * 4, 1), format="rgb24")): container.mux(packet)
        for packet in stream.encode(): container.mux(packet)


@torch.no_grad()
def vpt():
    sys.path.insert(0, str(ROOT / "domains"))
    from vpt_network import VPT
    from vpt_recordings import decode as decode_video
    from vpt_recordings import resize
    network = VPT(channels=[64, 128, 128], D=1024, heads=8, layers=4, window=128, size=128)
    with tempfile.TemporaryDirectory() as folder:
        film(Path(folder) / "a.mp4")
        pictures = list(decode_video(Path(folder) / "a.mp4"))
        frames = torch.from_numpy(np.stack([resize(picture, 128) for picture in pictures]))
        seen, new = network.see(frames[:16])[None].repeat(1, 8, 1), torch.ones(1, dtype=torch.bool)
        stages = {
            "decode": (len(pictures), lambda: list(decode_video(Path(folder) / "a.mp4"))),
            "resize": (len(pictures), lambda: [resize(picture, 128) for picture in pictures]),
            "convolutions": (16, lambda: network.see(frames[:16])),
            "recurrence, 128 frames at a time": (128, lambda: network.remember(seen, new)),
        }
        took = take_turns({name: work for name, (_, work) in stages.items()}, rounds=4)
    print(f"VPT 1x on the CPU, {torch.get_num_threads()} threads      frames/s")
    for name, (n, _) in stages.items(): print(f"{name:36} {n / took[name]:9.0f}")


def exp1():
    import train
    from meter import PEAK, Meter
    settings = vars(train) | {}
    exec((ROOT / "config/exp1.py").read_text(), settings)
    chosen = SimpleNamespace(**{name: value for name, value in settings.items() if not name.startswith("_")})
    with torch.device("meta"): lm = GPTNeoX(SHAPES["160m"])
    parts = SimpleNamespace(encoder=SimpleNamespace(lm=lm), predicts=True,
                            predictor=SimpleNamespace(lm=lm, stride=chosen.ahead_stride, K=chosen.K))
    meter, c = Meter(parts, chosen.batch_size, chosen.T, chosen.annotated_fraction, "cpu"), lm.config
    parameters, steps = sum(p.numel() for p in lm.parameters()), chosen.batch_size * chosen.T
    rows = 2 * steps + steps // chosen.ahead_stride * chosen.K
    kept = rows * c.num_hidden_layers * 34 * c.hidden_size       # bytes of 16-bit activations (Korthikanti et al. 2022, arXiv 2205.05198)
    print(f"exp1: {rows:,} rows a step; {meter.train / 1e12:.1f} TFLOP of training and {meter.write / 1e12:.1f} of writing, "
          f"{(meter.train + meter.write) / PEAK['H100'] / 0.2:.2f} s a step at 20 % of an H100\n"
          f"      weights, gradients and moments {2 * parameters * 16 / 1e9:.1f} GB, target {parameters * 4 / 1e9:.1f} GB, "
          f"activations {kept / 1e9:.1f} GB; logits exist {2 ** 23 // c.vocab_size} rows at a time")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tables = {"load": load, "decode": decode, "vpt": vpt, "exp1": exp1}
    parser.add_argument("table", nargs="*", help=" | ".join(tables), default=list(tables))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of decoding; 1 tells most on a busy machine")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name in options.table: tables[name]()
