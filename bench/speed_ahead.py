"""
How fast the K-ahead pass is: against the mask, against transformers, and against its own matrix products alone.

    python bench/speed_ahead.py attention                attention alone, forward and backward
    python bench/speed_ahead.py predictor                one predictor pass with its loss, forward and backward (minutes, 6 GB)
    python bench/speed_ahead.py step                     a training step of train.py's default shapes, in its parts
    python bench/speed_ahead.py growth                   time and memory of the attention as T and K grow

Contenders take turns in one process, and must agree before they are timed. Shown: median [least .. most] of the rounds, memory at its
peak beyond what was there before, and the ratio to the floor, the time of the same matrix products with nothing around them. On one
CPU thread the clock is the processor's own, which neighbours do not disturb.
"""
import argparse
import ctypes
import itertools
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from attention import ahead_attention, chunks  # noqa: E402
from cross_entropy import LOGITS, cross_entropy  # noqa: E402
from data import Batch  # noqa: E402
from encoder import Encoder  # noqa: E402
from model import Config, GPTNeoX  # noqa: E402
from train import Grounding, Predictor, accepted, ahead_mask  # noqa: E402

SHAPES = [(4, 64, 8), (2, 256, 8), (1, 512, 8), (2, 256, 16)]  # B, T, K
PYTHIA = {"70m": (512, 6, 8), "160m": (768, 12, 12), "410m": (1024, 24, 16)}


def clock():
    if args.device == "cuda": torch.cuda.synchronize()
    return time.process_time() if args.device == "cpu" and args.threads == 1 else time.perf_counter()


def peak_memory(run):
    """MB that `run` needs at its peak beyond what there was before; on a CPU from Linux's high-water mark."""
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2 ** 20
    status = lambda key: int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1])
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    run()
    return (status("VmHWM") - before) / 2 ** 10


def compare(title, contenders, floor):
    """Prints a row for each of {name: run}; run() returns tensors in which all must agree with the first."""
    close, results = 1e-3 if args.dtype == torch.float32 else 0.1, [run() for run in contenders.values()]
    for name, result in zip(contenders, results, strict=True):
        for ours, first in zip(result, results[0], strict=True):
            assert (ours - first).norm() <= close * first.norm(), f"{title}: {name} disagrees with {next(iter(contenders))}"
    del results, result, ours, first
    memory = {name: peak_memory(run) for name, run in contenders.items()}
    runs, times = contenders | {"its products": floor}, {}
    for _ in range(args.rounds):
        for name, run in runs.items():
            start = clock()
            run()
            times.setdefault(name, []).append((clock() - start) * 1e3)
    print(f"\n{title}")
    middle = {name: statistics.median(t) for name, t in times.items()}
    for name, t in times.items():
        line = f"  {name:14}{middle[name]:9.1f} ms [{min(t):.1f} .. {max(t):.1f}]".ljust(48)
        line += f"{middle[next(iter(runs))] / middle[name]:6.1f}x{middle[name] / middle['its products']:7.2f} of floor"
        print(line + (f"{memory[name]:9.0f} MB" if name in memory else ""), flush=True)


def attention_products(B, H, T, K, hs):
    """The matrix products of the attention: two forward, five backward."""
    x = torch.randn(B * H, T, hs, device=args.device, dtype=args.dtype)
    for queries, count in ((K, T - 1), (1, T)):
        for rows, _, end in chunks(count, queries, 1):
            q, p = (torch.ones(B * H, (rows.stop - rows.start) * queries, n, device=args.device, dtype=args.dtype) for n in (hs, end))
            for _ in range(3): q @ x[:, :end].mT
            for _ in range(2): p @ x[:, :end], p.mT @ q
    own, p = (torch.ones(B * H * (T - 1), K, n, device=args.device, dtype=args.dtype) for n in (hs, K))
    for _ in range(3): own @ own.mT
    for _ in range(2): p @ own, p.mT @ own


