"""
The attention of the K-ahead pass in linear memory. train.py's `ahead_mask` is the definition; this is the same result.

A block of K queries that starts at step t sees the main-stream keys up to t (the prefix) and its own K keys, causally. Each part is
attended to on its own, then the two are joined by their log-sum-exp. The gradient of one part of a joint softmax is that part's own
backward, called with the joined output and the joined log-sum-exp (Liu et al. 2023, ring attention, arXiv 2310.01889). Two prefixes:

    query blocks    matrix products over a few steps at a time, recomputed in the backward: any device, any precision
    flash           the prefix of the j-th tokens of all blocks is plain causal attention: PyTorch's flash operator (Dao 2023,
                    arXiv 2307.08691) with the K offsets as query heads of one key head: CUDA, bfloat16 and float16

Shapes: N = B*H heads of the batch, S starts, one every `stride` steps; the main stream itself counts as T blocks of one query each.
"""
import functools

import torch
import torch.nn.functional as F

ROWS, STARTS = 128, 64                    # queries that share one matrix product, and from how many starts at most
OWN = 2048                                # rows of the blocks' own part computed at once on a CPU: they fit its cache
HAIR = -50.0                              # e^-50 is nothing beside 1, and a CPU is several times faster with it than with e^-inf


@torch.compiler.disable
def ahead_attention(q, k, v, T, K, stride, context="all"):
    """Attention under `ahead_mask`: q (B, H, T + S*K, hs), or its last S*K rows alone; k, v (B, H, T + S*K, hs) -> like q."""
    device = q.device.type
    if torch.is_autocast_enabled(device): q, k, v = (x.to(torch.get_autocast_dtype(device)) for x in (q, k, v))
    if context == "own": return alone(q, k, v, T, K, stride)
    with torch.autocast(device, enabled=False):
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()                        # a view of more would keep it all for the backward
        return Ahead.apply(q, k, v, T, K, stride, q.is_cuda and q.dtype in (torch.bfloat16, torch.float16))


def alone(q, k, v, T, K, stride):
    """Context 0: a main-stream row sees itself, a block its start and itself."""
    S, starts = (k.shape[2] - T) // K, slice(0, T - 1, stride)
    mine = [torch.cat((x[:, :, starts, None], x[:, :, T:].unflatten(2, (S, K))), 3).flatten(1, 2) for x in (k, v)]   # (B, H*S, K+1, hs)
    mask = torch.ones(K, K + 1, dtype=torch.bool, device=q.device).tril(1)
    own = F.scaled_dot_product_attention(q[:, :, -S * K:].unflatten(2, (S, K)).flatten(1, 2), *mine, mask)          # (B, H*S, K, hs)
    return torch.cat((v[:, :, :q.shape[2] - S * K], own.unflatten(1, (-1, S)).flatten(2, 3)), 2)


# ---------------------------------------------------------------------------------------------------------------------
# the prefix, as query blocks


