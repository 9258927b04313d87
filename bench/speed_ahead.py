"""
How fast the K-ahead pass is, forward and backward, heads of Pythia-70m, on one thread.

    python -m bench.speed_ahead attention      the fast path against the mask
    python -m bench.speed_ahead growth         its memory as T and K grow
    python -m bench.speed_ahead predictor      a whole pass and loss, V = 50,304 (minutes, 6 GB)

The clock is the processor's own, which neighbours do not disturb. Contenders take turns, must agree
before they are timed, and the least of the rounds counts.
"""

from configurator import run
import ctypes
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from model import Config, GPTNeoX, linear_cross_entropy
from train import Predictor, ahead_attention, ahead_mask

H, HS, LAYERS = 8, 64, 6


def seconds(rounds, **contenders):
    """{name: least processor seconds} of functions that return tensors which must agree."""
    results = [contender() for contender in contenders.values()]
    for ours, first in zip(results[-1], results[0], strict=True):
        assert (ours - first).norm() < 1e-3 * first.norm(), "they disagree"
    times = dict.fromkeys(contenders, float("inf"))
    for _ in range(rounds):
        for name, contender in contenders.items():
            start = time.process_time()
            contender()
            times[name] = min(times[name], time.process_time() - start)
    return times


def attention_inputs(B, T, K):
    N = T + (T - 1) * K
    q, k, v, grad = torch.randn(4, B, H, N, HS)
    return [x.requires_grad_() for x in (q, k, v)], grad


def attention():
    print("B, T, K         mask ms   fast ms   mask / fast")
    for B, T, K in ((64, 16, 8), (4, 64, 8), (2, 256, 8), (1, 512, 8), (2, 256, 16)):
        qkv, grad = attention_inputs(B, T, K)
        mask = ahead_mask(T, T - 1, K, 1, "cpu")

        def by_mask(qkv=qkv, grad=grad, mask=mask):
            out = F.scaled_dot_product_attention(*qkv, mask)
            return out.detach(), *torch.autograd.grad(out, qkv, grad)

        def fast(qkv=qkv, grad=grad, T=T, K=K):
            out = ahead_attention(*qkv, T, K, 1)
            return out.detach(), *torch.autograd.grad(out, qkv, grad)

        t = seconds(3, mask=by_mask, fast=fast)
        ratio = t["mask"] / t["fast"]
        print(f"{B}, {T}, {K}".ljust(14), f"{t['mask'] * 1e3:8.0f}  {t['fast'] * 1e3:8.0f}", end="")
        print(f"  {ratio:10.1f}", flush=True)


def peak_megabytes(function):
    """Memory beyond what there was before, by Linux's high-water mark."""

    def status(key):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024

    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    function()
    return status("VmHWM") - before


def growth():
    print("   T   K       MB   KB a token of T*K")
    for T, K in ((128, 8), (256, 8), (512, 8), (1024, 8), (256, 4), (256, 16), (256, 32)):
        qkv, grad = attention_inputs(1, T, K)

        def fast(qkv=qkv, grad=grad, T=T, K=K):
            torch.autograd.grad(ahead_attention(*qkv, T, K, 1), qkv, grad)

        peak = peak_megabytes(fast)
        print(f"{T:4} {K:3} {peak:8.0f} {peak * 1024 / T / K:8.1f}", flush=True)


def matrix_products(B, T, K, V):
    """The same pass as its matrix products alone: one forward and two backward of each."""
    N, d, S = T + (T - 1) * K, H * HS, T - 1
    x, wide, out = torch.ones(B * N, d), torch.ones(B * N, 4 * d), torch.ones(B * S * K, d)
    w_qkv, w_d, w_up = torch.ones(d, 3 * d), torch.ones(d, d), torch.ones(d, 4 * d)
    logits_chunk, words = 2**23 // V, torch.ones(V, d)
    for _ in range(3 * LAYERS):
        x @ w_qkv, x @ w_d, x @ w_up, wide @ w_up.T
    keys, p = torch.ones(B * H, T, HS), torch.ones(B * H, 256, HS)
    for _ in range(LAYERS):
        for first in range(0, S, 256 // K):
            seen = keys[:, : min(first + 256 // K, S)]
            scores = p @ seen.mT
            for _ in range(3):
                p @ seen.mT
                scores @ seen
    for rows in out.split(logits_chunk):
        logits = rows @ words.T
        logits @ words, logits.T @ rows


def predictor():
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    B, T, K, V = 2, 256, 8, 50304
    ours = Predictor(GPTNeoX(Config(V, H * HS, LAYERS, H)), H * HS, K)
    shape = dict(vocab_size=V, hidden_size=H * HS, num_hidden_layers=LAYERS)
    shape |= dict(num_attention_heads=H, intermediate_size=4 * H * HS)
    theirs = GPTNeoXForCausalLM(GPTNeoXConfig(**shape, attn_implementation="sdpa"))
    theirs.load_state_dict({name: p for name, p in ours.lm.state_dict().items()}, strict=False)
    if "lm_head.weight" in theirs.state_dict():
        theirs.lm_head.weight.data.copy_(ours.lm.embed_out.weight)
    tok, hidden = torch.randint(2, V, (B, T)), torch.randn(B, T, H * HS)
    input_tok = F.pad(tok[:, :-1], (1, 0))
    blocks = ours.blocks(tok, 0)
    inputs, target = blocks[..., :-1], blocks[..., 1:]
    mask = ahead_mask(T, T - 1, K, 1, "cpu")
    bias = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)[None, None]
    step = torch.arange(T)
    pos = torch.cat((step, (step[:-1, None] + torch.arange(1, K + 1)).flatten()))

    def our_pass():
        words = ours.lm.embed_out.weight
        loss, _ = linear_cross_entropy(
            ours(input_tok, hidden, inputs), words, target, torch.ones(target.shape)
        )
        return torch.autograd.grad(loss, [words, *ours.lm.gpt_neox.layers.parameters()])

    def their_pass():
        x = torch.cat((ours.lm.embed(input_tok), ours.lm.embed(inputs).flatten(1, 2)), 1)
        mask = bias.expand(B, 1, -1, -1)
        out = theirs(inputs_embeds=x, attention_mask=mask, position_ids=pos[None].expand(B, -1))
        loss = F.cross_entropy(out.logits[:, T:].mT, target.flatten(1, 2), reduction="sum")
        words = theirs.get_output_embeddings().weight
        return torch.autograd.grad(loss, [words, *theirs.gpt_neox.layers.parameters()])

    t = seconds(1, transformers=their_pass, ours=our_pass)
    start = time.process_time()
    matrix_products(B, T, K, V)
    products = time.process_time() - start
    print(
        f"B={B} T={T} K={K} V={V}: transformers {t['transformers']:.1f} s, ours {t['ours']:.1f} s"
    )
    print(f"ratio {t['transformers'] / t['ours']:.2f}; ours / products {t['ours'] / products:.2f}")


def main():
    programs = dict(attention=attention, growth=growth, predictor=predictor)
    if len(sys.argv) != 2 or sys.argv[1] not in programs:
        raise ValueError(f"python -m bench.speed_ahead {' | '.join(programs)}")
    torch.set_num_threads(1)
    programs[sys.argv[1]]()


if __name__ == "__main__":
    run(main)
