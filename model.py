"""
GPT-NeoX, the architecture of Pythia: parallel residual, rotary embedding on a part of each head.

    model = GPTNeoX(Config(vocab_size=512, hidden_size=128, num_hidden_layers=4))
    model = GPTNeoX.from_pretrained("EleutherAI/pythia-160m")    # or a directory
    logits = model(tok)                                          # (B, T) int64 -> (B, T, V)

Parameter names and config keys are those of the published checkpoints.
Source: Black et al. 2022 (arXiv 2204.06745), Biderman et al. 2023 (arXiv 2304.01373).
"""

import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from runtime.files import read_json, save_tensors, write_json
from runtime.pretrained import find_checkpoint, read_weights

GELU = {"gelu": "none", "gelu_fast": "tanh", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}
# the most that config.json may say; of all else 2**24
MOST = dict(num_hidden_layers=1000, rotary_pct=1, rotary_emb_base=2**53, layer_norm_eps=1)


@dataclass
class Config:
    vocab_size: int = 50304
    hidden_size: int = 512
    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    intermediate_size: int = 0  # of the MLP; 0: 4 * hidden_size
    rotary_pct: float = 0.25  # share of a head's dimensions that rotate
    rotary_emb_base: float = 10000.0
    layer_norm_eps: float = 1e-5
    use_parallel_residual: bool = True
    hidden_act: str = "gelu"  # exact, or by tanh: see GELU

    def __post_init__(self):
        """Raises ValueError where a value cannot be meant: config.json may hold anything."""
        for f in fields(self):
            value = getattr(self, f.name)
            fits = type(value) is f.type or (f.type is float and type(value) is int)
            if fits and f.type in (int, float):
                fits = value == f.default or 0 < value <= MOST.get(f.name, 2**24)
            if not fits or f.type is str and value not in GELU:
                raise ValueError(f"{f.name} is {value!r:.80}, like {f.default!r} is wanted")
        self.intermediate_size = self.intermediate_size or 4 * self.hidden_size
        heads = self.num_attention_heads
        if self.hidden_size % heads:
            raise ValueError(f"{self.hidden_size} dimensions are not divisible by {heads} heads")

    @classmethod
    def from_json(cls, path):
        """Reads the config.json of transformers 4 or 5. Raises ValueError if it is no GPT-NeoX."""
        stored = read_json(path)
        rope = stored.get("rope_parameters") or stored.get("rope_scaling") or {}
        if isinstance(rope, dict):  # transformers 5
            stored.setdefault("rotary_pct", rope.get("partial_rotary_factor", cls.rotary_pct))
            stored.setdefault("rotary_emb_base", rope.get("rope_theta", cls.rotary_emb_base))
            rope = rope.get("rope_type", rope.get("type", "default"))
        kind = stored.get("model_type")
        if (kind, rope) != ("gpt_neox", "default"):
            found = f"model_type is {kind!r:.80}, rope type {rope!r:.80}"
            raise ValueError(f"{path}: {found}; 'gpt_neox' and 'default' are known")
        try:
            return cls(**{f.name: stored[f.name] for f in fields(cls) if f.name in stored})
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


# -----------------------------------------------------------------------------
# the network


