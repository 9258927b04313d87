import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "domains")]

from data import Caption, Episode, Tokenizer, write_meta, write_shard  # noqa: E402
from encoder import Encoder  # noqa: E402
from model import Config, GPTNeoX  # noqa: E402


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture
def tiny():
    """A small random GPTNeoX in float64: exact comparisons."""
    return GPTNeoX(Config(vocab_size=31, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)).double()


@pytest.fixture
def encoder(tiny):
    return Encoder(tiny, obs_dim=5, window=8).double()


TEXTS = ["open door", "walk", "close the door"]


def toy_episode(name, rng, steps=40, obs_dim=6):
    """An episode whose captions can be read off the observations: feature k is 1 where caption k starts."""
    obs, captions = (rng.random((steps, obs_dim)) * 0.1).astype(np.float32), []
    for start in range(3, steps - 5, 8):
        k = int(rng.integers(len(TEXTS)))
        obs[start, k] = 1
        captions.append(Caption(start, start + 1, TEXTS[k]))
    return Episode(name, obs, captions)


@pytest.fixture
def toy(tmp_path):
    """A folder with a toy data set: 12 episodes for training, 3 for val, 3 for test."""
    rng = np.random.default_rng(0)
    for split, count in dict(train=12, val=3, test=3).items():
        write_shard(tmp_path / "toy", split, 0, [toy_episode(f"{split}-{n}", rng) for n in range(count)])
    write_meta(tmp_path / "toy", obs_dim=6, dtype="float32", steps_per_second=1, source="toy", licence="", splits=["train", "val", "test"])
    return tmp_path / "toy"


@pytest.fixture
def tokenizer():
    return Tokenizer.from_captions(TEXTS)
