"""GPTNeoX computes what transformers' GPTNeoXForCausalLM computes, on weights that transformers saved."""
import copy

import pytest
import torch

from model import GPTNeoX

transformers = pytest.importorskip("transformers")
transformers.utils.logging.disable_progress_bar()
SHAPE = dict(vocab_size=96, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=128)
CASES = {
    "as Pythia": dict(),
    "residual in sequence, all dimensions rotate": dict(use_parallel_residual=False, rotary_pct=1.0),
    "head size 16, another base": dict(num_attention_heads=2, rotary_emb_base=500, rotary_pct=0.5),
    "one head of 32, narrow MLP": dict(num_attention_heads=1, intermediate_size=40, layer_norm_eps=1e-3),
    "tied, no attention bias": dict(tie_word_embeddings=True, attention_bias=False),
    "gelu by tanh, as GPT-NeoX-20B": dict(hidden_act="gelu_fast"),
    "float16 file in shards": dict(dtype=torch.float16, shard=20_000),
    "bfloat16 file, in sequence": dict(dtype=torch.bfloat16, use_parallel_residual=False),
}


def saved_by_transformers(folder, dtype=torch.float32, shard="5GB", **shape):
    """Random weights on disk (biases and norms too, so that a dropped one shows); returns transformers' model of them in float32."""
    torch.manual_seed(0)
    model = transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**SHAPE | shape))
    with torch.no_grad():
        for p in model.parameters(): p.add_(torch.randn_like(p) * 0.3)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    return model.float().eval()


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES.keys())
def pair(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    theirs = saved_by_transformers(folder, **request.param)
    assert request.param.get("shard") is None or len(list(folder.glob("*.safetensors"))) > 1
    return GPTNeoX.from_pretrained(folder), theirs


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def tokens(B, T):
    return torch.randint(SHAPE["vocab_size"], (B, T), generator=torch.Generator().manual_seed(1))


def test_logits_agree_with_transformers(pair):
    ours, theirs = pair
    with torch.no_grad(): assert relative(ours(tokens(3, 70)), theirs(tokens(3, 70)).logits) < 1e-5


def test_hidden_states_agree_after_every_layer(pair):
    ours, theirs = pair
    seen = []
    hooks = [m.register_forward_hook(lambda m, x, y: seen.append(y)) for m in (*ours.gpt_neox.layers[:-1], ours.gpt_neox.final_layer_norm)]
    with torch.no_grad(): ours(tokens(2, 40)), [h.remove() for h in hooks]
    expected = theirs(tokens(2, 40), output_hidden_states=True).hidden_states[1:]       # the last one after the final norm
    assert len(seen) == len(expected) == 3 and max(map(relative, seen, expected)) < 1e-5


def test_gradients_of_every_parameter_agree(pair):
    ours, theirs = map(copy.deepcopy, pair)
    for logits in (ours(tokens(2, 40)), theirs(tokens(2, 40)).logits):
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens(2, 40)[:, 1:].flatten()).backward()
    expected = {name.replace("lm_head", "embed_out"): p.grad for name, p in theirs.named_parameters()}
    assert {name for name, _ in ours.named_parameters()} == expected.keys()
    for name, p in ours.named_parameters(): assert relative(p.grad, expected[name]) < 1e-4, name


@pytest.mark.parametrize("B", [1, 9])       # 9 rows: the layers multiply from the other side
def test_greedy_continuations_are_identical(pair, B):
    ours, theirs = pair
    prompt = written = tokens(B, 8)
    length = dict(max_new_tokens=64, min_new_tokens=64, eos_token_id=None)
    expected = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, **length)
    cache, new = ours.new_cache(B, 72), prompt
    with torch.no_grad():
        for _ in range(64):
            new = ours(new, cache)[:, -1:].argmax(-1)
            written = torch.cat((written, new), 1)
    assert written.tolist() == expected.tolist()


def test_cache_equals_full_pass_and_transformers_beyond_2048_positions(tmp_path):
    theirs = saved_by_transformers(tmp_path, num_hidden_layers=2)
    ours, tok = GPTNeoX.from_pretrained(tmp_path), tokens(1, 2110)
    cache = ours.new_cache(1, 2110)
    with torch.no_grad():
        full, expected = ours(tok), theirs(tok).logits
        pieces = [ours(part, cache) for part in (tok[:, :2000], tok[:, 2000:2050], *tok[:, 2050:].split(1, 1))]
    assert relative(torch.cat(pieces, 1), full) < 1e-5
    assert relative(full[:, 2048:], expected[:, 2048:]) < 1e-5


def test_few_rows_without_gradient_give_the_same_logits(pair):
    ours, _ = pair
    for B, T in ((8, 1), (2, 8), (32, 1)):
        with torch.no_grad(): few = ours(tokens(B, T))
        assert relative(few, ours(tokens(B, T))) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shard_bytes", [5 * 10 ** 9, 30_000])
def test_saved_models_load_in_transformers_with_the_same_logits(pair, tmp_path, dtype, shard_bytes):
    ours, _ = pair
    ours.save_pretrained(tmp_path, dtype, shard_bytes)
    theirs = transformers.GPTNeoXForCausalLM.from_pretrained(tmp_path)
    assert theirs.dtype == dtype and (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard_bytes < 10 ** 9)
    again = GPTNeoX.from_pretrained(tmp_path)
    assert again.config == ours.config
    with torch.no_grad(): assert relative(again(tokens(2, 30)), theirs.float()(tokens(2, 30)).logits) < 1e-5
    if dtype == torch.float32: assert all(torch.equal(a, b) for a, b in zip(again.parameters(), ours.parameters(), strict=True))


def test_runs_in_the_dtype_asked_for(tmp_path):
    saved_by_transformers(tmp_path)
    model = GPTNeoX.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and model(tokens(2, 9)).dtype == torch.bfloat16