def working_dtype(x):
    """In which dtype x is multiplied: autocast's, where that is on."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def rotary(config, pos):
    """Cosines and signed sines at positions pos (N,): two of (N, rotary dims), float32.

    Su et al. 2021, RoFormer, arXiv 2104.09864.
    """
    dims = int(config.hidden_size // config.num_attention_heads * config.rotary_pct)
    exponent = torch.arange(0, dims, 2, device=pos.device).float() / dims
    freq = 1 / config.rotary_emb_base**exponent  # rounded as in transformers
    angle = pos[:, None].float() * freq
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)  # rotates halves, not neighbours


def rotate(x, cos, sin):  # x (.., N, hs)
    dims = cos.shape[-1]
    turned, passed = x[..., :dims], x[..., dims:]
    first, second = turned.chunk(2, -1)
    turned = turned * cos + torch.cat((second, first), -1) * sin
    return torch.cat((turned, passed), -1)


def causal(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class LayerCache:
    """Keys and values of one layer. In the place of `causal` it appends, and attends to all."""

    def __init__(self, shape, device, dtype):
        self.k = torch.empty(shape, device=device, dtype=dtype)  # (B, H, T, hs)
        self.v = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0

    def __call__(self, q, k, v):  # (B, H, n, hs)
        start, n = self.length, q.shape[2]
        self.length = start + n
        if self.length > self.k.shape[2]:
            room = 0, 0, 0, self.length  # or it grows with every slot
            self.k, self.v = F.pad(self.k, room), F.pad(self.v, room)
        self.k[:, :, start : self.length] = k
        self.v[:, :, start : self.length] = v
        if start == 0:
            return causal(q, k, v)
        mask = None  # one row sees all
        if n > 1:
            mask = torch.ones(n, self.length, dtype=torch.bool, device=q.device).tril(start)
        k, v = self.k[:, :, : self.length], self.v[:, :, : self.length]
        return F.scaled_dot_product_attention(q, k, v, mask)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads = config.num_attention_heads
        d = config.hidden_size
        self.query_key_value = nn.Linear(d, 3 * d)
        self.dense = nn.Linear(d, d)

    def forward(self, x, cos, sin, attend):
        B, N, d = x.shape
        qkv = self.query_key_value(x).view(B, N, self.heads, 3, -1)
        qkv = qkv.permute(3, 0, 2, 1, 4)  # (3, B, H, N, hs)
        out = attend(*rotate(qkv[:2], cos, sin), qkv[2])
        return self.dense(out.transpose(1, 2).reshape(B, N, d))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.approximate = GELU[config.hidden_act]
        self.dense_h_to_4h = nn.Linear(config.hidden_size, config.intermediate_size)
        self.dense_4h_to_h = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x):
        return self.dense_4h_to_h(F.gelu(self.dense_h_to_4h(x), approximate=self.approximate))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.parallel = config.use_parallel_residual
        self.input_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.attention = Attention(config)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, attend):
        attended = x + self.attention(self.input_layernorm(x), cos, sin, attend)
        mlp_input = x if self.parallel else attended
        return attended + self.mlp(self.post_attention_layernorm(mlp_input))


class GPTNeoX(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        embeddings = torch.empty(config.vocab_size, config.hidden_size)
        parts = dict(embed_in=nn.Embedding.from_pretrained(embeddings, freeze=False))
        parts["layers"] = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        parts["final_layer_norm"] = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.gpt_neox = nn.ModuleDict(parts)
        self.embed_out = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        # from_pretrained reads the weights; normal_ on the meta device would load sympy: 2 s, 70 MB
        if not embeddings.is_meta:
            for name, module in self.named_modules():
                self.initialise(name, module)

    def initialise(self, name, module):
        """As Pythia: small init (Nguyen & Salazar 2019), wang init before residuals (GPT-J)."""
        if not isinstance(module, (nn.Linear, nn.Embedding)):
            return
        std = math.sqrt(2 / (5 * self.config.hidden_size))
        if name.endswith(("attention.dense", "mlp.dense_4h_to_h")):
            std = 2 / self.config.num_hidden_layers / math.sqrt(self.config.hidden_size)
        nn.init.normal_(module.weight, std=std)
        if getattr(module, "bias", None) is not None:  # embeddings have none
            nn.init.zeros_(module.bias)

    def embed(self, tok):
        return self.gpt_neox.embed_in(tok)  # (B, T) -> (B, T, d)

    def stack(self, x, pos=None, attend=causal, cache=None):
        """All layers and the final norm over embeddings x (B, N, d) at positions pos (N,).

        attend(q, k, v) is the attention of every layer. A `cache` from new_cache takes its place
        and sets the positions.
        """
        if pos is None:
            start = cache[0].length if cache else 0
            pos = torch.arange(start, start + x.shape[1], device=x.device)
        cos, sin = (table.to(working_dtype(x)) for table in rotary(self.config, pos))
        for i, layer in enumerate(self.gpt_neox.layers):
            x = layer(x, cos, sin, cache[i] if cache else attend)
        return self.gpt_neox.final_layer_norm(x)

    def forward(self, tok, cache=None):
        return self.embed_out(self.stack(self.embed(tok), cache=cache))  # (B, T) -> (B, T, V)

    def new_cache(self, B, T=64):
        """Room for T positions of B sequences, and more where they come: one LayerCache a layer."""
        config, weight = self.config, self.embed_out.weight
        heads = config.num_attention_heads
        shape = B, heads, T, config.hidden_size // heads
        layers = range(config.num_hidden_layers)
        return [LayerCache(shape, weight.device, working_dtype(weight)) for _ in layers]

    def save_pretrained(self, folder):
        """Writes config.json and model.safetensors as the published checkpoints have them."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        about = dict(architectures=["GPTNeoXForCausalLM"], model_type="gpt_neox")
        about |= dict(bos_token_id=0, eos_token_id=0)
        about["torch_dtype"] = str(self.embed_out.weight.dtype).removeprefix("torch.")
        weights = {name: p.detach() for name, p in self.named_parameters()}
        save_tensors(weights, Path(folder, "model.safetensors"), {"format": "pt"})
        write_json(about | asdict(self.config), Path(folder, "config.json"))

    @classmethod
    def from_pretrained(cls, name_or_dir, dtype=torch.float32):
        """A checkpoint as a model on the CPU, its weights cast to dtype.

        name_or_dir: as for find_checkpoint. Raises FileNotFoundError or ValueError, one line each.
        """
        folder = find_checkpoint(name_or_dir)
        config = Config.from_json(folder / "config.json")
        weights = read_weights(folder, dtype)
        embed_in = weights.get("gpt_neox.embed_in.weight", torch.empty(config.hidden_size))
        config.vocab_size = embed_in.numel() // config.hidden_size  # the weights know better
        with torch.device("meta"):
            model = cls(config)
        try:
            model.load_state_dict(weights, assign=True)
        except RuntimeError as error:  # its lines name each tensor that is missing or does not fit
            raise ValueError(f"{folder}: " + " ".join(str(error).split())[:500]) from None
        return model


