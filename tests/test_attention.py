import pytest
import torch
import torch.nn.functional as F
from test_cross_entropy import Largest
from torch.utils.checkpoint import checkpoint

import attention
from attention import Ahead, ahead_attention
from train import ahead_mask

SHAPES = [(9, 1, 1), (23, 5, 1), (23, 3, 4), (2, 4, 1)]        # T, K, stride


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(attention, "ROWS", 12)                 # several chunks, the last a short one
    monkeypatch.setattr(attention, "STARTS", 5)
    monkeypatch.setattr(attention, "OWN", 150)


def inputs(T, K, stride, dtype=torch.float64, last=False, device="cpu", hs=16):
    """q, k, v and a gradient; in the last layer only the blocks ask."""
    rows = T + len(range(0, T - 1, stride)) * K
    q, k, v, grad = torch.randn(4, 2, 3, rows, hs, dtype=dtype, device=device)
    if last: q, grad = q[:, :, T:], grad[:, :, T:]
    return [x.detach().requires_grad_() for x in (q, k, v)], grad


def by_mask(q, k, v, T, K, stride, context="all"):
    mask = ahead_mask(T, torch.arange(0, T - 1, stride, device=q.device), K, context)
    return F.scaled_dot_product_attention(q, k, v, mask[-q.shape[2]:])


def both(ours, theirs, qkv, grad):
    """Output and gradients of two ways."""
    return [(out, *torch.autograd.grad(out, qkv, grad)) for out in (ours(*qkv), theirs(*qkv))]


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("T, K, stride", SHAPES)
@pytest.mark.parametrize("way", ["query blocks", "flash", "own"])
def test_the_fast_ways_are_the_mask(way, T, K, stride, last):
    """Flash by the CPU's operator, in the layout and with the joint output and log-sum-exp that CUDA's would get."""
    qkv, grad = inputs(T, K, stride, last=last)
    fast = lambda *x: Ahead.apply(*x, T, K, stride, way == "flash") if way != "own" else ahead_attention(*x, T, K, stride, way)
    ours, theirs = both(fast, lambda *x: by_mask(*x, T, K, stride, "own" if way == "own" else "all"), qkv, grad)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype, close", [(torch.float32, 1e-6), (torch.bfloat16, 5e-3), (torch.float16, 6e-4)])
def test_low_precision_is_as_close_as_its_numbers_allow(dtype, close):
    """Nothing but what goes in and comes out is rounded to it: scores and sums are float32."""
    qkv, grad = inputs(23, 5, 1, dtype)
    exact = [x.detach().double().requires_grad_() for x in qkv]
    theirs = by_mask(*exact, 23, 5, 1)
    ours = ahead_attention(*qkv, 23, 5, 1)
    pairs = zip((ours, *torch.autograd.grad(ours, qkv, grad)), (theirs, *torch.autograd.grad(theirs, exact, grad.double())), strict=True)
    for a, b in pairs: assert a.dtype == dtype and (a - b).norm() < close * b.norm()


def test_autocast_takes_mixed_precision_and_answers_in_its_own():
    qkv, grad = inputs(9, 2, 1, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):                # float32 stays float32 inside, also where the backward is under autocast
        out = ahead_attention(qkv[0], qkv[1], qkv[2].bfloat16(), 9, 2, 1)
        ours = torch.autograd.grad(out, qkv, grad.bfloat16())
    theirs = ahead_attention(*(x.bfloat16() for x in qkv), 9, 2, 1)
    torch.testing.assert_close((out, *ours), (theirs, *torch.autograd.grad(theirs, qkv, grad.bfloat16())), rtol=0, atol=0)


def test_inputs_need_not_be_contiguous():
    qkv, grad = inputs(23, 3, 4)
    turned = lambda *x: ahead_attention(*(y.transpose(1, 2).contiguous().transpose(1, 2) for y in x), 23, 3, 4).mT.contiguous().mT
    ours, theirs = both(turned, lambda *x: by_mask(*x, 23, 3, 4), qkv, grad.mT.contiguous().mT)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_an_unseen_key_with_a_huge_score_is_not_seen():
    qkv, grad = inputs(9, 3, 1, torch.float32)
    with torch.no_grad(): qkv[1][:, :, ::2] *= 1e4
    ours, theirs = both(lambda *x: ahead_attention(*x, 9, 3, 1), lambda *x: by_mask(*x, 9, 3, 1), qkv, grad)
    for x, y in zip(ours, theirs, strict=True): assert (x - y).norm() < 1e-2 * y.norm()   # the log-sum-exp has an error of 1e-3 itself


def test_activation_checkpointing_and_compile_leave_it_alone():
    qkv, grad = inputs(9, 3, 2)
    fast = lambda *x: ahead_attention(*(y * 2 for y in x), 9, 3, 2) * 2
    graphs = []
    compiled = torch.compile(fast, backend=lambda graph, _: graphs.append(graph.code) or graph.forward)
    for way in (lambda *x: checkpoint(fast, *x, use_reentrant=False), compiled):
        ours, theirs = both(way, fast, qkv, grad)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-14)
    assert len(graphs) == 2 and not any("exp" in code for code in graphs)               # a graph before it and one behind it


def test_where_flash_refuses_query_blocks_answer_and_one_line_says_so(monkeypatch, capsys):
    def refuse(*args): raise RuntimeError("head size 7\nand more")
    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", refuse)
    attention.refused.cache_clear()
    qkv, grad = inputs(9, 3, 1)
    ours, theirs = both(lambda *x: Ahead.apply(*x, 9, 3, 1, True), lambda *x: by_mask(*x, 9, 3, 1), qkv, grad)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "head size 7" in said


def largest(T, K, way):
    qkv, grad = inputs(T, K, 1, torch.float32)
    with Largest() as seen: torch.autograd.grad(Ahead.apply(*qkv, T, K, 1, way), qkv, grad)
    return seen.numel


@pytest.mark.parametrize("way", [False, True])
def test_no_tensor_grows_faster_than_T_or_K(way, monkeypatch):
    monkeypatch.setattr(attention, "ROWS", 64)
    assert largest(256, 8, way) < 2.1 * largest(128, 8, way) and largest(128, 16, way) < 2.1 * largest(128, 8, way)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype, close", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("T, K, stride", [(67, 8, 1), (67, 5, 4)])
def test_on_cuda_the_fast_ways_are_the_mask(T, K, stride, last, dtype, close, capsys):
    attention.refused.cache_clear()
    qkv, grad = inputs(T, K, stride, last=last, device="cuda", hs=64)
    low = lambda *x: ahead_attention(*(y.to(dtype) for y in x), T, K, stride).double()
    for ours, theirs in zip(*both(low, lambda *x: by_mask(*x, T, K, stride), qkv, grad), strict=True):
        assert (ours - theirs).norm() < close * theirs.norm()
    assert capsys.readouterr().out == ""                       # flash did not refuse
