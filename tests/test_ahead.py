"""K-ahead prediction: the mask, the fast path, and the predictor, against their definitions."""

import pytest
import torch
import torch.nn.functional as F

import train
from data import END, SILENCE, Batch
from encoder import Encoder, Features
from model import Config, GPTNeoX
from train import Grounding, Losses, Predictor, ahead_attention, ahead_mask

V, D = 31, 5


def a_language_model(d):
    return GPTNeoX(Config(vocab_size=V, hidden_size=d, num_hidden_layers=2, num_attention_heads=2))


@pytest.fixture(params=["by mask", "fast path"])
def way(request, monkeypatch):
    """Both ways of attention, whatever the length."""
    monkeypatch.setattr(train, "DENSE", {"by mask": 99, "fast path": 0}[request.param])


def a_model(K, stride=1):
    """A random encoder and predictor in float64, the zero-initialised map made random."""
    encoder = Encoder(a_language_model(32), Features(D), 8)
    predictor = Predictor(a_language_model(16), 32, K, stride)
    model = Grounding(encoder, predictor).double()
    torch.nn.init.normal_(model.predictor.condition.weight, std=0.3)
    for p in model.parameters():
        p.data.mul_(2)  # attention that looks at something
    return model


def some_steps(B, L, T):
    """The steps of slots that go through T steps at random."""
    return torch.randint(T, (B, L)).sort(1).values


