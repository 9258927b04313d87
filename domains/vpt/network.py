"""
The VPT network (Baker et al. 2022, arXiv 2206.11795): frames of Minecraft -> a latent per frame.

    vpt = VPT.from_weights("foundation-model-1x.weights")  # or 2x, 3x, bc-*, rl-*
    latent, state = vpt(frames, first)               # (B, T, 128, 128, 3) uint8 RGB, (B,) bool
    latent, state = vpt(more, ~first, state)         # goes on; any chunking gives one result

A convolutional network (Impala) sees each frame on its own: `see`. Four transformer layers, each
attending to the frame itself and the 127 before it, remember: `remember`. The latent (B, T, D) is
what the policy's heads read ("pi_latent").

Modules have the names in OpenAI's .weights files, so parameters load without a table. All sizes
are read off the file. Every norm has epsilon 1e-5, every activation is a ReLU.
"""

import math
import re
import warnings

import torch
import torch.nn as nn
import torch.nn.functional as F

from runtime.files import regular_file

RELATIVE = 10  # learned curves over distance, of which a head mixes its relative attention
FILES = "use foundation-model-*, bc-* or rl-*.weights"


class Layer(nn.Module):
    """relu(layer(norm(x))): a LayerNorm and a linear layer, or a GroupNorm and a convolution."""

    def __init__(self, layer, norm):
        super().__init__()
        self.layer = layer
        self.norm = norm

    def forward(self, x):
        return F.relu(self.layer(self.norm(x)))


def linear(width_in, width_out):
    return Layer(nn.Linear(width_in, width_out, bias=False), nn.LayerNorm(width_in))


def conv(channels_in, channels_out):
    layer = nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False)
    return Layer(layer, nn.GroupNorm(1, channels_in))


def first_conv(channels_in, channels_out):
    """The first convolution of all has a bias, but no norm."""
    return Layer(nn.Conv2d(channels_in, channels_out, 3, padding=1), nn.Identity())


class Stack(nn.Module):
    """Halves height and width: a convolution, max pooling, a norm, two residual blocks."""

    def __init__(self, firstconv, channels):
        super().__init__()
        self.firstconv = firstconv
        self.n = nn.GroupNorm(1, channels)
        self.blocks = nn.ModuleList(self.block(channels) for _ in range(2))

    @staticmethod
    def block(channels):
        return nn.ModuleDict(dict(conv0=conv(channels, channels), conv1=conv(channels, channels)))

    def forward(self, x):
        x = F.max_pool2d(self.firstconv(x), 3, stride=2, padding=1)
        x = self.n(x)
        for block in self.blocks:
            x = x + block["conv1"](block["conv0"](x))
        return x


class Attention(nn.Module):
    """Causal attention over W frames, with a learned term of the distance and the query."""

    def __init__(self, D, heads, window):
        super().__init__()
        self.heads, self.window = heads, window
        self.q_layer = nn.Linear(D, D)
        self.k_layer = nn.Linear(D, D, bias=False)
        self.v_layer = nn.Linear(D, D, bias=False)
        self.proj_layer = nn.Linear(D, D)
        self.r_layer = nn.Linear(D, heads * RELATIVE)
        self.b_nd = nn.Parameter(torch.zeros(RELATIVE, window))

    def split(self, x):
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, T, D) -> (B, H, T, d)

    def forward(self, x, state):
        """x (B, T, D). state: which of the last W frames count (B, W), their k and v (B, W, D)."""
        valid, past_k, past_v = state
        q = self.split(self.q_layer(x))  # (B, H, T, d)
        k = torch.cat([past_k, self.k_layer(x)], dim=1)  # (B, W+T, D)
        v = torch.cat([past_v, self.v_layer(x)], dim=1)
        valid = torch.cat([valid, valid.new_ones(x.shape[:2])], dim=1)  # (B, W+T)
        bias = self.relative(x, valid)
        scale = 1 / q.shape[-1]  # as in muP, not 1/sqrt(d)
        out = F.scaled_dot_product_attention(q, self.split(k), self.split(v), bias, scale=scale)
        out = self.proj_layer(out.transpose(1, 2).flatten(2))  # (B, T, D)
        W = self.window
        return out, (valid[:, -W:], k[:, -W:], v[:, -W:])

    def relative(self, x, valid):
        """What is added to the logits, -inf where a frame is not seen: (B, H, T, W+T)."""
        T, W = x.shape[1], self.window
        rows = torch.arange(W, W + T, device=x.device)
        distance = rows[:, None] - torch.arange(W + T, device=x.device)  # (T, W+T)
        allowed = (distance >= 0) & (distance < W) & valid[:, None, None]  # (B, 1, T, W+T)
        r = self.split(self.r_layer(x))  # (B, H, T, 10)
        curve = self.b_nd[:, distance.clamp(0, W - 1)]  # (10, T, W+T)
        bias = torch.einsum("bhtn,ntk->bhtk", r, curve)
        return bias.masked_fill(~allowed, -math.inf)


