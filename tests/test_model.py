"""GPTNeoX computes what transformers' GPTNeoXForCausalLM does, on weights that it saved."""

import copy

import pytest
import torch
import torch.nn.functional as F

from model import GPTNeoX

SHAPE = dict(vocab_size=96, hidden_size=32, num_hidden_layers=3, num_attention_heads=4)
CASES = {
    "as Pythia": dict(),
    "sequential residual, all dimensions rotate": dict(
        use_parallel_residual=False, rotary_pct=1.0, hidden_act="gelu_new"
    ),
    "another base and half of a head, narrow MLP": dict(
        num_attention_heads=2,
        rotary_emb_base=500,
        rotary_pct=0.5,
        intermediate_size=40,
        layer_norm_eps=1e-3,
    ),
    "as GPT-NeoX-20B, in shards of float16": dict(
        hidden_act="gelu_fast", dtype=torch.float16, shard=20_000
    ),
    "bfloat16": dict(hidden_act="gelu_pytorch_tanh", dtype=torch.bfloat16),
}


@pytest.fixture(scope="module")
def transformers():
    """Not imported at the top: every worker of pytest reads that, and it takes a second."""
    module = pytest.importorskip("transformers")
    module.utils.logging.disable_progress_bar()
    return module


def saved_by(transformers, folder, dtype=torch.float32, shard="5GB", **changes):
    """Random weights on disk (biases and norms too, so that a dropped one shows), in float32."""
    shape = SHAPE | dict(intermediate_size=128) | changes
    model = transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**shape))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    return model.float().eval()


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES.keys())
def pair(request, tmp_path_factory, transformers):
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    theirs = saved_by(transformers, folder, **request.param)
    assert ("shard" in request.param) == (len(list(folder.glob("*.safetensors"))) > 1)
    return GPTNeoX.from_pretrained(folder), theirs


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def tokens(B, T):
    return torch.randint(SHAPE["vocab_size"], (B, T), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_hidden_states_and_logits_agree_with_transformers(pair):
    ours, theirs = pair
    states = []
    modules = [*ours.gpt_neox.layers[:-1], ours.gpt_neox.final_layer_norm]
    hooks = [m.register_forward_hook(lambda m, x, y: states.append(y)) for m in modules]
    logits = ours(tokens(3, 70))
    for hook in hooks:
        hook.remove()
    expected = theirs(tokens(3, 70), output_hidden_states=True)
    assert relative(logits, expected.logits) < 1e-5
    # theirs begin with the embeddings, and the last one is after the final norm
    for a, b in zip(states, expected.hidden_states[1:], strict=True):
        assert relative(a, b) < 1e-5


def test_gradients_of_every_parameter_agree(pair):
    ours, theirs = map(copy.deepcopy, pair)
    tok = tokens(2, 40)
    for logits in (ours(tok), theirs(tok).logits):
        F.cross_entropy(logits[:, :-1].flatten(0, 1), tok[:, 1:].flatten()).backward()
    gradients = {name: p.grad for name, p in ours.named_parameters()}
    for name, p in theirs.named_parameters():
        name = name.replace("lm_head", "embed_out")
        assert relative(gradients.pop(name), p.grad) < 1e-4, name
    assert not gradients


@torch.no_grad()
def test_greedy_continuations_are_identical(pair):
    ours, theirs = pair
    prompt = tokens(3, 8)
    length = dict(max_new_tokens=32, min_new_tokens=32, eos_token_id=None)
    mask = torch.ones_like(prompt)
    expected = theirs.generate(prompt, attention_mask=mask, do_sample=False, **length)
    cache = ours.new_cache(3, 40)
    written = [prompt]
    for _ in range(32):
        written.append(ours(written[-1], cache)[:, -1:].argmax(-1))
    assert torch.equal(torch.cat(written, 1), expected)


@torch.no_grad()
def test_cache_equals_full_pass_and_transformers_beyond_2048_positions(tmp_path, transformers):
    theirs = saved_by(transformers, tmp_path, num_hidden_layers=1)
    ours = GPTNeoX.from_pretrained(tmp_path)
    tok = tokens(1, 2070)
    full, expected = ours(tok), theirs(tok).logits
    cache = ours.new_cache(1, 2070)
    pieces = [ours(part, cache) for part in tok.split([2000, 50, *[1] * 20], 1)]
    assert relative(torch.cat(pieces, 1), full) < 1e-5
    assert relative(full[:, 2048:], expected[:, 2048:]) < 1e-5


@torch.no_grad()
def test_saved_models_load_in_transformers_with_the_same_logits(pair, tmp_path, transformers):
    pair[0].save_pretrained(tmp_path)
    theirs = transformers.GPTNeoXForCausalLM.from_pretrained(tmp_path)
    again = GPTNeoX.from_pretrained(tmp_path)
    assert again.config == pair[0].config
    assert relative(theirs(tokens(2, 30)).logits, pair[0](tokens(2, 30))) < 1e-5
    assert torch.equal(again(tokens(2, 30)), pair[0](tokens(2, 30)))


def test_runs_and_is_saved_in_the_dtype_asked_for(tiny, tmp_path, transformers):
    tiny.save_pretrained(tmp_path / "double")
    model = GPTNeoX.from_pretrained(tmp_path / "double", dtype=torch.bfloat16)
    assert model(tokens(2, 9) % 31).dtype == torch.bfloat16
    model.save_pretrained(tmp_path / "half")
    theirs = transformers.GPTNeoXForCausalLM.from_pretrained(tmp_path / "half")
    assert {p.dtype for p in theirs.parameters()} == {torch.bfloat16}
