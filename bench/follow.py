"""
What a step of a followed stream costs (sample.py --follow): p50 and p99 per step at the shapes of Pythia 14m, 70m and 160m.

    python bench/follow.py
    python bench/follow.py --T=256 --steps=600 --device=cuda
"""
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402
import torch  # noqa: E402

from configurator import configure  # noqa: E402
from encoder import Encoder  # noqa: E402
from model import Config, GPTNeoX  # noqa: E402

T = 128                               # steps of a window
obs_dim = 1024                        # numbers of an observation
steps = 400                           # to measure, after a window of warming up
device = "cpu"                        # 'cpu' | 'cuda' | 'mps'

SHAPES = {"14m": (128, 6, 4), "70m": (512, 6, 8), "160m": (768, 12, 12)}   # d, layers, heads


def main():
    print(f"{'shape':6} {'p50 ms':>8} {'p99 ms':>8}   T={T}, {torch.get_num_threads()} threads, {device}")
    for name, (d, layers, heads) in SHAPES.items():
        encoder, taken = Encoder(GPTNeoX(Config(50304, d, layers, heads)), obs_dim, T).to(device).eval(), []
        observations = (torch.randn(1, obs_dim).to(device) for _ in range(T + steps))
        last = time.perf_counter()
        for tok, _ in encoder.follow(observations):
            tok.item()                                       # waits for the device
            now = time.perf_counter()
            taken.append(now - last)
            last = now
        p50, p99 = np.percentile(taken[T:], (50, 99)) * 1000
        print(f"{name:6} {p50:8.2f} {p99:8.2f}")


if __name__ == "__main__":
    configure(globals())
    main()