class Block(nn.Module):
    def __init__(self, D, heads, window):
        super().__init__()
        self.pre_r_ln = nn.LayerNorm(D)
        self.r = nn.ModuleDict(dict(orc_block=Attention(D, heads, window)))
        self.mlp0 = linear(D, 4 * D)
        self.mlp1 = nn.ModuleDict(dict(layer=nn.Linear(4 * D, D)))

    def forward(self, x, state):
        x = self.pre_r_ln(x)  # the residual starts after this norm
        out, state = self.r["orc_block"](x, state)
        x = x + out
        return x + self.mlp1["layer"](self.mlp0(x)), state


class VPT(nn.Module):
    """channels: of the stacks. D, heads, layers, window: of the transformer. size: of a frame."""

    def __init__(self, channels, D, heads, layers, window, size, pre_lstm_ln=False):
        super().__init__()
        self.D, self.window, self.size = D, window, size
        self.bf16 = False  # of the convolutions
        convs = [first_conv(3, channels[0]), conv(*channels[:2]), conv(*channels[1:])]
        stacks = nn.ModuleList(Stack(*pair) for pair in zip(convs, channels, strict=True))
        dense = linear(channels[-1] * (size // 8) ** 2, 256)
        cnn = nn.ModuleDict(dict(stacks=stacks, dense=dense))
        self.img_process = nn.ModuleDict(dict(cnn=cnn, linear=linear(256, D)))
        # a norm that the published policies do without
        self.pre_lstm_ln = nn.LayerNorm(D) if pre_lstm_ln else nn.Identity()
        blocks = nn.ModuleList(Block(D, heads, window) for _ in range(layers))
        self.recurrent_layer = nn.ModuleDict(dict(blocks=blocks))
        self.lastlayer = linear(D, D)
        self.final_ln = nn.LayerNorm(D)

    def see(self, frames):
        """Each frame on its own, 97 % of the work: (N, size, size, 3) uint8 RGB -> (N, D)."""
        at_once = 8 if frames.device.type == "cpu" else 256  # on a CPU, what fits its cache
        return torch.cat([self.see_some(some) for some in frames.split(at_once)])

    def see_some(self, frames):
        x = frames.permute(0, 3, 1, 2).float() / 255  # (N, 3, size, size)
        with torch.autocast(frames.device.type, torch.bfloat16, enabled=self.bf16):
            for stack in self.img_process["cnn"]["stacks"]:
                x = stack(x)
            x = x.flatten(1)  # in the order C, H, W
            x = self.img_process["cnn"]["dense"](x)
            return self.img_process["linear"](x).float()

    def remember(self, x, first, state=None):
        """What was seen (B, T, D), in time -> latent (B, T, D) and the new state.

        first (B,) bool forgets the past of a row.
        """
        blocks = self.recurrent_layer["blocks"]
        state = state or [self.empty_state(x)] * len(blocks)
        x = self.pre_lstm_ln(x)
        new_state = []
        for block, (valid, k, v) in zip(blocks, state, strict=True):
            x, new = block(x, (valid & ~first[:, None], k, v))
            new_state.append(new)
        return self.final_ln(self.lastlayer(F.relu(x))), new_state

    def empty_state(self, x):
        valid = x.new_zeros(len(x), self.window, dtype=torch.bool)
        past = x.new_zeros(len(x), self.window, self.D)
        return valid, past, past

    @torch.no_grad()
    def forward(self, frames, first, state=None):
        """frames (B, T, size, size, 3) uint8 RGB -> latent (B, T, D), new state.

        first (B,) bool: whether a row starts anew at this call.
        """
        shape = (self.size, self.size, 3)
        if frames.dtype != torch.uint8 or frames.shape[2:] != shape:
            raise ValueError(f"frames of {frames.dtype} {tuple(frames.shape)}, not uint8 {shape}")
        seen = self.see(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])  # (B, T, D)
        return self.remember(seen, first, state)

    @classmethod
    def from_weights(cls, path):
        """Reads a .weights file, never a pickled .model; the policy's heads are dropped.

        Raises ValueError if it is no such file, or of another network.
        """
        weights = read_weights(path)
        tensors = {name[4:]: x.float() for name, x in weights.items() if name.startswith("net.")}
        sizes = geometry(tensors, path)
        with torch.device("meta"):
            vpt = cls(**sizes)
        shapes = {name: x.shape for name, x in vpt.state_dict().items()}
        wrong = [name for name, shape in shapes.items() if not has(tensors, name, shape)]
        wrong += sorted(tensors.keys() - shapes.keys())
        if wrong:
            raise ValueError(
                f"{path}: {len(wrong)} tensors missing, of another shape or unknown, first "
                f"net.{wrong[0]}: not a VPT policy; {FILES}"
            )
        vpt.load_state_dict(tensors, assign=True)
        return vpt.eval().requires_grad_(False)


def has(tensors, name, shape):
    return name in tensors and tensors[name].shape == shape


def read_weights(path):
    """{name: tensor}. Nothing in the file is executed. Raises ValueError."""
    regular_file(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the error below says it better
            weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"{path}: not a .weights file ({type(error).__name__}); the .model file is not needed, "
            "and a download may be incomplete"
        ) from None
    if not is_state_dict(weights):
        raise ValueError(f"{path}: holds no state dict of named tensors; {FILES}")
    return weights


def is_state_dict(weights):
    if not isinstance(weights, dict):
        return False
    return all(isinstance(k, str) and isinstance(x, torch.Tensor) for k, x in weights.items())


def geometry(tensors, path):
    """All sizes, from the shapes of the tensors that tell. Raises ValueError where one does not."""

    def shape(name, dims):
        x = tensors.get(name, torch.zeros(0))
        if x.dim() != dims or not x.numel():
            raise ValueError(
                f"{path}: net.{name} is missing or of another shape: not a VPT policy (nor is the "
                f"inverse dynamics model); {FILES}"
            )
        return x.shape

    firsts = [f"img_process.cnn.stacks.{i}.firstconv.layer.weight" for i in range(3)]
    channels = [shape(name, 4)[0] for name in firsts]
    attention = "recurrent_layer.blocks.0.r.orc_block."
    # height * width after three halvings
    cells = shape("img_process.cnn.dense.layer.weight", 2)[1] // channels[-1]
    blocks = {re.match(r"recurrent_layer\.blocks\.(\d+)\.|", name)[1] for name in tensors}
    D, heads = shape("final_ln.weight", 1)[0], shape(attention + "r_layer.weight", 2)[0] // RELATIVE
    if not heads or D % heads:
        raise ValueError(f"{path}: {D} dimensions for {heads} heads: not a VPT policy; {FILES}")
    return dict(
        channels=channels,
        D=D,
        heads=heads,
        layers=len(blocks - {None}),
        window=shape(attention + "b_nd", 2)[1],
        size=8 * math.isqrt(cells),
        pre_lstm_ln="pre_lstm_ln.weight" in tensors,
    )
