import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import model
from model import linear_cross_entropy

V, d = 31, 16


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(model, "LOGITS", dict(cpu=7 * V))  # 7 rows at a time


def inputs(dtype=torch.float64, rows=(4, 6, 3)):
    hidden = torch.randn(*rows, d, dtype=dtype, requires_grad=True)
    matrix = torch.randn(V, d, dtype=dtype, requires_grad=True)
    return hidden, matrix, torch.randint(V, rows), torch.rand(rows, dtype=dtype)


def plain(hidden, matrix, target, weight):
    logits = (hidden @ matrix.T).flatten(0, -2)
    loss = F.cross_entropy(logits, target.flatten(), reduction="none").view_as(target)
    return (loss * weight).sum(), loss


@pytest.mark.parametrize("kind", ["given", "bool", "zero"])
def test_it_is_the_cross_entropy_of_pytorch_with_its_gradients(kind):
    hidden, matrix, target, weight = inputs()
    weight = dict(given=weight, bool=weight > 0.5, zero=torch.zeros_like(weight))[kind]
    ours = linear_cross_entropy(hidden, matrix, target, weight)
    theirs = plain(hidden, matrix, target, weight)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(3 * total, (hidden, matrix)) for total, _ in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("autocast", [False, True])
def test_products_in_bfloat16_keep_the_softmax_in_float32(autocast):
    hidden, matrix, target, weight = inputs(torch.float32)
    exact, exact_loss = plain(hidden, matrix, target, weight)
    given = (hidden, matrix) if autocast else (hidden.bfloat16(), matrix.bfloat16())
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        total, loss = linear_cross_entropy(*given, target, weight)
    assert loss.dtype == total.dtype == torch.float32
    torch.testing.assert_close(loss, exact_loss, rtol=0.02, atol=0.05)
    ours = torch.autograd.grad(total, (hidden, matrix))
    theirs = torch.autograd.grad(exact, (hidden, matrix))
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() < 0.02 * b.norm()


def test_a_row_of_one_sure_token_stays_finite():
    hidden = torch.full((2, d), 1e3, requires_grad=True)
    matrix = torch.eye(V, d).requires_grad_()
    total, _ = linear_cross_entropy(hidden, matrix, torch.tensor([0, V - 1]), torch.ones(2))
    total.backward()
    assert total.isfinite()
    assert hidden.grad.isfinite().all()


class Largest(TorchDispatchMode):
    """The largest tensor that any operator makes."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.numel = max([self.numel, *sizes])
        return out


def test_no_more_than_a_chunk_of_logits_exists():
    hidden, matrix, target, weight = inputs(rows=(200, 1, 1))
    with Largest() as largest:
        linear_cross_entropy(hidden, matrix, target, weight)[0].backward()
    assert largest.numel == hidden.numel() < 200 * V
