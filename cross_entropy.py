"""
Cross-entropy of hidden states against an output matrix, a chunk of logits at a time: N x V logits never exist at once.

    total, loss = cross_entropy(hidden, embed_out.weight, target, weight)

The gradients are made in the forward, while a chunk's logits are there (Hsu et al. 2024, Liger Kernel, arXiv 2410.10989).
"""
import torch

LOGITS = 2 ** 23                          # in one chunk


class ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, matrix, target, weight, dtype, with_grad):
        wide = torch.promote_types(dtype, torch.float32)
        loss, m = target.new_empty(target.shape, dtype=wide), matrix.to(dtype)
        ctx.dtypes, ctx.grads = (hidden.dtype, matrix.dtype), None
        if with_grad: ctx.grads = hidden.new_empty(hidden.shape, dtype=wide), matrix.new_zeros(matrix.shape, dtype=wide)
        chunk = max(LOGITS // len(matrix), 1)
        for rows in (slice(first, first + chunk) for first in range(0, len(target), chunk)):
            h, t = hidden[rows].to(dtype), target[rows, None]
            p = (h @ m.T).to(wide)                                                      # (n, V)
            torch.log_softmax(p, -1, out=p)
            loss[rows] = -p.gather(1, t)[:, 0]
            if not with_grad: continue
            p.exp_().scatter_(1, t, p.gather(1, t) - 1).mul_(weight[rows, None])        # the gradient of the logits
            ctx.grads[0][rows] = p.to(dtype) @ m
            ctx.grads[1].addmm_(p.to(dtype).T, h) if dtype == wide else ctx.grads[1].add_(p.to(dtype).T @ h)
        ctx.mark_non_differentiable(loss)
        return (loss * weight).sum(), loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, _):
        (dh, dm), ctx.grads = ctx.grads, None                                           # scaled in place, so good for once
        return dh.mul_(grad).to(ctx.dtypes[0]), dm.mul_(grad).to(ctx.dtypes[1]), None, None, None, None


@torch.compiler.disable
def cross_entropy(hidden, matrix, target, weight):
    """Sum over rows of weight * loss, a scalar with gradients for hidden and matrix, and the loss of each row without any, in float32.

    hidden (.., d), matrix (V, d), target (..) int64 in [0, V), weight (..) of any dtype, 0 for rows that are no target.
    Multiplies in autocast's precision where that is on, and like PyTorch's own allows a single backward.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.promote_types(hidden.dtype, matrix.dtype)
    with torch.autocast(device, enabled=False):
        rows = hidden.flatten(0, -2), matrix, target.flatten(), weight.flatten()
        total, loss = ChunkedCrossEntropy.apply(*rows, dtype, torch.is_grad_enabled())
    return total, loss.view(target.shape)
