"""The baselines of bench/labels.py that train nothing."""
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file

sys.path.insert(0, str(ROOT / "bench"))
import in_context  # noqa: E402

from data import Episodes, Tokenizer  # noqa: E402
from model import Config, GPTNeoX  # noqa: E402


@pytest.fixture
def known(toy):
    return in_context.Annotated(Episodes(toy, "train"), [0, 1, 2], lambda obs: obs)


@pytest.fixture
def speaker(tmp_path, tokenizer):
    """A folder with a small language model of random weights and its tokenizer."""
    GPTNeoX(Config(tokenizer.vocab_size, 32, 2, 2)).save_pretrained(tmp_path / "speaker")
    tokenizer.save(tmp_path / "speaker" / "tokenizer.json")
    return tmp_path / "speaker"


def test_neighbours_say_what_the_nearest_annotated_steps_say(toy, known):
    test = Episodes(toy, "test")
    assert in_context.knn(test, known, (1,)) == {1: 1.0}                               # the toy's captions stand in the observations
    blind = in_context.Annotated(Episodes(toy, "train"), [0, 1, 2], torch.zeros_like)
    assert in_context.knn(test, blind, (1,))[1] < 0.3


def test_a_vote_goes_to_the_most_frequent_and_a_tie_to_the_nearest():
    assert in_context.vote(["a", "b", "b"]) == "b"
    assert in_context.vote(["a", "b", None]) == "a" and in_context.vote([None, "b", "b", None]) is None


def test_likelihood_of_answers_is_that_of_transformers(speaker):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GPTNeoXForCausalLM.from_pretrained(speaker).eval()
    prompt, answers = [5, 9, 7, 30], [[4], [8, 3, 12], [6, 6]]
    found = in_context.likelihood(GPTNeoX.from_pretrained(speaker), prompt, answers)
    for answer, logp in zip(answers, found.tolist(), strict=True):
        with torch.no_grad(): rows = theirs(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1:-1].log_softmax(-1)
        assert logp == pytest.approx(sum(rows[n, token].item() for n, token in enumerate(answer)), abs=1e-4)


def test_a_prompt_with_one_example_says_what_the_nearest_neighbour_says(toy, known, speaker, monkeypatch):
    test = Episodes(toy, "test")
    monkeypatch.setattr(in_context, "SHOTS", 1)
    assert in_context.prompted(test, known, speaker) == in_context.knn(test, known, (1,))[1]


def test_the_language_model_chooses_among_the_captions_it_was_shown(toy, known, speaker, monkeypatch):
    asked = []
    def likelihood(lm, prompt, answers):
        asked.append((prompt, answers))
        return torch.arange(len(answers), 0, -1.0)                                      # always the first: the nearest's
    monkeypatch.setattr(in_context, "likelihood", likelihood)
    assert in_context.prompted(Episodes(toy, "test"), known, speaker) == 1.0
    text = Tokenizer.from_file(speaker / "tokenizer.json").decode(asked[0][0])
    assert text.count("\n") == in_context.SHOTS and text.endswith(" =") and " = nothing\n" in text
    assert all(len(answers) > 1 for _, answers in asked)


def test_strong_features_are_spelled_in_order_with_their_signs():
    assert in_context.spelled(torch.from_numpy(np.float32([0, -3, 0.2, 5, 0, 1, 1, 2, -2.6]))) == "1:-3 3:5 5:1 6:1 7:2 8:-3"


@pytest.mark.parametrize("variant", ["latent", "shared"])
def test_the_variants_train(toy, tmp_path, variant):
    small = "--hidden_size=16 --num_hidden_layers=1 --num_attention_heads=2 --T=16 --K=2 --batch_size=4 --n_annotated=4 --warmup=2".split()
    steps = "--max_iters=12 --eval_interval=12 --eval_episodes=1 --write_from=6 --accept=0 --accept_unit=token".split()
    command = [sys.executable, "bench/variants.py", variant, *small, *steps, f"--data={toy}", f"--out_dir={tmp_path / 'out'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    last = json.loads((tmp_path / "out/log.jsonl").read_text().splitlines()[-1])
    assert last["predict"] > 0 and last["accepted"] > 0
    lm = lambda part: load_file(tmp_path / f"out/step-000012/{part}/model.safetensors")
    assert (variant == "shared") == all(torch.equal(x, lm("predictor")[name]) for name, x in lm("encoder").items())
