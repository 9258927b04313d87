"""
How fast attention under the K-ahead mask is, forward and backward, on one thread: the fast path of
train.py against the mask, with the heads of Pythia-70m.

    python -m bench.speed_ahead

The clock is the processor's own, which neighbours do not disturb. Both take turns, must agree
before they are timed, and the least of three rounds counts.
"""

from configurator import run
import functools
import time

import torch
import torch.nn.functional as F

from train import ahead_attention, ahead_mask

H, HS = 8, 64  # heads, and numbers in each
SHAPES = (64, 16, 8), (16, 48, 8), (4, 64, 8), (2, 256, 8), (1, 512, 8), (2, 256, 16)  # B, L, K


def forward_and_backward(attend, q, k, v, grad):
    out = attend(q, k, v)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), grad)


def compare(B, L, K):
    """Milliseconds by the mask and by the fast path."""
    q, k, v, grad = torch.randn(4, B, H, L + (L - 1) * K, HS)
    inputs = *(x.requires_grad_() for x in (q, k, v)), grad
    mask = ahead_mask(L, L - 1, K, 1, "cpu")
    by_mask = functools.partial(F.scaled_dot_product_attention, attn_mask=mask)
    fast = functools.partial(ahead_attention, L=L, K=K, stride=1)
    results = [forward_and_backward(attend, *inputs) for attend in (by_mask, fast)]
    for theirs, ours in zip(*results, strict=True):
        assert (ours - theirs).norm() < 1e-3 * theirs.norm(), "they disagree"
    rounds = []
    for _ in range(3):
        for attend in (by_mask, fast):
            start = time.process_time()
            forward_and_backward(attend, *inputs)
            rounds.append(1000 * (time.process_time() - start))
    return min(rounds[::2]), min(rounds[1::2])


def main():
    torch.set_num_threads(1)
    print("B, L, K         mask ms   fast ms   mask / fast")
    for shape in SHAPES:
        mask, fast = compare(*shape)
        name = ", ".join(map(str, shape))
        print(f"{name:14} {mask:8.0f}  {fast:8.0f}  {mask / fast:10.1f}", flush=True)


if __name__ == "__main__":
    run(main)
