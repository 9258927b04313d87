"""
The VPT network (Baker et al. 2022, arXiv 2206.11795): frames of Minecraft -> one latent per frame, from OpenAI's .weights files.

    vpt = VPT.from_weights("foundation-model-1x.weights")      # or 2x, 3x, bc-*, rl-*: sizes are read off the file
    latent, state = vpt(frames, first)                         # frames (B, T, 128, 128, 3) uint8 RGB, first (B,) bool
    latent, state = vpt(more, ~first, state)                   # goes on where the last call stopped; any chunking gives one result

A convolutional network (Impala) sees each frame on its own, `see`; four transformer layers, each attending to the frame itself and
the 127 before it, remember, `remember`. The latent, (B, T, D), is what the policy's heads read ("pi_latent").
Module names are the file's own, so the parameters load without a table. Every norm has epsilon 1e-5, every activation is a ReLU.
"""
import math
import re
import warnings
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

RELATIVE = 10                             # learned curves over distance from which a head's relative attention is mixed


class Layer(nn.Module):
    """relu(layer(norm(x))): a linear layer after a LayerNorm, or a 3x3 convolution after a GroupNorm of one group."""

    def __init__(self, layer, norm=True):
        super().__init__()
        self.layer = layer
        if norm: self.norm = nn.GroupNorm(1, layer.in_channels) if isinstance(layer, nn.Conv2d) else nn.LayerNorm(layer.in_features)

    def forward(self, x):
        return F.relu(self.layer(self.norm(x) if hasattr(self, "norm") else x))


def conv(before, after, norm=True):
    return Layer(nn.Conv2d(before, after, 3, padding=1, bias=not norm), norm)


def linear(before, after):
    return Layer(nn.Linear(before, after, bias=False))


class Stack(nn.Module):
    """Halves height and width: convolution, max pooling, norm, two residual blocks."""

    def __init__(self, before, after, norm):
        super().__init__()
        self.firstconv = conv(before, after, norm)             # the first stack has no norm, but a bias
        self.n = nn.GroupNorm(1, after)
        self.blocks = nn.ModuleList(nn.ModuleDict(dict(conv0=conv(after, after), conv1=conv(after, after))) for _ in range(2))

    def forward(self, x):
        x = self.n(F.max_pool2d(self.firstconv(x), 3, stride=2, padding=1))
        for block in self.blocks:
            x = x + block["conv1"](block["conv0"](x))
        return x


class Attention(nn.Module):
    """Causal attention over a window of W frames, with a learned term that depends on the distance and on the query."""

    def __init__(self, D, heads, window):
        super().__init__()
        self.heads, self.window = heads, window
        self.q_layer, self.proj_layer = nn.Linear(D, D), nn.Linear(D, D)
        self.k_layer, self.v_layer = nn.Linear(D, D, bias=False), nn.Linear(D, D, bias=False)
        self.r_layer = nn.Linear(D, heads * RELATIVE)
        self.b_nd = nn.Parameter(torch.zeros(RELATIVE, window))

    def split(self, x):
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)               # (B, T, D) -> (B, H, T, d)

    def forward(self, x, state):
        """x (B, T, D); state: which of the last W frames count (B, W) bool, their keys and values (B, W, D)."""
        T, W = x.shape[1], self.window
        valid, past_k, past_v = state
        k = torch.cat([past_k, self.k_layer(x)], dim=1)                        # (B, W+T, D)
        v = torch.cat([past_v, self.v_layer(x)], dim=1)
        valid = torch.cat([valid, valid.new_ones(len(x), T)], dim=1)           # (B, W+T)
        q, r = self.split(self.q_layer(x)), self.split(self.r_layer(x))        # (B, H, T, d), (B, H, T, 10)
        distance = torch.arange(W, W + T, device=x.device)[:, None] - torch.arange(W + T, device=x.device)
        allowed = (distance >= 0) & (distance < W) & valid[:, None, None]      # (B, 1, T, W+T)
        curve = self.b_nd[:, distance.clamp(0, W - 1)]                         # (10, T, W+T)
        bias = torch.einsum("bhtn,ntk->bhtk", r, curve).masked_fill(~allowed, -math.inf)
        scale = 1 / q.shape[-1]                                                # muP: 1/d, not 1/sqrt(d)
        out = F.scaled_dot_product_attention(q, self.split(k), self.split(v), attn_mask=bias, scale=scale)
        return self.proj_layer(out.transpose(1, 2).flatten(2)), (valid[:, -W:], k[:, -W:], v[:, -W:])


class Block(nn.Module):
    def __init__(self, D, heads, window):
        super().__init__()
        self.pre_r_ln = nn.LayerNorm(D)
        self.r = nn.ModuleDict(dict(orc_block=Attention(D, heads, window)))
        self.mlp0 = linear(D, 4 * D)
        self.mlp1 = nn.ModuleDict(dict(layer=nn.Linear(4 * D, D)))

    def forward(self, x, state):
        x = self.pre_r_ln(x)                                   # the residual starts after this norm
        out, state = self.r["orc_block"](x, state)
        x = x + out
        return x + self.mlp1["layer"](self.mlp0(x)), state


