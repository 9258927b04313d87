"""
What bench.faults_cases breaks: make_.. writes it into a folder, use_.. runs what reads it.

A use returns all that a fault could make wrong. It is told which file is broken.
"""

import json
import shutil
import signal
import sys
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
from safetensors.torch import save_file
from tqdm import tqdm

import sample
import train
from bench.faults import make_data
from data import Tokenizer
from domains.vpt import embed
from domains.vpt.network import VPT
from encoder import Encoder, Features
from model import Config, GPTNeoX
from runtime.dataset import Episode, Episodes, write_shard
from runtime.files import read_json
from runtime.pretrained import BYTE
from runtime.shards import write_meta
from scripts import check, pack, show

SMALL = """--n_embd=16 --n_layer=1 --n_head=2 --T=16 --K=2 --batch_size=4 --n_annotated=6
    --device=cpu --max_iters=3 --eval_interval=3""".split()


def program(module, *arguments):
    """A program's main, as at the prompt, but for its settings, which are put back."""
    argv = mock.patch.object(sys, "argv", [module.__name__, *map(str, arguments)])
    with argv, mock.patch.dict(vars(module)):
        module.main()


def contents(folder):
    """All that a data set holds, for training."""
    found = {}
    for split in ("train", "val", "test"):
        for episode in Episodes(folder, split):
            about = split, episode.captions, episode.annotated
            found[episode.id] = episode.obs.tolist(), about
    return found


def make_set(folder):
    make_data(folder / "set")
    pictures = np.zeros((9, 4, 4, 3), np.uint8)
    episode = Episode("seen", np.ones((9, 6), np.float32), [], "all", pictures)
    write_shard(folder / "set", "val", 1, [episode])
    write_meta(folder / "set", **read_json(folder / "set/meta.json"))


def use_set(folder, broken):
    faulty = check.check(folder / "set") == 1
    try:
        content = contents(folder / "set")
        show.show(str(folder / "set"))
    except ValueError:
        if not faulty:
            raise AssertionError("check found nothing") from None
        raise
    if faulty:  # check reads all of it, pictures too
        raise ValueError(f"{folder / 'set'}: told by check")
    return content


def make_run(folder):
    data = make_data(folder / "set")
    program(train, *SMALL, f"--data={data}", f"--out_dir={folder / 'run'}")
    torch.use_deterministic_algorithms(False)


def use_run(folder, broken):
    more = f"--data={folder / 'set'}", f"--out_dir={folder / 'run'}", "--resume"
    program(sample, *more[1:2], "--device=cpu")
    program(train, *SMALL, *more)
    torch.use_deterministic_algorithms(False)
    return sys.stdout.text()


def byte_level_bpe():
    """A tokenizer.json as Pythia's: every byte, some merges, runs of spaces added at the end."""
    merges = ["a l", "al k", "w alk", "o p"]
    pieces = [*BYTE, *("".join(merge.split()) for merge in merges)]
    plain = dict(single_word=False, lstrip=False, rstrip=False)
    special = plain | dict(special=True, normalized=False)
    added = [dict(id=0, content="<|endoftext|>"), dict(id=1, content="<|padding|>")]
    added = [entry | special for entry in added]
    spaces = dict(id=len(pieces) + 2, content="  ", special=False, normalized=True)
    vocabulary = {"<|endoftext|>": 0, "<|padding|>": 1} | {p: i for i, p in enumerate(pieces, 2)}
    return dict(
        version="1.0",
        added_tokens=[*added, plain | spaces],
        normalizer=dict(type="NFC"),
        pre_tokenizer=dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True),
        decoder=dict(type="ByteLevel", add_prefix_space=True, trim_offsets=True),
        model=dict(type="BPE", dropout=None, unk_token=None, vocab=vocabulary, merges=merges),
    )


def make_pretrained(folder):
    stored = byte_level_bpe()
    (folder / "tokenizer.json").write_text(json.dumps(stored))
    Tokenizer.from_captions(["walk", "open"]).save(folder / "pieces.json")
    model = GPTNeoX(Config(len(stored["model"]["vocab"]) + 1, 16, 2, 2))
    model.save_pretrained(folder / "one")
    Encoder(model, Features(6), 16).save_pretrained(folder / "encoder")
    model.save_pretrained(folder / "shards")
    (folder / "shards/model.safetensors").unlink()
    weights = {name: p.detach() for name, p in model.named_parameters()}
    names = sorted(weights)
    index = {name: f"model-{n % 2}.safetensors" for n, name in enumerate(names)}
    for n in range(2):
        save_file({x: weights[x] for x in names[n::2]}, folder / f"shards/model-{n}.safetensors")
    (folder / "shards/model.safetensors.index.json").write_text(json.dumps(dict(weight_map=index)))


