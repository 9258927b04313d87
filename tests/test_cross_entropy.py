import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import cross_entropy as module
from cross_entropy import cross_entropy

V, d = 31, 16


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(module, "LOGITS", 7 * V)              # 7 rows at a time: the last chunk is a short one


def inputs(dtype=torch.float64, rows=(4, 6, 3)):
    hidden, matrix = torch.randn(*rows, d, dtype=dtype, requires_grad=True), torch.randn(V, d, dtype=dtype, requires_grad=True)
    return hidden, matrix, torch.randint(V, rows), torch.rand(rows, dtype=torch.float64).to(dtype)


def plain(hidden, matrix, target, weight):
    loss = F.cross_entropy((hidden @ matrix.T).flatten(0, -2), target.flatten(), reduction="none").view_as(target)
    return (loss * weight).sum(), loss


@pytest.mark.parametrize("weight", ["given", "bool", "zero"])
def test_it_is_the_cross_entropy_of_pytorch_with_its_gradients(weight):
    hidden, matrix, target, w = inputs()
    w = {"given": w, "bool": w > 0.5, "zero": torch.zeros_like(w)}[weight]
    ours, theirs = (f(hidden, matrix, target, w) for f in (cross_entropy, plain))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    grads = [torch.autograd.grad(3 * total, (hidden, matrix)) for total, _ in (ours, theirs)]
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)
    offsets = [(loss * w).sum((0, 1)) for _, loss in (ours, theirs)]                    # per offset: the last axis
    torch.testing.assert_close(*offsets, rtol=1e-12, atol=1e-12)


def test_bfloat16_inputs_and_autocast_keep_the_softmax_in_float32():
    hidden, matrix, target, w = inputs(torch.float32)
    exact = plain(hidden, matrix, target, w)
    half = cross_entropy(hidden.bfloat16(), matrix.bfloat16(), target, w)
    with torch.autocast("cpu", torch.bfloat16): cast = cross_entropy(hidden, matrix, target, w)
    assert cast[1].equal(half[1])                              # the products are those of bfloat16
    for total, loss in (half, cast):
        assert loss.dtype == total.dtype == torch.float32
        torch.testing.assert_close(loss, exact[1], rtol=0.02, atol=0.05)
        for ours, theirs in zip(*(torch.autograd.grad(x, (hidden, matrix), retain_graph=x is exact[0]) for x in (total, exact[0])),
                                strict=True):
            assert ours.dtype == torch.float32 and (ours - theirs).norm() < 0.02 * theirs.norm()


def test_a_row_of_one_sure_token_stays_finite():
    hidden = torch.full((2, d), 1e3, requires_grad=True)
    total, _ = cross_entropy(hidden, torch.eye(V, d).requires_grad_(), torch.tensor([0, V - 1]), torch.ones(2))
    total.backward()
    assert total.isfinite() and hidden.grad.isfinite().all()


class Largest(TorchDispatchMode):
    """The largest tensor that any operator makes."""
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.numel = max([self.numel] + [x.numel() for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, torch.Tensor)])
        return out


def test_no_more_than_a_chunk_of_logits_exists():
    hidden, matrix, target, w = inputs(rows=(200, 1, 1))
    with Largest() as largest: cross_entropy(hidden, matrix, target, w)[0].backward()
    assert largest.numel == hidden.numel() < 200 * V