class VPT(nn.Module):
    """channels: of the three stacks; D, heads, layers, window: of the transformer; size: height and width of a frame."""

    def __init__(self, channels, D, heads, layers, window, size):
        super().__init__()
        self.D, self.window, self.size, self.bf16 = D, window, size, False
        stacks = nn.ModuleList(Stack(a, b, norm=a != 3) for a, b in zip([3] + channels, channels, strict=False))
        dense = linear(channels[-1] * (size // 8) ** 2, 256)
        self.img_process = nn.ModuleDict(dict(cnn=nn.ModuleDict(dict(stacks=stacks, dense=dense)), linear=linear(256, D)))
        self.recurrent_layer = nn.ModuleDict(dict(blocks=nn.ModuleList(Block(D, heads, window) for _ in range(layers))))
        self.lastlayer = linear(D, D)
        self.final_ln = nn.LayerNorm(D)

    def see(self, frames):
        """Each frame on its own, 97 % of the work, in bfloat16 if self.bf16: (N, size, size, 3) uint8 RGB -> (N, D) float32."""
        at_once = 8 if frames.device.type == "cpu" else 256                    # on a CPU, what fits its cache
        if len(frames) > at_once: return torch.cat([self.see(part) for part in frames.split(at_once)])
        x = frames.permute(0, 3, 1, 2).float() / 255                           # (N, 3, size, size)
        with torch.autocast(frames.device.type, torch.bfloat16, enabled=self.bf16):
            for stack in self.img_process["cnn"]["stacks"]:
                x = stack(x)
            return self.img_process["linear"](self.img_process["cnn"]["dense"](x.flatten(1))).float()     # flattened as C, H, W

    def remember(self, x, first, state=None):
        """What was seen (B, T, D), in time: -> latent (B, T, D) and the new state. first (B,) bool forgets a row's past."""
        state = state or [self.fresh(x)] * len(self.recurrent_layer["blocks"])
        after = []
        for block, (valid, k, v) in zip(self.recurrent_layer["blocks"], state, strict=True):
            x, new = block(x, (valid & ~first[:, None], k, v))
            after.append(new)
        return self.final_ln(self.lastlayer(F.relu(x))), after

    def fresh(self, x):
        B, W = len(x), self.window
        return x.new_zeros(B, W, dtype=torch.bool), x.new_zeros(B, W, self.D), x.new_zeros(B, W, self.D)

    @torch.no_grad()
    def forward(self, frames, first, state=None):
        """frames (B, T, size, size, 3) uint8 RGB, first (B,) bool: whether a row starts anew at this call -> (B, T, D), new state."""
        if frames.dtype != torch.uint8 or frames.shape[2:] != (self.size, self.size, 3):
            raise ValueError(f"frames must be uint8 (B, T, {self.size}, {self.size}, 3), not {frames.dtype} {tuple(frames.shape)}")
        return self.remember(self.see(frames.flatten(0, 1)).unflatten(0, frames.shape[:2]), first, state)

    @classmethod
    def from_weights(cls, path):
        """Reads a .weights file (never the pickled .model); policy and value heads are dropped. ValueError if it is another network."""
        found = {name[4:]: tensor for name, tensor in read_weights(path).items() if name.startswith("net.")}
        with torch.device("meta"):
            vpt = cls(**geometry(found, path))
        expected = {name: tuple(p.shape) for name, p in vpt.state_dict().items()}
        wrong = [n for n, shape in expected.items() if n not in found or tuple(found[n].shape) != shape] + sorted(found.keys() - expected)
        if wrong:
            raise ValueError(f"{path}: {len(wrong)} of {len(expected)} tensors missing, of another shape or unknown, first net.{wrong[0]}: "
                             "not a VPT policy; use foundation-model-*, bc-* or rl-*.weights")
        vpt.load_state_dict({name: tensor.float() for name, tensor in found.items()}, assign=True)
        return vpt.eval().requires_grad_(False)


def read_weights(path):
    if not Path(path).is_file(): raise ValueError(f"{path}: no such file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                                    # the error below says it better
            weights = torch.load(path, map_location="cpu", weights_only=True)  # weights only: nothing in the file is executed
    except Exception as error:
        raise ValueError(f"{path}: not a .weights file ({type(error).__name__}); the .model file is not needed, and a download may be "
                         "incomplete") from None
    if not isinstance(weights, dict) or not all(isinstance(t, torch.Tensor) for t in weights.values()):
        raise ValueError(f"{path}: holds no state dict of tensors; use a .weights file of VPT")
    return weights


def geometry(found, path):
    """All sizes from the tensors' shapes; ValueError where the ones that tell are missing."""
    try:
        channels = [len(found[f"img_process.cnn.stacks.{s}.firstconv.layer.weight"]) for s in range(3)]
        block = "recurrent_layer.blocks.0.r.orc_block."
        cells = found["img_process.cnn.dense.layer.weight"].shape[1] // channels[-1]      # height * width after three halvings
        return dict(channels=channels, D=len(found["final_ln.weight"]), heads=len(found[block + "r_layer.weight"]) // RELATIVE,
                    layers=len({name.split(".")[2] for name in found if re.match(r"recurrent_layer\.blocks\.\d", name)}),
                    window=found[block + "b_nd"].shape[1], size=8 * math.isqrt(cells))
    except (KeyError, IndexError, ZeroDivisionError) as missing:
        raise ValueError(f"{path}: net.{missing.args[0]} is missing: not a VPT policy (the inverse dynamics model is another network); "
                         "use foundation-model-*, bc-* or rl-*.weights") from None
