"""Prompting: likelihoods from a shared cache, observations in words, what is chosen."""

import numpy as np
import pytest
import torch
import transformers

from bench import prompting
from data import Caption
from domains.crafter_play import play


@pytest.fixture
def lm():
    """A small random Llama, which is what SmolLM2 is."""
    shape = dict(vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2)
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