def use_pretrained(folder, broken):
    text = "walk, don't  op\u00e9n"
    tokenizer = Tokenizer.from_file(folder / "tokenizer.json")
    own = Tokenizer.from_file(folder / "pieces.json")
    assert own.decode(own.encode(text)) == text
    tok = tokenizer.encode(text)
    logits = [GPTNeoX.from_pretrained(folder / x)(torch.tensor([tok])) for x in ("one", "shards")]
    encoder = Encoder.from_pretrained(folder / "encoder")
    step = torch.arange(len(tok))[None]
    logits.append(encoder(torch.ones(1, len(tok), 6), torch.tensor([tok]), step))
    return tok, [x.tolist() for x in logits]


def make_packed(folder):
    rng = np.random.default_rng(0)
    (folder / "raw").mkdir()
    for n in range(8):
        obs = rng.random((30, 4), dtype=np.float32)
        if n < 4:
            np.save(folder / f"raw/\u00e9{n}.npy", obs)
        elif n < 6:
            np.savez_compressed(folder / f"raw/\u00e9{n}.npz", x=obs)
        else:
            save_file({"x": torch.from_numpy(obs)}, folder / f"raw/\u00e9{n}.safetensors")
    lines = [f"\u00e9{n},{n + k},{n + k + 2},wav\u00e9 {k}" for n in range(6) for k in (1, 9)]
    (folder / "captions.csv").write_text("\n".join(["episode,start,end,text", *lines]) + "\n")
    line = dict(start=7, text="walk", unit="steps", sure=0.9)  # an end may be left out
    rows = [json.dumps(dict(episode=f"\u00e9{n}") | line) for n in (5, 6, 7)]
    (folder / "more.jsonl").write_text("\n".join(rows) + "\n")
    use_packed(folder, None)


def use_packed(folder, broken):
    """Its episodes, and what else stays in its folder."""
    captions = f"{folder}/captions.csv,{folder}/more.jsonl"
    program(pack, f"--obs={folder}/raw/**", f"--captions={captions}", f"--out={folder}/out")
    hidden = [path.name for path in (folder / "out").glob(".*") if path.name != ".lock"]
    return contents(folder / "out"), hidden


def make_recordings(folder):
    av = embed.video_library()
    torch.manual_seed(0)
    vpt = VPT([4, 8, 8], D=32, heads=2, layers=1, window=4, size=32)
    torch.save({f"net.{name}": x for name, x in vpt.state_dict().items()}, folder / "a.weights")
    (folder / "rec").mkdir()
    stems = [f"{name}-0-0" for name in "abt"]
    for stem in stems:
        mouse, stats = dict(x=9.0, y=9.0), "minecraft.mine_block:minecraft.oak_log"
        ticks = [dict(mouse=mouse, isGuiOpen=i > 5, stats={stats: i // 4}) for i in range(10)]
        (folder / f"rec/{stem}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in ticks))
        (folder / f"rec/{stem}-options.json").write_text('{"windowHeight": 720}')
        with av.open(str(folder / f"rec/{stem}.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=20, options=dict(preset="ultrafast"))
            stream.width, stream.height, stream.pix_fmt = 640, 360, "yuv420p"
            frame = av.VideoFrame.from_ndarray(np.zeros((360, 640, 3), np.uint8), format="rgb24")
            for packet in [x for _ in range(11) for x in stream.encode(frame)] + stream.encode():
                container.mux(packet)
    rows = [f"{stem},0.1,0.3,walk\n{stem},0.3,0.4," for stem in stems]
    (folder / "person.csv").write_text("\n".join(["recording,start,end,text", *rows]) + "\n")
    use_recordings(folder, broken="rec/a")


def use_recordings(folder, broken):
    """Its episodes, but those of the recording that is broken."""
    alone = SimpleNamespace(id=0, num_workers=1)
    options = f"--weights={folder}/a.weights", f"--recordings={folder}/rec", "--device=cpu"
    found = {}
    if not broken.startswith(("counted", "told")):
        for out in ("counted", "told"):
            shutil.rmtree(folder / out, ignore_errors=True)
    for out, more in dict(counted=[], told=[f"--annotations={folder}/person.csv"]).items():
        with (
            mock.patch.object(embed, "get_worker_info", lambda: alone),
            mock.patch.object(embed, "load", lambda paths, n, **x: embed.Recordings(paths, **x)),
            mock.patch.object(embed, "tqdm", lambda **x: tqdm(**x | dict(disable=True))),
            mock.patch.object(signal, "signal"),
        ):
            program(embed, *options, f"--out={folder}/{out}", *more)
        for split in read_json(folder / out / "meta.json")["splits"]:
            for episode in Episodes(folder / out, split):
                if not broken.startswith(f"rec/{episode.id}"):
                    about = episode.captions, episode.annotated
                    found[out, episode.id] = episode.obs.tolist(), about
    return found
