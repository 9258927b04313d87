"""
The encoder: reads a stream of observations and writes a stream of text, one token per time step.

    x_t = embed(tok_{t-1}) + projector(obs_t);  hidden_t = GPT-NeoX(x)_t;  logits_t = embed_out(hidden_t) speaks of tok_t

    encoder = Encoder.from_pretrained("out/crafter")
    tok, prob = encoder.annotate(obs)                        # (B, N, D) -> (B, N) token ids and their probabilities
    for tok, prob in encoder.follow(observations): ...       # the same, step by step: (B, D) -> (B,) as they come
"""
from pathlib import Path

import torch
import torch.nn as nn
from safetensors import safe_open

import checkpoint
from data import END
from files import save_tensors
from model import GPTNeoX


class Projector(nn.Module):
    """Observations -> embeddings: standardise and weigh, hide features if asked, two layers."""

    CLIP = 1.0                                               # standard deviations; beyond it a rare feature drowns the rest

    def __init__(self, obs_dim, d):
        super().__init__()
        self.register_buffer("mean", torch.zeros(obs_dim))
        self.register_buffer("scale", torch.ones(obs_dim))
        self.register_buffer("weight", torch.ones(obs_dim))
        self.into = nn.Linear(obs_dim, d)
        self.out = nn.Linear(d, d)

    def standardise(self, episodes, brevity, sample=100):
        """Mean, scale and weight of the features, from some training episodes (data.Episodes); no caption is read.

        Language speaks of what happens, and what happens is brief: a feature weighs (1 - its correlation from one step to the
        next) ** brevity. Slow feature analysis (Wiskott & Sejnowski 2002) turned around: it looks for what stays.
        """
        some = [episodes.obs(i) for i in range(0, len(episodes), max(len(episodes) // sample, 1))]
        obs = torch.cat(some)
        mean, std = obs.mean(0), obs.std(0)
        from_mean = [x - mean for x in some]
        correlation = sum((x[1:] * x[:-1]).sum(0) for x in from_mean) / sum(x.square().sum(0) for x in from_mean).clamp(min=1e-12)
        weight = (1 - correlation).clamp(min=0) ** brevity * (std > 0)                  # a feature that never moved says nothing
        self.mean.copy_(mean)
        self.scale.copy_(1 / std.clamp(min=1e-2))
        self.weight.copy_(weight / weight.square().mean().sqrt().clamp(min=1e-12))

    def effective(self):
        """How many features weigh: the participation ratio of their squared weights, between 1 and all D."""
        energy = self.weight.square()
        return (energy.sum().square() / energy.square().sum().clamp(min=1e-12)).item()

    def weighed(self, obs):                                  # (.., D) -> (.., D)
        return ((obs - self.mean) * self.scale).clamp(-self.CLIP, self.CLIP) * self.weight

    def forward(self, obs, keep=None):                       # (B, T, D), (B, D) -> (B, T, d)
        x = self.weighed(obs)
        if keep is not None: x = x * (keep / keep.mean(1, keepdim=True).clamp(min=1e-3))[:, None]   # per window: no other matters
        return self.out(nn.functional.gelu(self.into(x)))


class Encoder(nn.Module):
    def __init__(self, lm, obs_dim, window, pretrained=False):
        """lm: a GPTNeoX; obs_dim: D; window: the T it is trained on, its horizon. pretrained: start from the plain language model."""
        super().__init__()
        self.lm, self.window = lm, window
        self.projector = Projector(obs_dim, lm.config.hidden_size)
        if pretrained:
            nn.init.zeros_(self.projector.out.weight)
            nn.init.zeros_(self.projector.out.bias)

    def forward(self, obs, tok, prev, keep=None):
        """Teacher-forced hidden states (B, T, d) of obs (B, T, D), tok (B, T), prev (B,) the token before; keep (B, D) hides features."""
        before = torch.cat((prev[:, None], tok[:, :-1]), 1)
        return self.lm.stack(self.lm.embed(before) + self.projector(obs, keep))

    def logits(self, hidden):
        return self.lm.embed_out(hidden)                     # (B, T, d) -> (B, T, V)

    @torch.no_grad()
    def annotate(self, obs, tok=None, known=None, prev=None, noise=None):
        """Writes the stream of obs (B, N, D), finite numbers as they are in the data set, N steps of any number. Raises ValueError.

        tok (B, N) is kept where known (B, N) is True; prev (B,) is the token before, default END; noise (B, N) in [0, 1) draws each
        token from the encoder's distribution by inversion, without it the likeliest is written.
        Returns tok (B, N) int64 and the probability (B, N) float32 the encoder gave to each of its tokens.
        Beyond `window` steps it writes in windows that start every half window, each primed with the text of its first half.
        """
        obs = torch.as_tensor(obs).to(self.projector.mean)
        if obs.dim() != 3 or obs.shape[2] != len(self.projector.mean):
            raise ValueError(f"obs has shape {tuple(obs.shape)}; (episodes, steps, {len(self.projector.mean)}) is wanted")
        B, N, _ = obs.shape
        tok = torch.zeros(B, N, dtype=torch.int64, device=obs.device) if tok is None else tok.clone()
        known = torch.zeros_like(tok, dtype=torch.bool) if known is None else known
        prob = torch.zeros(B, N, device=obs.device)
        prev = torch.full((B,), END, device=obs.device) if prev is None else prev
        half = self.window // 2
        for start in range(0, max(N - half, 1), half):
            here, done = slice(start, start + self.window), half if start else 0
            before = tok[:, start - 1] if start else prev
            self._write(obs[:, here], tok[:, here], known[:, here], prob[:, here], before, None if noise is None else noise[:, here], done)
        return tok, prob

    def _write(self, obs, tok, known, prob, before, noise, done):
        """Fills tok and prob of one window in place from step `done` on."""
        seen, cache = self.projector(obs), self.lm.new_cache(obs.shape[0], obs.shape[1])
        if done:
            first = torch.cat((before[:, None], tok[:, :done - 1]), 1)
            self.lm.stack(self.lm.embed(first) + seen[:, :done], cache=cache)
            before = tok[:, done - 1]
        for t in range(done, obs.shape[1]):
            hidden = self.lm.stack(self.lm.embed(before)[:, None] + seen[:, t:t + 1], cache=cache)
            p = self.logits(hidden[:, 0]).float().softmax(-1)                           # (B, V)
            chosen = p.argmax(-1) if noise is None else self._draw(p, noise[:, t])
            tok[:, t] = before = torch.where(known[:, t], tok[:, t], chosen)
            prob[:, t] = p.gather(1, before[:, None])[:, 0]

    @torch.no_grad()
    def follow(self, observations):
        """annotate() while the stream is still coming: for each (B, D) of an iterable yields its tok (B,) and prob (B,).

        Every half window a cache starts; the older of the last two writes, the younger is primed: constant cost and memory.
        """
        half, before, caches = self.window // 2, None, []
        for t, obs in enumerate(observations):
            if before is None: before = torch.full((len(obs),), END, device=obs.device)
            if t % half == 0: caches = caches[-1:] + [self.lm.new_cache(len(obs), 2 * half)]
            x = self.lm.embed(before)[:, None] + self.projector(obs[:, None])           # (B, 1, d)
            hidden = [self.lm.stack(x, cache=cache) for cache in caches][0]
            prob, before = self.logits(hidden[:, 0]).float().softmax(-1).max(-1)
            yield before, prob

    @staticmethod
    def _draw(p, u):
        return torch.searchsorted(p.cumsum(-1), u[:, None].to(p.dtype).contiguous()).clamp(max=p.shape[-1] - 1)[:, 0]

    def save_pretrained(self, folder):
        """config.json and model.safetensors as Pythia's, and projector.safetensors beside them."""
        self.lm.save_pretrained(folder)
        save_tensors(self.projector.state_dict(), Path(folder) / "projector.safetensors", {"window": str(self.window)})

    @classmethod
    def from_pretrained(cls, folder):
        """Loads from a run's folder (out/crafter: its best checkpoint), a checkpoint, or its encoder folder. Raises configurator.Fault."""
        folder = Path(folder)
        if (folder / "encoder").exists(): folder = folder / "encoder"
        if not (folder / "projector.safetensors").exists(): folder = checkpoint.chosen(folder) / "encoder"
        checkpoint.verify(folder)
        with safe_open(folder / "projector.safetensors", "pt") as f:
            weights, window = {k: f.get_tensor(k) for k in f.keys()}, int(f.metadata()["window"])
        encoder = cls(GPTNeoX.from_pretrained(folder), len(weights["mean"]), window)
        encoder.projector.load_state_dict(weights)
        return encoder