def chunks(S, K, stride):
    """Of each chunk: its starts as a slice, the number of keys all of them see, and of keys the last of them sees."""
    n = min(max(ROWS // K, 1), STARTS)
    for first in range(0, S, n):
        last = min(first + n, S)
        yield slice(first, last), first * stride + 1, (last - 1) * stride + 1


@functools.lru_cache(16)
def later(n, K, stride, device, dtype):
    """-inf where a key comes after the start, else 0, for n starts and the keys behind the first of them: (n*K, (n - 1)*stride)."""
    key, start = torch.arange(1, (n - 1) * stride + 1, device=device), torch.arange(n, device=device) * stride
    return torch.zeros(n, len(key), device=device, dtype=dtype).masked_fill_(key > start[:, None], -torch.inf).repeat_interleave(K, 0)


def blocks_forward(q, k, v, stride, out, lse):
    """Writes the attention of q (N, S, K, hs) to the prefixes in k, v (N, T, hs): out (N, S, K, hs) and lse (N, S, K, 1)."""
    k = k * k.shape[-1] ** -0.5
    for rows, seen, end in chunks(*q.shape[1:3], stride):
        p = q[:, rows].flatten(1, 2) @ k[:, :end].mT                                   # (N, n*K, end)
        fresh = p[..., seen:].add_(later(rows.stop - rows.start, q.shape[2], stride, q.device, q.dtype))
        top = p.amax(-1, keepdim=True)
        p.sub_(top)
        fresh.clamp_(min=HAIR)
        total = p.exp_().sum(-1, keepdim=True)
        out[:, rows] = (p @ v[:, :end]).div_(total).view_as(out[:, rows])
        lse[:, rows] = total.log_().add_(top).view_as(lse[:, rows])


def blocks_backward(q, k, v, stride, grad, delta, lse, dq, dk, dv):
    """Writes dq (N, S, K, hs), adds to dk, dv (N, T, hs). lse is the joint one, delta the sum of grad * joint output: (N, S, K, 1)."""
    scale = k.shape[-1] ** -0.5
    k = k * scale
    for rows, seen, end in chunks(*q.shape[1:3], stride):
        queries, g, d, l = (x[:, rows].flatten(1, 2) for x in (q, grad, delta, lse))
        p = queries @ k[:, :end].mT                                                    # (N, n*K, end)
        fresh = p[..., seen:].add_(later(rows.stop - rows.start, q.shape[2], stride, q.device, q.dtype))
        p.sub_(l)
        fresh.clamp_(min=HAIR)
        dv[:, :end] += p.exp_().mT @ g
        ds = (g @ v[:, :end].mT).sub_(d).mul_(p)
        dk[:, :end].add_(ds.mT @ queries, alpha=scale)
        dq[:, rows] = (ds @ k[:, :end]).view_as(dq[:, rows])


# ---------------------------------------------------------------------------------------------------------------------
# the prefix, by flash


def flash(q, k, v, stride, joint=None):
    """The prefix by PyTorch's private flash operators: q (N, S, K, hs), k, v (N, T, hs), in one dtype.

    Forward: (out, lse, what the operator wants back), or None, with a line printed, where it is missing or refuses.
    Backward, with joint = (grad, out, lse, what it wanted back), out and lse those of the joint softmax: (dq, dk, dv).
    """
    ops, width = torch.ops.aten, (q.shape[1] - 1) * stride + 1                         # the last start sees `width` keys

    def spread(x):                                                                      # start i to row i*stride: (N, K, width, ..)
        wide = x if stride == 1 else x.new_zeros(len(x), width, *x.shape[2:])
        if stride > 1: wide[:, ::stride] = x
        return wide.transpose(1, 2)

    gather = lambda x: x.transpose(1, 2)[:, ::stride]                                   # and back: (N, S, K, ..)
    q, k, v = spread(q), k[:, None, :width], v[:, None, :width]                         # K query heads share one key head
    try:
        if joint is None:
            forward = ops._scaled_dot_product_flash_attention if q.is_cuda else ops._scaled_dot_product_flash_attention_for_cpu
            out, lse, *wanted = forward(q, k, v, 0.0, True)
            return gather(out), gather(lse.unsqueeze(-1)), wanted[:6]
        grad, out, lse = spread(joint[0]), spread(joint[1]), spread(joint[2]).squeeze(-1).contiguous()
        if q.is_cuda: backward, a, b = ops._scaled_dot_product_flash_attention_backward, joint[3][:4], joint[3][4:]
        else: backward, a, b = ops._scaled_dot_product_flash_attention_for_cpu_backward, (), ()
        dq, dk, dv = backward(grad, q, k, v, out, lse, *a, 0.0, True, *b)
        return gather(dq), dk[:, 0], dv[:, 0]
    except torch.OutOfMemoryError: raise
    except (AttributeError, RuntimeError) as error: return refused(str(error))


@functools.lru_cache(1)
def refused(why):
    print("attention: query blocks, for flash refuses:", why.partition("\n")[0])


# ---------------------------------------------------------------------------------------------------------------------
# the blocks' own part, and the whole


def own_scores(q, k):
    """Scores inside the blocks, causal: two of (n, S, K, hs) -> (n, S, K, K). What must not be seen is a hair of the query's own key."""
    K, scores = q.shape[2], (q @ k.mT).mul_(q.shape[-1] ** -0.5)
    itself = scores.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
    return torch.where(torch.ones(K, K, dtype=torch.bool, device=q.device).tril(), scores, itself + HAIR)


def own_forward(q, k, v, out, lse):
    """Joins what the blocks (n, S, K, hs) see of themselves to the prefix's out (n, S, K, hs) and lse (n, S, K, 1), in place."""
    scores = own_scores(q, k)
    joint = torch.logaddexp(lse, scores.logsumexp(-1, keepdim=True))
    out.mul_((lse - joint).exp_()).add_(scores.sub_(joint).exp_() @ v)
    lse.copy_(joint)


def own_backward(q, k, v, grad, delta, lse, dq, dk, dv):
    """Adds the own part to dq and writes dk, dv, all (n, S, K, hs); lse and delta as in `blocks_backward`."""
    p = own_scores(q, k).sub_(lse).exp_()
    ds = (grad @ v.mT).sub_(delta).mul_(p).mul_(q.shape[-1] ** -0.5)
    dq += ds @ k
    dk.copy_(ds.mT @ q)
    dv.copy_(p.mT @ grad)


def heads(q):
    """Slices of the N heads of the batch whose own part is computed at once; q (N, S, K, hs)."""
    n = max(OWN // q[0, :, :, 0].numel(), 1) if q.device.type == "cpu" else len(q)
    return [slice(first, first + n) for first in range(0, len(q), n)]


def parts(x, T, K):
    """x (B, H, T + S*K, ..) -> the main stream as blocks of one (N, T, 1, ..), and the blocks (N, S, K, ..)."""
    x = x.flatten(0, 1)
    return x[:, :T].unsqueeze(2), x[:, T:].unflatten(1, (-1, K))


class Ahead(torch.autograd.Function):
    """q (B, H, T + S*K, hs) or its last S*K rows, k and v (B, H, T + S*K, hs) -> like q. Scores and sums are float32 or more."""

    @staticmethod
    def forward(ctx, q, k, v, T, K, stride, use_flash):
        rows, wide = q.shape[2] - k.shape[2] + T, torch.promote_types(q.dtype, torch.float32)
        out, lse = q.new_empty(q.shape, dtype=wide), q.new_empty(*q.shape[:-1], 1, dtype=wide)
        (km, ko), (vm, vo) = (parts(x, T, K) for x in (k, v))
        ctx.shape, ctx.wanted = (T, K, stride, rows), []
        for query, o, l, step in zip(*(parts(x, rows, K) for x in (q, out, lse)), (1, stride), strict=True):
            if query.numel() == 0: found = None                                         # the last layer's main stream asks nothing
            else: found = flash(query, km[:, :, 0], vm[:, :, 0], step) if use_flash else None
            if found: o.copy_(found[0]), l.copy_(found[1])
            else: blocks_forward(query.to(wide), km[:, :, 0].to(wide), vm[:, :, 0].to(wide), step, o, l)
            ctx.wanted.append(found and found[2])
        for n in heads(query): own_forward(query[n].to(wide), ko[n].to(wide), vo[n].to(wide), o[n], l[n])
        out = out.to(q.dtype).transpose(1, 2).contiguous().transpose(1, 2)              # as the next layer reads it: kept once, not twice
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        q, k, v, out, lse = ctx.saved_tensors
        (T, K, stride, rows), wide = ctx.shape, lse.dtype
        with torch.autocast(q.device.type, enabled=False):
            dq, dk, dv = (x.new_empty(x.shape, dtype=wide) for x in (q, k, v))
            delta = (grad.to(wide) * out).sum(-1, keepdim=True)
            (km, ko), (vm, vo), (dkm, dko), (dvm, dvo) = (parts(x, T, K) for x in (k, v, dk, dv))
            km, vm, dkm, dvm = km[:, :, 0], vm[:, :, 0], dkm[:, :, 0].zero_(), dvm[:, :, 0].zero_()
            each = zip(*(parts(x, rows, K) for x in (q, grad, out, delta, lse, dq)), (1, stride), ctx.wanted, strict=True)
            for query, g, o, e, l, dquery, step, wanted in each:
                found = None if wanted is None else flash(query, km, vm, step, (g, o, l, wanted))
                if found: dquery.copy_(found[0]), dkm[:, :found[1].shape[1]].add_(found[1]), dvm[:, :found[2].shape[1]].add_(found[2])
                else: blocks_backward(*(x.to(wide) for x in (query, km, vm)), step, g.to(wide), e, l, dquery, dkm, dvm)
            for n in heads(query):
                own = [x[n].to(wide).contiguous() for x in (query, ko, vo, g)]
                own_backward(*own, e[n], l[n], dquery[n], dko[n], dvo[n])
        return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype), None, None, None, None