# -----------------------------------------------------------------------------
# cross-entropy without all logits at once


LOGITS = dict(cuda=2**27, cpu=2**23, mps=2**23)  # in one chunk


class LinearCrossEntropy(torch.autograd.Function):
    """Gradients are made in the forward, while a chunk's logits exist (Liger, arXiv 2410.10989)."""

    @staticmethod
    def forward(ctx, hidden, matrix, target, weight, dtype):
        wide = torch.promote_types(dtype, torch.float32)
        loss = torch.empty(target.shape, device=hidden.device, dtype=wide)
        d_hidden = torch.empty(hidden.shape, device=hidden.device, dtype=wide)
        d_matrix = torch.zeros(matrix.shape, device=hidden.device, dtype=wide)
        m = matrix.to(dtype)
        chunk = max(LOGITS[hidden.device.type] // len(matrix), 1)
        for start in range(0, len(target), chunk):
            rows = slice(start, start + chunk)
            h, t = hidden[rows].to(dtype), target[rows, None]
            logp = (h @ m.T).to(wide).log_softmax(-1)  # (n, V)
            loss[rows] = -logp.gather(1, t)[:, 0]
            grad = logp.exp_().scatter_add_(1, t, -torch.ones_like(t, dtype=wide))
            grad = grad.mul_(weight[rows, None]).to(dtype)
            d_hidden[rows] = grad @ m
            d_matrix += grad.T @ h
        ctx.save_for_backward(d_hidden.to(hidden.dtype), d_matrix.to(matrix.dtype))
        ctx.mark_non_differentiable(loss)
        return (loss * weight).sum(), loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, _):
        d_hidden, d_matrix = ctx.saved_tensors
        return d_hidden * grad, d_matrix * grad, None, None, None


def linear_cross_entropy(hidden, matrix, target, weight):
    """sum(weight * cross_entropy(hidden @ matrix.T, target)), a chunk of logits at a time.

    hidden (.., d), matrix (V, d), target (..) int64, weight (..), 0 for rows that are no target.
    Returns the sum, with gradients, and each row's loss (..) without, both float32 or wider.
    """
    assert hidden.shape[:-1] == target.shape == weight.shape
    dtype = torch.promote_types(working_dtype(hidden), working_dtype(matrix))
    with torch.autocast(hidden.device.type, enabled=False):
        rows = hidden.flatten(0, -2), matrix, target.flatten(), weight.flatten()
        total, loss = LinearCrossEntropy.apply(*rows, dtype)
    return total, loss.view(target.shape)
