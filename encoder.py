"""
The encoder: reads a stream of observations and answers each with any number of words.

    x_i      = embed(tok_{i-1}) + projector(obs)[step_i]     slot i of the text, at step_i
    hidden_i = GPT-NeoX(x)_i
    logits_i = embed_out(hidden_i)                           about tok_i

    encoder = Encoder.from_pretrained("out/crafter/step-000400/encoder")
    tok, step, prob = encoder.annotate(obs)                  # (B, N, D) -> (B, L) each
    for ids, probs in encoder.stream(observations): ...      # (D,) -> what is said at it, at once

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

from data import SILENCE, Caption, read_stream, score
from model import GPTNeoX
from runtime.files import save_tensors, tensors_of

MOST = 64  # tokens said at a step; then SILENCE is forced
FORMAT = "2"  # of a checkpoint: any number of tokens a step; without one, a token a step
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

    def forward(self, obs, input_tok, step):
        """Hidden states (B, L, d) of the slots at `step` (B, L) of obs (B, T, D), given the token
        before each, input_tok (B, L)."""
        seen = self.projector(obs)  # (B, T, d)
        seen = seen.gather(1, step[..., None].expand(-1, -1, seen.shape[-1]))  # (B, L, d)
        return self.lm.stack(self.lm.embed(input_tok) + seen)

    @torch.no_grad()
    def annotate(self, obs, noise=None):
        """Writes the stream of obs (B, N, D), numbers as in the data set, N steps of any number.

        At most MOST tokens a step. noise (B, L) in [0, 1), for N <= T, draws each token from the
        encoder's distribution and ends the text after L slots; without it the likeliest is written.
        Beyond T steps it writes in windows that start every T/2, each primed with the text of its
        first half.
        Returns tok (B, L) int64, the step of each token, step (B, L) int64, and its probability,
        prob (B, L) float32; rows that end before L are padded with SILENCE at step N.
        Raises ValueError for a wrong shape, and for NaN or Inf.
        """
        obs = torch.as_tensor(obs).to(self.projector.mean.device)
        D = len(self.projector.mean)
        if obs.dim() != 3 or obs.shape[2] != D:
            raise ValueError(f"obs has shape {tuple(obs.shape)}; (episodes, steps, {D}) is wanted")
        if not obs.isfinite().all():
            raise ValueError("obs has NaN or Inf")
        N, half = obs.shape[1], self.T // 2
        rows = [[] for _ in obs]  # of (token, step, probability)
        for start in range(0, max(N - half, 1), half):
            self.write_window(obs[:, start : start + 2 * half], start, rows, noise)
        padding = SILENCE, N, 1.0
        L = max(map(len, rows))
        slots = [list(zip(*row, *[padding] * (L - len(row)), strict=True)) for row in rows]
        tok, step, prob = zip(*slots, strict=True)
        tok, step = (torch.tensor(x, device=obs.device) for x in (tok, step))
        return tok, step, torch.tensor(prob, device=obs.device)

    def write_window(self, obs, start, rows, noise):
        """Adds to each row its slots in a window obs (B, n, D) from step `start` of the episode on.

        The rows' slots stand side by side, each at a step of its own. Text that a row has already
        primes it: as many slots as all rows have at once, the others one by one.
        """
        seen, cache = self.projector(obs), self.lm.new_cache(len(obs))  # (B, n, d)
        B, n, _ = seen.shape
        done = self.T // 2 if start else 0  # steps that are written
        primed = [[slot for slot in row if slot[1] >= start] for row in rows]
        before = [[SILENCE, *(token for token, *_ in slots)] for slots in primed]
        step = [[t - start for _, t, _ in slots] + [done] for slots in primed]
        spoken, fed = [0] * B, 0  # tokens since a row's last SILENCE; slots
        each = torch.arange(B, device=obs.device)
        while min(t[-1] for t in step) < n and (noise is None or fed < noise.shape[1]):
            new = slice(fed, max(fed + 1, min(map(len, before))))
            fed = new.stop
            tok = torch.tensor([row[new] for row in before], device=obs.device)
            t = torch.tensor([row[new] for row in step], device=obs.device).clamp(max=n - 1)
            p = self.next_token(self.lm.embed(tok) + seen[each[:, None], t], cache)  # (B, V)
            chosen = p.argmax(-1) if noise is None else draw(p, noise[:, fed - 1])
            silent = [t[-1] >= n or words == MOST for t, words in zip(step, spoken, strict=True)]
            chosen = chosen.masked_fill(torch.tensor(silent, device=obs.device), SILENCE)
            prob = p[each, chosen].tolist()
            for b, token in enumerate(chosen.tolist()):
                if len(before[b]) > fed:
                    continue  # it is primed with more
                if step[b][-1] < n:
                    rows[b].append((token, start + step[b][-1], prob[b]))
                before[b].append(token)
                step[b].append(step[b][-1] + (token == SILENCE))
                spoken[b] = 0 if token == SILENCE else spoken[b] + 1

    def next_token(self, x, cache):
        """Probabilities (B, V) of the token after the slots x (B, n, d)."""
        hidden = self.lm.stack(x, cache=cache)[:, -1]  # (B, d)
        return self.lm.embed_out(hidden).float().softmax(-1)

    @torch.no_grad()
    def stream(self, observations):
        """annotate() while the observations (D,) of one episode still come: yields what is said at
        each, a list of tokens, the last of them SILENCE, and of their probabilities.

        Every T/2 steps a cache starts; of the last two the older one writes, the younger is
        primed: constant cost and memory, the same text.
        """
        half, caches, recent = self.T // 2, [], []
        for t, obs in enumerate(observations):
            recent = recent[-self.projector.past :] + [obs]
            if t % half == 0:
                caches = caches[-1:] + [(t, self.lm.new_cache(1))]
            # a window sees nothing before its start
            windows = [torch.stack(recent[-(t - start + 1) :])[None] for start, _ in caches]
            seen = [self.projector(window)[:, -1:] for window in windows]  # (1, 1, d) each
            ids, probs, before = [], [], SILENCE
            while before != SILENCE or not ids:
                embedded = self.lm.embed(torch.tensor([[before]], device=obs.device))
                both = zip(seen, caches, strict=True)
                p, *_ = [self.next_token(embedded + x, cache)[0] for x, (_, cache) in both]
                before = SILENCE if len(ids) == MOST else int(p.argmax())
                ids.append(before)
                probs.append(p[before].item())
            yield ids, probs

    def save_pretrained(self, folder):
        """config.json and model.safetensors as Pythia's, and projector.safetensors beside them."""
        self.lm.save_pretrained(folder)
        weights = tensors_of(self.projector)
        about = {"T": str(self.T), "format": FORMAT}
        save_tensors(weights, Path(folder, "projector.safetensors"), about)

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
                about = file.metadata()
            if about.get("format") != FORMAT:
                raise ValueError("it writes another kind of stream: train it anew")
            T = int(about["T"])
            encoder = cls(lm, len(weights["mean"]), T)
            encoder.projector.load_state_dict(weights)
        except (SafetensorError, LookupError, TypeError, ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"{path}: garbled, or of another model ({reason})") from None
        return encoder


def written_captions(encoder, observations, tokenizer, rows=64):
    """What an encoder writes on each of a list of obs (N, D), so many at a time."""
    written = []
    for first in range(0, len(observations), rows):
        some = observations[first : first + rows]
        tok, step, _ = encoder.annotate(nn.utils.rnn.pad_sequence(some, batch_first=True))
        for obs, *slots in zip(some, tok.cpu(), step.cpu(), strict=True):
            captions = read_stream(*slots, tokenizer)
            written.append([caption for caption in captions if caption.start < len(obs)])
    return written


def draw(p, noise):
    """A token from each row of p (B, V), by inversion of noise (B,)."""
    tok = torch.searchsorted(p.cumsum(-1), noise[:, None].to(p.dtype).contiguous())
    return tok.clamp(max=p.shape[-1] - 1)[:, 0]