def a_batch(L, B=3):
    """Streams of L slots with holes in what is known, one that ends."""
    T = max(L // 2, 1)
    tok, step = torch.randint(1, V, (B, L)), some_steps(B, L, T)
    within = torch.arange(L) < torch.tensor([L, L - 3, L])[:, None]
    known = (torch.rand(B, L) < 0.5) & within
    obs = torch.randn(B, T, D).double()
    return Batch(obs, tok, step, known, ~known & within, within, noise=None)


def one_by_one(model, batch):
    """The sums of the losses in loops, each block given its own prefix and itself alone."""
    predictor, lm, tok = model.predictor, model.predictor.lm, batch.tok
    before = F.pad(tok[:, :-1], (1, 0), value=SILENCE)
    hidden = model.encoder(batch.obs, before, batch.step)
    logits = model.encoder.lm.embed_out(hidden)
    each = F.cross_entropy(logits.mT, tok, reduction="none")
    predict, T = 0, tok.shape[1]
    for b in range(len(tok)):
        for t in range(0, T - 1, predictor.stride):
            ahead = range(t + 1, min(t + 1 + predictor.K, T))
            main = lm.embed(before[b, : t + 1]) + predictor.condition(hidden[b, : t + 1])
            block = lm.embed(tok[b, t : t + len(ahead)])
            out = lm.stack(torch.cat((main, block))[None])[0, t + 1 :]
            loss = F.cross_entropy(lm.embed_out(out), tok[b, ahead], reduction="none")
            predict = predict + (loss * batch.told[b, ahead]).sum()
    return torch.stack(((each * batch.known).sum(), predict, (each * batch.pseudo).sum()))


ONE_EACH = Losses(*torch.ones(3))


@pytest.mark.parametrize("T, K, stride", [(9, 3, 1), (9, 3, 3), (7, 10, 2), (5, 1, 1)])
def test_one_pass_equals_separate_runs(T, K, stride, way):
    model = a_model(K, stride)
    batch = a_batch(T)
    loss, parts = model(batch, ONE_EACH)
    expected = one_by_one(model, batch)
    torch.testing.assert_close(parts, expected.detach(), rtol=1e-10, atol=1e-10)
    # one loss for all text, whoever wrote it
    weights = torch.tensor([1 / 2, train.predict_weight, 1 / 2], dtype=torch.float64)
    parameters = dict(model.named_parameters())
    ours = torch.autograd.grad(loss, parameters.values())
    theirs = torch.autograd.grad(expected @ weights, parameters.values())
    for name, a, b in zip(parameters, ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10, msg=name)


@pytest.mark.parametrize("stride", [1, 3])
def test_a_block_sees_its_past_and_itself_and_nothing_else(stride, way):
    """Changes one observation, one token at a time: exactly the blocks that may see it change."""
    L, T, K = 14, 5, 3
    model = a_model(K, stride)
    obs, tok = torch.randn(1, T, D).double(), torch.randint(2, V - 1, (1, L))
    step = torch.tensor([[0, 0, 0, 1, 2, 2, 2, 2, 3, 3, 4, 4, 4, 4]])
    i, j = torch.arange(0, L - 1, stride)[:, None], torch.arange(1, K + 1)

    def blocks(obs, tok, hidden_tok):
        before = F.pad(tok[:, :-1], (1, 0), value=SILENCE)
        hidden = model.encoder(obs, F.pad(hidden_tok[:, :-1], (1, 0), value=SILENCE), step)
        return model.predictor(before, hidden, model.predictor.blocks(tok, END)[..., :-1])

    base = blocks(obs, tok, tok)
    for t in range(T):
        other = obs.clone()
        other[:, t] += 1
        changed = (blocks(other, tok, tok) - base).abs().amax((0, 3)) > 1e-12
        assert changed.equal((step[0, i] >= t).expand(-1, K)), f"observation {t}"
    for s in range(L):
        other = tok.clone()
        other[:, s] += 1
        changed = (blocks(obs, other, tok) - base).abs().amax((0, 3)) > 1e-12
        # block (i, j) reads tok_i .. tok_{i+j-1}, the main stream tok_{i-1}
        assert changed.equal((i <= s) & (s < i + j) | (i > s)), f"token {s}"


def test_the_mask_of_three_steps_and_two_ahead():
    rows = ["1000000", "1100000", "1110000", "1001000", "1001100", "1100010", "1100011"]
    expected = torch.tensor([[int(c) for c in row] for row in rows], dtype=torch.bool)
    assert ahead_mask(3, 2, 2, 1, "cpu").equal(expected)


def attention_inputs(T, K, stride, dtype=torch.float64, device="cpu", hs=16):
    rows = T + len(range(0, T - 1, stride)) * K
    q, k, v, grad = torch.randn(4, 2, 3, rows, hs, dtype=dtype, device=device)
    return [x.detach().requires_grad_() for x in (q, k, v)], grad


def by_mask(q, k, v, T, K, stride):
    S = len(range(0, T - 1, stride))
    return F.scaled_dot_product_attention(q, k, v, ahead_mask(T, S, K, stride, q.device))


SHAPES = [(9, 1, 1), (23, 5, 1), (23, 3, 4), (2, 4, 1)]


@pytest.mark.parametrize("T, K, stride", SHAPES)
def test_the_fast_path_is_the_mask(T, K, stride):
    qkv, grad = attention_inputs(T, K, stride)
    ours = ahead_attention(*qkv, T, K, stride, rows=12)  # several chunks, the last a short one
    theirs = by_mask(*qkv, T, K, stride)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    ours, theirs = (torch.autograd.grad(out, qkv, grad) for out in (ours, theirs))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype, close", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_low_precision_is_as_close_as_its_numbers_allow(dtype, close):
    qkv, grad = attention_inputs(23, 5, 1, dtype)
    exact = [x.detach().double().requires_grad_() for x in qkv]
    ours, theirs = ahead_attention(*qkv, 23, 5, 1, rows=12), by_mask(*exact, 23, 5, 1)
    gradients = (
        torch.autograd.grad(ours, qkv, grad),
        torch.autograd.grad(theirs, exact, grad.double()),
    )
    for a, b in zip((ours, *gradients[0]), (theirs, *gradients[1]), strict=True):
        assert a.dtype == dtype and (a - b).norm() < close * b.norm()


def test_under_autocast_attention_is_in_bfloat16():
    seen = []

    def attend(q, k, v):
        seen.extend(x.dtype for x in (q, k, v))
        return ahead_attention(q, k, v, 23, 5, 1)

    with torch.autocast("cpu", torch.bfloat16):
        a_language_model(32).stack(torch.randn(2, 23 + 22 * 5, 32), attend=attend)
    assert set(seen) == {torch.bfloat16}


@pytest.mark.parametrize("T, K, stride", SHAPES)
def test_the_rule_for_flex_attention_is_the_mask(T, K, stride):
    from torch.nn.attention.flex_attention import flex_attention  # slow to import

    qkv = [x.detach() for x in attention_inputs(T, K, stride, torch.float32)[0]]
    mask = train.flex_mask.__wrapped__(T, K, stride, qkv[0].shape[2], "cpu")
    ours = flex_attention(*qkv, block_mask=mask)
    torch.testing.assert_close(ours, by_mask(*qkv, T, K, stride))


def test_memory_of_the_fast_path_is_linear():
    """No tensor that it makes grows faster than T or K."""

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else [out]:
                self.numel = max(self.numel, x.numel() if isinstance(x, torch.Tensor) else 0)
            return out

    def largest(T, K):
        qkv, grad = attention_inputs(T, K, 1, torch.float32)
        with Largest() as seen:
            torch.autograd.grad(ahead_attention(*qkv, T, K, 1, rows=64), qkv, grad)
        return seen.numel

    assert largest(256, 8) < 2.1 * largest(128, 8)
    assert largest(128, 16) < 2.1 * largest(128, 8)


@pytest.mark.parametrize("detach", [True, False])
def test_detach_stops_the_gradient_from_predictor_to_encoder(detach, monkeypatch):
    monkeypatch.setattr(train, "detach", detach)
    model = a_model(3)
    batch = a_batch(9)
    nothing = torch.zeros_like(batch.known)  # loss_predict alone
    model(batch._replace(known=nothing, pseudo=nothing), ONE_EACH)[0].backward()
    reached = any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.encoder.parameters())
    assert reached != detach
    assert all(p.grad is not None for p in model.predictor.lm.parameters())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("T, K, stride", [(67, 8, 1), (67, 5, 4), (2, 4, 1)])
@pytest.mark.parametrize("hs", [32, 64, 80, 128, 256])
def test_on_cuda_the_fast_path_is_the_mask(T, K, stride, hs):
    qkv, grad = attention_inputs(T, K, stride, torch.float32, "cuda", hs)
    ours, theirs = ahead_attention(*qkv, T, K, stride), by_mask(*qkv, T, K, stride)
    gradients = [torch.autograd.grad(out, qkv, grad) for out in (ours, theirs)]
    for a, b in zip((ours, *gradients[0]), (theirs, *gradients[1]), strict=True):
        assert (a - b).norm() < 1e-2 * b.norm()
