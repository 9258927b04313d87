"""
GPT-NeoX, the architecture of Pythia, written out: parallel residual, rotary embedding on the first part of each head.

    model = GPTNeoX(Config(vocab_size=512, hidden_size=128, num_hidden_layers=4, num_attention_heads=4))
    model = GPTNeoX.from_pretrained("EleutherAI/pythia-160m")       # or a directory; pythia.py says where it looks
    logits = model(tok)                                            # (B, T) int64 -> (B, T, V)

Parameter names and config keys are those of the published Pythia checkpoints.
Source: Black et al. 2022 (arXiv 2204.06745), Biderman et al. 2023 (arXiv 2304.01373); checked against transformers' GPTNeoXForCausalLM.
"""
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

import pythia


@dataclass
class Config:
    vocab_size: int = 50304
    hidden_size: int = 512
    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    intermediate_size: int = 0            # of the MLP; 0 means 4 * hidden_size
    rotary_pct: float = 0.25              # share of each head's dimensions that rotate
    rotary_emb_base: float = 10000.0
    layer_norm_eps: float = 1e-5
    use_parallel_residual: bool = True
    attention_bias: bool = True
    hidden_act: str = "gelu"              # exact, or by tanh: see pythia.ACTIVATIONS
    tie_word_embeddings: bool = False     # one matrix for embed_in and embed_out

    def __post_init__(self):
        assert self.hidden_size % self.num_attention_heads == 0, "hidden_size must be divisible by num_attention_heads"
        self.intermediate_size = self.intermediate_size or 4 * self.hidden_size


def rotary(config, pos):
    """Cosines and sines at positions pos, (N,) or (B, N) -> two of (1 or B, 1, N, rotary dims), float32 (Su et al. 2021, 2104.09864)."""
    dims = int(config.hidden_size // config.num_attention_heads * config.rotary_pct)
    freq = 1 / config.rotary_emb_base ** (torch.arange(0, dims, 2, device=pos.device).float() / dims)   # rounded as in transformers
    angle = pos[..., None].float() * freq
    angle = torch.cat((angle, angle), -1)                                               # rotates halves, not neighbours
    angle = angle[:, None] if pos.dim() == 2 else angle[None, None]
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):                                                                # x (.., B, H, N, hs)
    turned, passed = x[..., :cos.shape[-1]], x[..., cos.shape[-1]:]
    first, second = turned.chunk(2, -1)
    turned = turned * cos + torch.cat((-second, first), -1) * sin
    return torch.cat((turned, passed), -1)


def causal(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class LayerCache:
    """Keys and values of one layer, preallocated. Called in place of `causal`, it appends what comes and attends to all so far."""

    def __init__(self, B, H, T, hs, device, dtype):
        self.k, self.v = (torch.empty(B, H, T, hs, device=device, dtype=dtype) for _ in range(2))
        self.length = 0

    def __call__(self, q, k, v):                                                        # each (B, H, n, hs)
        start, self.length = self.length, self.length + q.shape[2]
        self.k[:, :, start:self.length], self.v[:, :, start:self.length] = k, v
        keys, values = self.k[:, :, :self.length], self.v[:, :, :self.length]
        if start == 0: return causal(q, keys.to(q.dtype), values.to(q.dtype))
        mask = None if q.shape[2] == 1 else torch.ones(q.shape[2], self.length, dtype=torch.bool, device=q.device).tril(start)
        return F.scaled_dot_product_attention(q, keys.to(q.dtype), values.to(q.dtype), mask)


class Linear(nn.Linear):
    """nn.Linear; when decoding on a CPU its few rows go on the right of the product, where MKL is up to a third faster."""

    def forward(self, x):                                                               # (.., in) -> (.., out)
        rows = x.numel() // x.shape[-1]
        if torch.is_grad_enabled() or x.device.type != "cpu" or not 8 <= rows <= 32: return super().forward(x)
        x_t = x.reshape(rows, -1).t()
        out = self.weight @ x_t if self.bias is None else torch.addmm(self.bias[:, None], self.weight, x_t)
        return out.t().reshape(*x.shape[:-1], -1)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads = config.num_attention_heads
        self.query_key_value = Linear(config.hidden_size, 3 * config.hidden_size, config.attention_bias)
        self.dense = Linear(config.hidden_size, config.hidden_size, config.attention_bias)

    def forward(self, x, cos, sin, attend, skip=0):                                     # (B, N, d) -> (B, N - skip, d)
        B, N, d = x.shape
        qkv = self.query_key_value(x).view(B, N, self.heads, 3, -1).permute(3, 0, 2, 1, 4)  # (3, B, H, N, hs)
        q, k = rotate(qkv[:2], cos, sin)
        out = attend(q[:, :, skip:], k, qkv[2])                                         # (B, H, N - skip, hs)
        return self.dense(out.transpose(1, 2).reshape(B, N - skip, d))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.approximate = pythia.ACTIVATIONS[config.hidden_act]
        self.dense_h_to_4h = Linear(config.hidden_size, config.intermediate_size)
        self.dense_4h_to_h = Linear(config.intermediate_size, config.hidden_size)

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

    def forward(self, x, cos, sin, attend, skip=0):
        attended, x = self.attention(self.input_layernorm(x), cos, sin, attend, skip), x[:, skip:]
        if self.parallel: return x + attended + self.mlp(self.post_attention_layernorm(x))
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x))


