"""Prompting: likelihoods from a shared cache, observations in words, what is chosen on val."""

from types import SimpleNamespace

import pytest
import torch
import transformers

from bench import prompting
from domains.crafter_play import play
from domains.crafter_words import describe, in_words
from runtime.dataset import Caption


@pytest.fixture
def lm():
    """A small random Llama, which is what SmolLM2 is."""
    shape = dict(vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=2)
    heads = dict(num_attention_heads=4, num_key_value_heads=2)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, **heads)).double().eval()


def test_likelihoods_from_a_shared_cache_are_those_of_whole_passes(lm):
    prompt, answers = [3, 14, 15, 9, 26], [[5, 3], [5, 8, 9, 7], [9]]
    expected = []
    for answer in answers:
        ids = torch.tensor([prompt + answer])
        logp = lm(ids).logits.log_softmax(-1)[0]
        places = range(len(prompt) - 1, ids.shape[1] - 1)
        expected.append(sum(logp[t, ids[0, t + 1]] for t in places))
    actual = prompting.log_likelihoods(lm, prompt, answers)
    torch.testing.assert_close(actual, torch.stack(expected), rtol=0, atol=1e-12)


def test_a_prompt_ends_with_what_is_asked_and_is_read_once(lm):
    prompts = []

    def by_bytes(texts, add_special_tokens=True):
        prompts.extend([texts] if isinstance(texts, str) else [])
        ids = list(texts.encode()) if isinstance(texts, str) else [list(t.encode()) for t in texts]
        return SimpleNamespace(input_ids=ids)

    prompter = prompting.Prompter(lm, by_bytes, ["eat cow", "nothing"], listed=False)
    for _ in range(2):
        scores = prompter.scores("food +6", [("cow gone", "eat cow")])
    assert scores.shape == (2,) and len(prompts) == 1
    assert prompts[0].endswith("\ncow gone -> eat cow\nfood +6 ->")


TOLD = {
    "collect wood": "wood +1",
    "place table": "table ahead",
    "make wood pickaxe": "wood pickaxe +1",
    "place furnace": "furnace ahead",
    "defeat zombie": "zombie gone",
    "collect drink": "drink +1",
}


def test_words_tell_what_the_games_own_counters_count():
    episodes = [play(seed, steps=200, area=36) for seed in (3, 4)]
    told = []
    for episode in episodes:
        lines = describe(torch.from_numpy(episode.obs))
        events = [c for c in episode.captions if c.start and c.text in TOLD]
        told += [TOLD[c.text] in in_words(lines.get(c.start, ((), ()))) for c in events]
    assert len(told) >= 8 and sum(told) / len(told) > 0.9


def test_what_changed_before_is_told_as_well():
    lines = {7: (("wood +1", "grass ahead"), ()), 9: (("wood +1", "tree ahead"), ("wood +1",))}
    assert [in_words(line) for line in lines.values()] == [
        "wood +1, grass ahead",
        "wood +1, tree ahead (before: wood +1)",
    ]


def test_the_option_and_the_bias_that_are_best_on_val_are_chosen():
    """Only "loud" tells a caption from nothing, and only with 2 nats more for nothing."""
    answers, true = ["walk", "nothing"], [Caption(5, 6, "walk")]

    def scores_of(option, obs, lines):
        walk = dict(quiet=(0.0, 0.0), loud=(3.0, 1.8))[option]
        return {t: torch.tensor([logp, 0.0]) for t, logp in zip((5, 20), walk, strict=True)}

    bias, option = prompting.choose(scores_of, [("quiet",), ("loud",)], answers, [(0, 0, true)])
    assert option == ("loud",) and bias == 2.0
    written = prompting.captions(scores_of("loud", 0, 0), answers, bias)
    assert written == [Caption(5, 6, "walk")]


def test_a_missing_folder_of_weights_is_one_line(monkeypatch):
    for package in ("accelerate", "gguf"):
        monkeypatch.setitem(__import__("sys").modules, package, SimpleNamespace())
    with pytest.raises(ValueError, match="no such file or folder"):
        prompting.load_model("nowhere")
