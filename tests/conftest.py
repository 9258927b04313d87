import contextlib
import io
import json
import multiprocessing.dummy
import runpy
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from browser import CHROMIUM, showing, started

import encoder as encoder_module
import train
from data import SILENCE, Tokenizer
from encoder import Encoder, Features, written_captions
from model import Config, GPTNeoX
from runtime import checkpoint
from runtime.dataset import Caption, Episode, Episodes, write_shard
from runtime.shards import write_meta
from train import Predictor

ROOT = Path(__file__).resolve().parent.parent
# what has hardly learned never stops by itself, and 64 tokens a step take most of a run's time
encoder_module.MOST = 16
torch.set_num_threads(1)  # other numbers of threads round otherwise
# what workers import is imported once, in the server that forks them
multiprocessing.set_forkserver_preload(["torch.distributed.fsdp", "train", "domains.vpt.embed"])
TEXTS = ["open door", "walk", "close the door"]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def program(path, *arguments):
    """`python path arguments`, in this process: (exit code, stdout, stderr)."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    argv = mock.patch("sys.argv", [path, *map(str, arguments)])
    settings = mock.patch.dict(vars(train))
    with argv, settings, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_path(str(ROOT / path), run_name="__main__")
        except SystemExit as ended:
            code = ended.code or 0
    if torch.are_deterministic_algorithms_enabled():  # to say so imports a compiler: seconds
        torch.use_deterministic_algorithms(False)
    return code, out.getvalue(), err.getvalue()


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def make_played(module, folder, processes=1, context=multiprocessing.dummy, **settings):
    """A data set of a module that plays, its episodes in a thread, or in forks: a process that is
    spawned takes seconds to start."""
    with mock.patch.object(module, "workers", context.Pool):
        module.make(folder, processes=processes, **settings)


@pytest.fixture(scope="session")
def browser():
    if not CHROMIUM:
        pytest.skip("Chromium is not installed: apt-get install chromium")
    with started() as browser:
        yield browser


@pytest.fixture
def shown(browser, tmp_path):
    """Opens a page as browser.episode writes it."""
    with showing(browser, tmp_path / "episode.html") as show:
        yield show


@pytest.fixture
def tiny():
    """A small random GPTNeoX in float64: exact comparisons."""
    config = Config(vocab_size=31, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    lm = GPTNeoX(config).double()
    lm.embed_out.weight.data *= 8
    lm.embed_out.weight.data[SILENCE] *= 4  # a step has from one to all the tokens it may have
    return lm


@pytest.fixture
def encoder(tiny):
    return Encoder(tiny, Features(5), T=8).double()


@pytest.fixture
def tokenizer():
    return Tokenizer.from_captions(TEXTS)


def toy_episode(name, rng, steps=40, obs_dim=6):
    """An episode in which feature k is 1 where caption k starts."""
    obs = (rng.random((steps, obs_dim)) * 0.1).astype(np.float32)
    captions = []
    for start in range(3, steps - 5, 8):
        k = int(rng.integers(len(TEXTS)))
        obs[start, k] = 1
        captions.append(Caption(start, start + 1, TEXTS[k]))
    return Episode(name, obs, captions)


@pytest.fixture
def toy(tmp_path):
    """A folder with a toy data set: 12 episodes for training, 3 for val, 3 for test."""
    folder = tmp_path / "toy"
    rng = np.random.default_rng(0)
    splits = dict(train=12, val=3, test=3)
    for split, count in splits.items():
        episodes = [toy_episode(f"{split}-{n}", rng) for n in range(count)]
        write_shard(folder, split, 0, episodes)
    about = dict(source="toy", licence="", splits=list(splits))
    write_meta(folder, obs_dim=6, dtype="float32", steps_per_second=1, **about)
    return folder


@pytest.fixture
def a_run(toy, tokenizer, tmp_path):
    """The checkpoint of a run, of chance weights: the first that write several captions."""
    config = Config(tokenizer.vocab_size, 32, 2, 2)
    obs = Episodes(toy, "test")[0].obs
    captions, seed = [], 45  # the next one does; most say nothing, or never stop, which takes long
    while not 4 <= len(captions) < 20:
        seed += 1
        torch.manual_seed(seed)
        encoder = Encoder(GPTNeoX(config), Features(6), T=16)
        with torch.no_grad():
            encoder.projector.features.scale.fill_(3)
            encoder.lm.embed_out.weight[2:258] = 0  # words, hardly single bytes
            encoder.lm.embed_out.weight *= 8
            encoder.lm.embed_out.weight[SILENCE] *= 4
        [captions] = written_captions(encoder, [obs], tokenizer)
    folder = tmp_path / "run" / "step-000001"
    encoder.save_pretrained(folder / "encoder")
    Predictor(GPTNeoX(config), 32, K=4).save_pretrained(folder / "predictor")
    tokenizer.save(folder / "tokenizer.json")
    (folder / "config.json").write_text(json.dumps(dict(data=str(toy), predict_weight=0.5)))
    (folder / "checksums.json").write_text(json.dumps(checkpoint.checksums(folder)))
    return folder
