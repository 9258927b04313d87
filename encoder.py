"""
The encoder: reads a stream of observations and writes a stream of text, one token per step.

    x_t      = embed(tok_{t-1}) + projector(obs_t and some before)
    hidden_t = GPT-NeoX(x)_t
    logits_t = embed_out(hidden_t)                           about tok_t

    encoder = Encoder.from_pretrained("out/crafter/step-000400/encoder")
    tok, prob = encoder.annotate(obs)                        # (B, N, D) -> (B, N), (B, N)
    for tok, prob in encoder.stream(observations): ...       # (B, D) -> (B,), (B,), as they come

A reader is a projector that only says which caption starts. It needs much less than an encoder: it
is fitted first, reads the episodes that nobody annotated, and the encoder goes on from its weights.
"""

import copy
import math
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open

from data import END, Caption, score
from model import GPTNeoX
from runtime.files import save_tensors, tensors_of

CLIP = 1.0  # standard deviations; beyond it a rare feature drowns the rest


class Projector(nn.Module):
    """Observations -> embeddings: weigh the features, look back a few steps, then two layers."""

    def __init__(self, obs_dim, d, past, width=256):
        """past: how many steps before the present it sees."""
        super().__init__()
        self.past = past
        self.register_buffer("mean", torch.zeros(obs_dim))
        self.register_buffer("scale", torch.ones(obs_dim))
        self.register_buffer("feature_weight", torch.ones(obs_dim))
        self.register_buffer("change_weight", torch.ones(()))
        self.dense_1 = nn.Linear(4 * obs_dim, width)
        self.dense_2 = nn.Linear(width, d)

    def standardise(self, episodes, feature_power, sample=100):
        """Mean, scale and weight of each feature, from some episodes. No caption is read.

        Language speaks of what happens, and what happens is brief: a feature weighs (1 - its
        correlation from one step to the next) ** feature_power. Slow feature analysis (Wiskott &
        Sejnowski 2002) looks for what stays; this is its opposite. With feature_power 0 all weigh
        alike, and instead the change of each since the step before is seen as well.
        """
        every = max(len(episodes) // sample, 1)
        some = [episodes.obs(i).double() for i in range(0, len(episodes), every)]
        obs = torch.cat(some)
        mean, std = obs.mean(0), obs.std(0)
        centred = [x - mean for x in some]
        products = sum((x[1:] * x[:-1]).sum(0) for x in centred)
        squares = sum(x.square().sum(0) for x in centred)
        brief = (1 - products / squares.clamp(min=1e-12)).clamp(min=0)
        weight = brief**feature_power * (std > 0)  # a feature that never moved says nothing
        self.mean.copy_(mean)
        self.scale.copy_(1 / std.clamp(min=1e-2))
        self.feature_weight.copy_(weight / weight.square().mean().sqrt().clamp(min=1e-12))
        self.change_weight.fill_(feature_power == 0)

    def effective(self):
        """How many features weigh: the participation ratio of squared weights, from 1 to D."""
        energy = self.feature_weight.square()
        return (energy.sum().square() / energy.square().sum().clamp(min=1e-12)).item()

    def weigh(self, difference):  # (.., D) -> (.., D)
        return (difference * self.scale).clamp(-CLIP, CLIP) * self.feature_weight

    def look(self, obs):
        """obs (B, N, D) -> each step, the mean and the maximum of the `past` steps before it, and
        its change since the last, (B, N, 4 D)."""
        obs = obs.to(self.mean.dtype)
        # before the first step the world stood still
        obs = torch.cat((obs[:, :1].expand(-1, self.past, -1), obs), 1)
        change = self.weigh(obs.diff(dim=1)[:, self.past - 1 :]) * self.change_weight
        x = self.weigh(obs - self.mean)
        before = x[:, :-1].unfold(1, self.past, 1)  # (B, N, D, past)
        return torch.cat((x[:, self.past :], before.mean(-1), before.amax(-1), change), -1)

    def hidden(self, seen):  # (.., 4 D) -> (.., width)
        return F.gelu(self.dense_1(seen))

    def forward(self, obs):  # (B, N, D) -> (B, N, d)
        return self.dense_2(self.hidden(self.look(obs)))


POWERS = 4.0, 0.0  # of the features' weights; the first of equals is taken
MARGINS = 2.0, 1.0, 3.0


class Reader(nn.Module):
    """Which caption starts at a step, or none: a projector's hidden layer and an output of its own.

    An encoder learns to see and to spell at once, and overfits when few episodes are annotated.
    """

    def __init__(self, projector, texts):
        """texts: the captions there are."""
        super().__init__()
        self.projector, self.texts = projector, texts
        self.margin, self.pause, self.f1 = MARGINS[0], 0, 0.0
        self.out = nn.Linear(projector.dense_1.out_features, len(texts) + 1)

    def forward(self, seen):
        """seen (.., 4 D) -> logits (.., len(texts) + 1), the last that nothing starts."""
        return self.out(self.projector.hidden(seen))

    def fit(self, episodes, annotated, updates=1000):
        """Trains on the annotated steps: a minute, and the same on every process."""
        look = self.projector.look
        seen = torch.cat([look(episodes.obs(i)[None])[0] for i in annotated])  # (n, 4 D)
        label = torch.cat([episodes.starts(i, self.texts) for i in annotated])
        steps = (label >= 0).nonzero()[:, 0]
        optimizer = torch.optim.AdamW(self.parameters(), 3e-3, weight_decay=0.3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates, 3e-4)
        for _ in range(updates):
            some = steps[torch.randint(len(steps), (256,))]
            loss = F.cross_entropy(self(seen[some]), label[some], label_smoothing=0.02)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        captions = [episodes.known_captions(i) for i in annotated]
        self.pause = min(shortest_repeat(captions) - 1, self.projector.past)
        return self

    @torch.no_grad()
    def logits(self, obs):  # (N, D) -> (N, len(texts) + 1)
        return self(self.projector.look(obs[None])[0])

    def captions(self, obs):
        """The captions of an episode obs (N, D)."""
        return self.starts(self.logits(obs), self.margin)

    def starts(self, logits, margin):
        """Logits (N, len(texts) + 1) -> captions. Silence has to be likelier by `margin`: where the
        moment of a change is not sharp, it is the likeliest everywhere. The same text again within
        a pause is the same caption."""
        captions, latest, logits = [], {}, logits.clone()
        logits[:, -1] -= margin
        for t, c in enumerate(logits.argmax(-1).tolist()):
            if c < len(self.texts):
                if t - latest.get(c, -math.inf) > self.pause:
                    captions.append(Caption(t, t + 1, self.texts[c]))
                latest[c] = t
        return captions


def shortest_repeat(episodes):
    """The fewest steps after which the same text starts again in lists of captions; or infinite."""
    shortest = math.inf
    for captions in episodes:
        latest = {}
        for caption in sorted(captions):
            repeat = caption.start - latest.get(caption.text, -math.inf)
            shortest, latest[caption.text] = min(shortest, repeat), caption.start
    return shortest


def choose_reader(projector, episodes, annotated, powers=POWERS):
    """A reader with a copy of this projector, not yet fitted. The projector is standardised.

    Power and margin are those with which a reader of every other annotated episode says best what
    is in the rest, by caption F1, which `f1` keeps.
    """
    texts = sorted({c.text for i in annotated for c in episodes.known_captions(i)})
    some, rest = annotated[::2], annotated[1::2]
    true, tried = [episodes.known_captions(i) for i in rest], {}
    for power in powers:
        projector.standardise(episodes, power)
        reader = Reader(copy.deepcopy(projector), texts).fit(episodes, some)
        logits = [reader.logits(episodes.obs(i)) for i in rest]
        for margin in MARGINS:
            f1 = score(true, [reader.starts(x, margin) for x in logits])["f1"]
            tried[power, margin] = f1
    power, margin = max(tried, key=tried.get)
    projector.standardise(episodes, power)
    reader = Reader(copy.deepcopy(projector), texts)
    reader.margin, reader.f1 = margin, tried[power, margin]
    return reader


class Encoder(nn.Module):
    def __init__(self, lm, obs_dim, T, pretrained=False):
        """lm: a GPTNeoX; obs_dim: D; T: steps of a window. pretrained: start as the plain lm."""
        super().__init__()
        self.lm, self.T = lm, T
        self.projector = Projector(obs_dim, lm.config.hidden_size, T // 2)
        if pretrained:
            nn.init.zeros_(self.projector.dense_2.weight)
            nn.init.zeros_(self.projector.dense_2.bias)

    def forward(self, obs, input_tok):
        """Hidden states (B, T, d) of obs (B, T, D) and the tokens before each step (B, T)."""
        return self.lm.stack(self.lm.embed(input_tok) + self.projector(obs))

    @torch.no_grad()
    def annotate(self, obs, prev_token=None, noise=None):
        """Writes the stream of obs (B, N, D), numbers as in the data set, N steps of any number.

        prev_token (B,) comes before the first step, default END. noise (B, N) in [0, 1) draws each
        token from the encoder's distribution; without it the likeliest is written. Beyond T steps
        it writes in windows that start every T/2, each primed with the text of its first half.
        Returns tok (B, N) int64 and the probability of each of its tokens (B, N) float32.
        Raises ValueError for a wrong shape, and for NaN or Inf.
        """
        obs = torch.as_tensor(obs).to(self.projector.mean.device)
        D = len(self.projector.mean)
        if obs.dim() != 3 or obs.shape[2] != D:
            raise ValueError(f"obs has shape {tuple(obs.shape)}; (episodes, steps, {D}) is wanted")
        if not obs.isfinite().all():
            raise ValueError("obs has NaN or Inf")
        B, N, _ = obs.shape
        tok = obs.new_zeros(B, N, dtype=torch.int64)
        prob = obs.new_zeros(B, N, dtype=torch.float32)
        prev_token = tok.new_full((B,), END) if prev_token is None else prev_token
        half = self.T // 2
        for start in range(0, max(N - half, 1), half):
            window = slice(start, start + self.T)
            parts = [None if x is None else x[:, window] for x in (obs, tok, prob, noise)]
            before = tok[:, start - 1] if start else prev_token
            self.write_window(*parts, before, done=half if start else 0)
        return tok, prob

    def write_window(self, obs, tok, prob, noise, before, done):
        """Fills tok and prob of one window in place, from step `done` on. before (B,)."""
        seen = self.projector(obs)  # (B, n, d)
        cache = self.lm.new_cache(*obs.shape[:2])
        if done:
            first = torch.cat((before[:, None], tok[:, : done - 1]), 1)
            self.lm.stack(self.lm.embed(first) + seen[:, :done], cache=cache)
            before = tok[:, done - 1]
        for t in range(done, obs.shape[1]):
            x = self.lm.embed(before)[:, None] + seen[:, t : t + 1]
            p = self.next_token(x, cache)  # (B, V)
            before = p.argmax(-1) if noise is None else draw(p, noise[:, t])
            tok[:, t] = before
            prob[:, t] = p.gather(1, before[:, None])[:, 0]

    def next_token(self, x, cache):
        hidden = self.lm.stack(x, cache=cache)[:, 0]  # (B, 1, d) -> (B, d)
        return self.lm.embed_out(hidden).float().softmax(-1)  # (B, V)

    @torch.no_grad()
    def stream(self, observations):
        """annotate() while observations (B, D) still come: yields tok (B,) and prob (B,) of each.

        Every T/2 steps a cache starts; of the last two the older one writes, the younger is
        primed: constant cost and memory, the same text.
        """
        half, before, caches, recent = self.T // 2, None, [], []
        for t, obs in enumerate(observations):
            if before is None:
                before = torch.full((len(obs),), END, device=obs.device)
            if t % half == 0:
                caches = caches[-1:] + [(t, self.lm.new_cache(len(obs), 2 * half))]
            recent = recent[-self.projector.past :] + [obs]
            embedded, p = self.lm.embed(before)[:, None], []
            for start, cache in caches:  # a window sees nothing before its start
                window = torch.stack(recent[-(t - start + 1) :], 1)
                x = embedded + self.projector(window)[:, -1:]  # (B, 1, d)
                p.append(self.next_token(x, cache))
            prob, before = p[0].max(-1)
            yield before, prob

    def save_pretrained(self, folder):
        """config.json and model.safetensors as Pythia's, and projector.safetensors beside them."""
        self.lm.save_pretrained(folder)
        weights = tensors_of(self.projector)
        save_tensors(weights, Path(folder, "projector.safetensors"), {"T": str(self.T)})

    @classmethod
    def from_pretrained(cls, folder):
        """Reads what save_pretrained wrote. Raises FileNotFoundError or ValueError."""
        lm = GPTNeoX.from_pretrained(folder)
        path = Path(folder, "projector.safetensors")
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: not the encoder of a checkpoint")
        try:
            with safe_open(path, "pt") as file:
                weights = {name: file.get_tensor(name) for name in file.keys()}
                T = int(file.metadata()["T"])
            encoder = cls(lm, len(weights["mean"]), T)
            encoder.projector.load_state_dict(weights)
        except (SafetensorError, LookupError, TypeError, ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"{path}: garbled, or of another model ({reason})") from None
        return encoder


def draw(p, noise):
    """A token from each row of p (B, V), by inversion of noise (B,)."""
    tok = torch.searchsorted(p.cumsum(-1), noise[:, None].to(p.dtype).contiguous())
    return tok.clamp(max=p.shape[-1] - 1)[:, 0]