def attention(B, T, K):
    d, _, H = PYTHIA[args.size]
    mask = ahead_mask(T, torch.arange(0, T - 1, device=args.device), K)
    *qkv, grad = torch.randn(4, B, H, T + (T - 1) * K, d // H, device=args.device, dtype=args.dtype)
    for x in qkv: x.requires_grad_()
    both = lambda out: (out.detach(), *torch.autograd.grad(out, qkv, grad))
    ways = {"mask": lambda: both(F.scaled_dot_product_attention(*qkv, mask)), "fast": lambda: both(ahead_attention(*qkv, T, K, 1))}
    if args.device == "cuda": ways["flex"] = flex(qkv, T, K, both)
    compare(f"attention alone, {args.size}: B={B} T={T} K={K}", ways, lambda: attention_products(B, H, T, K, d // H))


def flex(qkv, T, K, both):
    """FlexAttention with the same mask as a BlockMask."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    start = lambda i: torch.where(i < T, i, (i - T) // K)
    seen = lambda b, h, q, k: torch.where(k < T, start(q) >= k, (q >= T) & (start(q) == start(k)) & (q >= k))
    rows, run = qkv[0].shape[2], torch.compile(flex_attention)
    mask = create_block_mask(seen, None, None, rows, rows, device=args.device)
    return lambda: both(run(*qkv, block_mask=mask))


def predictor_products(B, T, K, config):
    d, V, make = config.hidden_size, config.vocab_size, lambda *shape: torch.ones(*shape, device=args.device, dtype=args.dtype)
    rows, blocks = B * (T + (T - 1) * K), B * (T - 1) * K
    for i, o in ((d, 3 * d), (d, d), (d, 4 * d), (4 * d, d)):
        x, w, g = make(rows, i), make(o, i), make(rows, o)
        for _ in range(config.num_hidden_layers): x @ w.T, g @ w, g.T @ x
    for _ in range(config.num_hidden_layers): attention_products(B, config.num_attention_heads, T, K, d // config.num_attention_heads)
    w, chunk = make(V, d), LOGITS // V
    for first in range(0, blocks, chunk):
        x = make(min(chunk, blocks - first), d)
        g = x @ w.T
        g @ w, g.T @ x


def predictor(B, T, K):
    """A pass and its loss: ours by mask and fast, and transformers' model on the same embeddings, mask and positions."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM
    d, layers, H = PYTHIA[args.size]
    config = Config(50304, d, layers, H)
    ours = Predictor(GPTNeoX(config), d, K).to(args.device)
    theirs = GPTNeoXForCausalLM(GPTNeoXConfig(hidden_size=d, num_hidden_layers=layers, num_attention_heads=H, intermediate_size=4 * d,
                                              vocab_size=50304, attn_implementation="sdpa")).to(args.device)
    theirs.load_state_dict({name.replace("embed_out", "lm_head"): p for name, p in ours.lm.state_dict().items()})
    tok, prev = torch.randint(2, 50304, (B, T), device=args.device), torch.zeros(B, dtype=torch.int64, device=args.device)
    message, starts = torch.randn(B, T, d, device=args.device) * 0.02, torch.arange(0, T - 1, device=args.device)
    with torch.no_grad(): _, target, before, index = ours(tok, prev, message)
    mask, weight = ahead_mask(T, starts, K)[None, None].expand(B, -1, -1, -1), (index < T).float()
    pos = torch.cat((torch.arange(T, device=args.device), (starts[:, None] + 1 + torch.arange(K, device=args.device)).flatten()))

    def by(attention):
        ours.attention = attention
        return cross_entropy(ours(tok, prev, message)[0], ours.lm.embed_out.weight, target, weight)[0]

    def stock():
        embed = theirs.gpt_neox.embed_in
        x = torch.cat((embed(torch.cat((prev[:, None], tok[:, :-1]), 1)) + message, embed(before).flatten(1, 2)), 1)
        logits = theirs(inputs_embeds=x, attention_mask=mask, position_ids=pos[None], logits_to_keep=(T - 1) * K, use_cache=False).logits
        return (F.cross_entropy(logits.flatten(0, 1).float(), target.flatten(), reduction="none") * weight.flatten()).sum()

    def both(total, model):
        with torch.autocast(args.device, args.dtype, enabled=args.dtype != torch.float32): loss = total()
        return loss.detach(), *torch.autograd.grad(loss, tuple(model.parameters()))

    ways = {"transformers": lambda: both(stock, theirs), "mask": lambda: both(lambda: by("mask"), ours.lm),
            "fast": lambda: both(lambda: by("fast"), ours.lm)}
    compare(f"predictor pass, {args.size}, V=50304: B={B} T={T} K={K}", ways, lambda: predictor_products(B, T, K, config))


def step(T=256, B=16, K=8, V=279, D=1345):
    """train.py's default shapes but for T; the stream is written by the target, as in training."""
    lm = lambda: GPTNeoX(Config(V, 128, 3, 4))
    batch = Batch(torch.randn(B, T, D), torch.randint(V, (B, T)), torch.rand(B, T) < 0.5, torch.ones(B, T, dtype=torch.bool),
                  torch.zeros(B, dtype=torch.int64), torch.rand(B, T), torch.ones(B, D)).to(args.device)
    for stride in (4, 1):
        models = {way: Grounding(Encoder(lm(), D, T), Predictor(lm(), 128, K, stride=stride, attention=way)).to(args.device)
                  for way in ("mask", "fast")}
        laps = {way: [timed_step(model, batch) for _ in range(args.rounds + 1)][1:] for way, model in models.items()}
        for way, times in laps.items():
            print(f"\na step at T={T}, B={B}, K={K}, V={V}, a start every {stride}, attention by {way}")
            for part in times[0]:
                t = [lap[part] for lap in times]
                print(f"  {part:28}{statistics.median(t):9.1f} ms [{min(t):.1f} .. {max(t):.1f}]", flush=True)


def timed_step(model, batch):
    """Milliseconds of each part of a training step, {part: ms}."""
    optimizer, marks = torch.optim.AdamW(model.parameters()), [("", clock())]
    mark = lambda name: marks.append((name, clock()))
    tok, prob = model.encoder.annotate(batch.obs, batch.tok, batch.known, batch.prev, batch.noise)
    good = accepted(tok, prob, batch.known, 0.0, 0.0)
    mark("target's writing")
    hidden = model.encoder(batch.obs, tok, batch.prev, batch.keep)
    mark("encoder, forward")
    out, target, _, _ = model.predictor(tok, batch.prev, model.predictor.message(hidden, model.encoder))
    mark("predictor, forward")
    weights = torch.ones_like(target)
    total = cross_entropy(out, model.predictor.lm.embed_out.weight, target, weights)[0] / weights.sum()
    for rows in (batch.known, good): total = total + cross_entropy(hidden, model.encoder.lm.embed_out.weight, tok, rows)[0] / len(tok)
    mark("losses and their gradients")
    total.backward()
    mark("backward")
    optimizer.step()
    mark("optimizer")
    parts = {name: (now - before) * 1e3 for (_, before), (name, now) in itertools.pairwise(marks)}
    return parts | {"the step": sum(parts.values())}


def growth():
    for T, K in ((128, 8), (256, 8), (512, 8), (1024, 8), (256, 4), (256, 16), (256, 32)):
        *qkv, grad = torch.randn(4, 1, 8, T + (T - 1) * K, 64, device=args.device, dtype=args.dtype)
        for x in qkv: x.requires_grad_()
        run = lambda qkv=qkv, grad=grad, T=T, K=K: torch.autograd.grad(ahead_attention(*qkv, T, K, 1), qkv, grad)
        run()
        memory, times = peak_memory(run), []
        for _ in range(args.rounds):
            start = clock()
            run()
            times.append((clock() - start) * 1e3)
        print(f"fast attention, T={T:5} K={K:3}: {statistics.median(times):8.1f} ms [{min(times):.1f} .. {max(times):.1f}] {memory:8.0f} MB"
              f" {memory / (T * K) * 1024:6.1f} KB for each of the T*K tokens", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=["attention", "predictor", "step", "growth"])
    parser.add_argument("--size", default="70m", choices=PYTHIA)
    parser.add_argument("--shapes", default=None, help="B,T,K B,T,K ..")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", type=lambda name: getattr(torch, name), default=torch.float32)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    shapes = [tuple(map(int, s.split(","))) for s in args.shapes.split()] if args.shapes else SHAPES
    if args.table == "growth": growth()
    elif args.table == "step": step()
    else:
        for shape in shapes: {"attention": attention, "predictor": predictor}[args.table](*shape)