class GPTNeoX(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.gpt_neox = nn.ModuleDict(dict(
            embed_in=nn.Embedding.from_pretrained(torch.empty(config.vocab_size, config.hidden_size), freeze=False),
            layers=nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers)),
            final_layer_norm=nn.LayerNorm(config.hidden_size, config.layer_norm_eps),
        ))
        self.embed_out = nn.Linear(config.hidden_size, config.vocab_size, bias=False)   # softmax wants its rows contiguous
        if config.tie_word_embeddings: self.tie()
        if not self.embed_out.weight.is_meta: self.initialise()                         # else the weights are to be read

    def initialise(self):
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):                           # Nguyen & Salazar 2019, as Pythia
                std = math.sqrt(2 / (5 * self.config.hidden_size))
                if name.endswith(("attention.dense", "mlp.dense_4h_to_h")):             # Wang & Komatsuzaki 2021, as Pythia
                    std = 2 / self.config.num_hidden_layers / math.sqrt(self.config.hidden_size)
                nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def tie(self):
        self.config.tie_word_embeddings, self.embed_out.weight = True, self.gpt_neox.embed_in.weight

    def embed(self, tok):
        return self.gpt_neox.embed_in(tok)                                              # (B, T) -> (B, T, d)

    def stack(self, x, pos=None, attend=causal, cache=None, skip=0):
        """All layers and the final norm over embeddings x (B, N, d) at positions pos ((N,) or (B, N), default 0 .. N-1).

        attend(q, k, v) is the attention of every layer; a `cache` from `new_cache` replaces it and sets the positions.
        The first `skip` rows are not wanted: of them the last layer makes keys and values only.
        """
        if pos is None:
            start = cache[0].length if cache else 0
            pos = torch.arange(start, start + x.shape[1], device=x.device)
        cos, sin = (table.to(x.dtype) for table in rotary(self.config, pos))
        for i, layer in enumerate(self.gpt_neox.layers):
            x = layer(x, cos, sin, cache[i] if cache else attend, skip if i == len(self.gpt_neox.layers) - 1 else 0)
        return self.gpt_neox.final_layer_norm(x)

    def forward(self, tok, cache=None):
        return self.embed_out(self.stack(self.embed(tok), cache=cache))                 # (B, T) -> (B, T, V)

    def new_cache(self, B, T):
        """Room for T positions of B sequences: one LayerCache per layer."""
        c, weight = self.config, self.embed_out.weight
        return [LayerCache(B, c.num_attention_heads, T, c.hidden_size // c.num_attention_heads, weight.device, weight.dtype)
                for _ in range(c.num_hidden_layers)]

    def save_pretrained(self, folder, dtype=None, shard_bytes=5 * 10 ** 9):
        """Writes config.json and model.safetensors (above shard_bytes: shards) as the published checkpoints, in dtype or as it is."""
        meta = dict(architectures=["GPTNeoXForCausalLM"], model_type="gpt_neox", bos_token_id=0, eos_token_id=0,
                    torch_dtype=str(dtype or self.embed_out.weight.dtype).removeprefix("torch."))
        pythia.write(Path(folder), meta | asdict(self.config), dict(self.named_parameters()), dtype, shard_bytes)

    @classmethod
    def from_pretrained(cls, name_or_dir, dtype=torch.float32):
        """A checkpoint as a model on the CPU: a directory, or a name on the Hugging Face hub (pythia.find), its weights cast to dtype.

        Raises FileNotFoundError or ValueError, one line with file and tensor, before anything is loaded.
        """
        folder = pythia.find(name_or_dir)
        config, stored = Config(**pythia.read_config(folder)), pythia.read_index(folder)
        tied = config.tie_word_embeddings
        config.tie_word_embeddings = tied and "embed_out.weight" not in stored          # some files hold both
        for name in {"gpt_neox.embed_in.weight"} & stored.keys(): config.vocab_size = stored[name].shape[0]   # the weights know best
        with torch.device("meta"): model = cls(config)
        pythia.check(stored, model, folder)
        model.load_state_dict(pythia.read(stored, dtype), strict=False, assign=True)
        if config.tie_word_embeddings: model.tie()
        if tied and torch.equal(model.embed_out.weight, model.gpt_neox.embed_in.weight): model.tie()
        return model
