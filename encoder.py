"""
The encoder: reads a stream of observations and answers each with any number of words.

    x_i      = embed(tok_{i-1}) + projector(obs)[step_i]     slot i of the text, at step_i
    hidden_i = GPT-NeoX(x)_i
    logits_i = embed_out(hidden_i)                           about tok_i

    encoder = Encoder.from_pretrained("out/crafter/step-000400/encoder")
    tok, step, prob = encoder.annotate(obs)                  # (B, N, D) -> (B, L) each
    for ids, probs in encoder.stream(observations): ...      # (D,) -> what is said at it, at once

A reader says the same from one step and linear evidence. It needs much less than an encoder: it is
fitted first, in seconds, reads the episodes that nobody annotated, and the encoder is trained on
what it read and starts from its evidence.
"""

import itertools
import json
import math
from collections import Counter, defaultdict
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from tqdm import tqdm

from data import END, SILENCE, Tokenizer, read_stream, score, spans
from model import GPTNeoX, find_checkpoint
from runtime import checkpoint
from runtime.dataset import Caption
from runtime.files import load_tensors, read_json, replace, save_tensors, tensors_of

MOST = 64  # tokens said at a step; then SILENCE is forced
FORMAT = "2"  # of a checkpoint: any number of tokens a step; without one, a token a step
CLIP = 3.0  # standard deviations
MIXTURES = 1500  # of dense features, at random
FEW = range(3, 25)  # values of a feature, with which each of them becomes a feature


def before(x):
    """The step before each of x (.., N, D); before the first the world stood still."""
    return torch.cat((x[..., :1, :], x[..., :-1, :]), -2)


def values_of(columns, known):
    """The values of each feature, columns (D, N), and of `known` ones of it, [] or D tensors."""
    pairs = zip(known or [torch.zeros(0)] * len(columns), columns, strict=True)
    # one more than is used tells that there are too many
    both = (torch.cat(pair) if len(pair[0]) < FEW.stop else pair[0] for pair in pairs)
    return [values.unique()[: FEW.stop] for values in both]


class Features(nn.Module):
    """What is seen of a step: its state and its change since the last, in deviations.

    Where single values tell, each value of a feature that has few, and whether it was just taken
    on. In `dense` observations, as a network's latents, the difference from the mean of `past`
    steps before instead, and the positive part of random mixtures (Rahimi & Recht 2008).
    """

    def __init__(self, obs_dim, dense=False, past=8, values=0):
        """obs_dim: D. past: at least 2. values: how many `measure` found, of a stored one."""
        super().__init__()
        self.past = max(past, 2)
        self.register_buffer("mean", torch.zeros(obs_dim))
        self.register_buffer("scale", torch.ones(obs_dim))  # 0 of what never moves
        self.register_buffer("column", torch.zeros(values, dtype=torch.int64))  # of each value
        self.register_buffer("value", torch.zeros(values))
        self.register_buffer("dense", torch.tensor(float(dense)))
        if dense:
            seed = torch.Generator().manual_seed(0)
            mix = torch.randn(3 * obs_dim, MIXTURES, generator=seed) / math.sqrt(3 * obs_dim)
            self.register_buffer("mix", mix)
            self.register_buffer("shift", 2 * torch.rand(MIXTURES, generator=seed) - 1)

    def measure(self, episodes, sample=60):
        """Mean, deviation and values of each feature, from some episodes, one at a time."""
        every = episodes[:: max(len(episodes) // sample, 1)]
        n, total, square, values = 0, 0, 0, []
        shift = episodes[0].obs.double().mean(0)  # or a large mean swallows the deviation
        for episode in every:
            x = episode.obs.double() - shift
            n += len(x)
            total = total + x.sum(0)
            square = square + x.square().sum(0)
            values = [] if self.dense else values_of(episode.obs.float().T, values)

        std = (square / n - (total / n).square()).clamp(min=0).sqrt()
        self.mean.copy_(shift + total / n)
        self.scale.copy_((std > 0) / std.clamp(min=1e-2))
        if not self.dense:
            few = [(j, v) for j, v in enumerate(values) if len(v) in FEW]
            self.column = torch.tensor([j for j, v in few for _ in v], dtype=torch.int64)
            self.value = torch.cat([v for _, v in few]) if few else torch.zeros(0)
        return self

    def size(self):
        """F, the number of features of a step."""
        if self.dense:
            return 3 * len(self.mean) + MIXTURES
        return 2 * (len(self.mean) + len(self.value))

    def forward(self, obs):  # (.., N, D) -> (.., N, F)
        x = obs.to(self.mean.dtype)
        change = x - before(x)

        def deviations(y):
            return (y * self.scale).clamp(-CLIP, CLIP)

        parts = [deviations(x - self.mean), deviations(change)]
        if self.dense:
            still = x[..., :1, :].expand(*x.shape[:-2], self.past, -1)
            earlier = torch.cat((still, x[..., :-1, :]), -2).unfold(-2, self.past, 1).mean(-1)
            parts.append(deviations(x - earlier))
            parts.append((torch.cat(parts, -1) @ self.mix + self.shift).clamp(min=0))
        else:
            now = (x[..., self.column] == self.value).to(x.dtype)
            parts += [now, (now - before(now)).clamp(min=0)]
        return torch.cat(parts, -1)


def stored_features(weights, past):
    """Features as large as those among stored weights {name: tensor}."""
    D, values = (len(weights[f"features.{name}"]) for name in ("mean", "value"))
    return Features(D, bool(weights["features.dense"]), past, values)


class Projector(nn.Module):
    """Observations -> embeddings: two layers over their features."""

    def __init__(self, features, d, width=256):
        super().__init__()
        self.features = features
        self.dense_1 = nn.Linear(features.size(), width)
        self.dense_2 = nn.Linear(width, d)

    @torch.no_grad()
    def start_from(self, reader):
        """Its first hidden units are the reader's evidence for kinds and words."""
        weights = torch.cat((reader.starts, reader.words))[: len(self.dense_1.weight)]
        self.dense_1.weight[: len(weights)] = weights

    def forward(self, obs, steps=slice(None)):  # (B, N, D) -> (B, n, d), of N steps those asked for
        features = self.features(obs)[:, steps]
        return self.dense_2(F.gelu(self.dense_1(features)))


# -----------------------------------------------------------------------------
# the reader: what text makes likely x what the observations tell

KINDS = 200  # at most
ORDER = 5  # tokens before one, that tell of it
ROWS = 6000  # annotated steps with a caption, and as many without, that are learned from
UNKNOWN = -8.0  # evidence for words that no annotated caption has


class Prior:
    """log P(next token | the last ORDER) from texts, smoothed by what came after fewer of them, and
    anywhere (Witten & Bell 1991)."""

    def __init__(self, texts):
        """texts: lists of ids."""
        self.words = sorted({token for ids in texts for token in ids})
        self.place = {token: n for n, token in enumerate(self.words)}
        after = defaultdict(Counter)
        for ids in texts:
            for k, token in enumerate(ids):
                for context in self.contexts(ids[:k]):
                    after[context][self.place[token]] += 1
        self.counts = {
            context: (torch.tensor(list(n)), torch.tensor(list(n.values())))
            for context, n in after.items()
        }

    def contexts(self, ids):
        return [tuple(ids[len(ids) - n :]) for n in range(min(ORDER, len(ids)) + 1)]

    def __call__(self, ids, left_out=None):
        """Over `words`; left_out: the next token, counted once less, for its own text shows it."""
        p = torch.full((len(self.words),), 1e-4 / len(self.words))
        for context in self.contexts(ids):
            if context in self.counts:
                tokens, counts = self.counts[context]
                if left_out is not None:
                    counts = counts - (tokens == self.place[left_out]).long()
                n = counts.sum()
                smoothed = (n + 0.5 * (counts > 0).sum()).clamp(min=0.5)
                p *= 1 - n / smoothed
                p[tokens] += counts / smoothed
        return p.log()


def dense_weights(X, target, offset, classes, penalty=0.003):
    """argmin over W of cross-entropy(offset + X W^T, target) + penalty / 2 |W|^2."""
    W = torch.zeros(classes, X.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([W], max_iter=60, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(offset + X @ W.T, target) + penalty / 2 * W.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return W.detach()


def sparse_weights(X, target, offset, classes, penalty=0.06, rounds=6, most=400):
    """argmin over W of cross-entropy(offset + X W^T, target) + penalty * (the largest gradient at
    0) * |W|_1, on the features that matter: each round takes in some more."""
    W, label = torch.zeros(classes, X.shape[1]), F.one_hot(target, classes).float()
    active, threshold = torch.zeros(X.shape[1], dtype=torch.bool), None
    for _ in range(rounds):
        p = (offset + X[:, active] @ W[:, active].T).softmax(-1)
        gradient = ((p - label).T @ X / len(X)).abs().amax(0)  # (F,)
        threshold = penalty * gradient.max() if threshold is None else threshold
        gradient[active] = 0
        largest = gradient.topk(min(most, len(gradient))).indices
        more = largest[gradient[largest] > 1.02 * threshold]
        if not len(more):
            break
        active[more] = True
        W[:, active] = fista(X[:, active], label, offset, threshold, W[:, active], 50)
    if active.any():  # none, where nothing is ever said
        W[:, active] = fista(X[:, active], label, offset, threshold, W[:, active], 400)
    return W


def fista(X, label, offset, threshold, W, updates):
    """Beck & Teboulle 2009, from W (classes, F) on."""
    step = len(X) / (0.5 * torch.linalg.matrix_norm(X, 2) ** 2)
    ahead, t = W.clone(), 1.0
    for _ in range(updates):
        gradient = ((offset + X @ ahead.T).softmax(-1) - label).T @ X / len(X)
        new = F.softshrink(ahead - step * gradient, float(step * threshold))
        t_new = (1 + math.sqrt(1 + 4 * t * t)) / 2
        ahead = new + (t - 1) / t_new * (new - W)
        W, t = new, t_new
    return W


def answers(captions, tokenizer):
    """{step: all that is said at it, its captions' tokens and ENDs, and SILENCE}."""
    said = defaultdict(list)
    for caption in sorted(captions, key=lambda caption: caption.start):
        said[caption.start] += [*tokenizer.encode(caption.text), END]
    return {step: (*ids, SILENCE) for step, ids in said.items()}


def kinds_of(texts, shared):
    """{text: its kind}: the longest beginning that `shared` of the texts (tuples of ids) have, its
    first token at least. At most KINDS kinds, or more have to share one."""
    count = Counter(ids[:k] for ids in texts for k in range(1, len(ids) + 1))
    kinds = {}
    for ids in texts:
        lengths = [k for k in range(2, len(ids) + 1) if count[ids[:k]] >= shared]
        kinds[ids] = ids[: max(lengths, default=1)]
    fits = len(set(kinds.values())) <= KINDS or shared > len(texts)
    return kinds if fits else kinds_of(texts, 2 * shared)


class Reader(nn.Module):
    """What a step is answered with: first which kind of text, or silence, then word after word.

    A kind is told by evidence of its own. The words that go on are a product: what the text so far
    makes likely, of all text that is known, x what the observations tell of each word, whatever
    stands before it. So "north", learned of wood, serves iron, and what nobody annotated is said.
    """

    def __init__(self, features, tokenizer, dense, shared):
        """dense: whether all features may tell, or few. shared: texts that make a kind."""
        super().__init__()
        self.features, self.tokenizer = features, tokenizer
        self.dense, self.shared, self.moment, self.f1 = dense, shared, MOMENTS[0], 0.0
        self.train_text = []  # the captions of each training episode, once it has read them
        for name in ("offset", "starts", "told", "words"):
            self.register_buffer(name, None)

    def __str__(self):
        how = "all features" if self.dense else "few features"
        kinds = f"{len(self.kinds)} kinds of captions, {len(self.told)} words that go on"
        return f"{self.features.size()} features, {how} tell, {kinds}"

    def fit(self, episodes, annotated, text):
        """text: answers (tuples of ids) of episodes without observations."""
        X, said, going = self.rows(episodes, annotated)  # (n, F), n answers
        own = [ids for ids in said if ids]
        kinds = kinds_of(own, self.shared)
        self.kinds, self.texts = sorted(set(kinds.values())), [*own, *text]
        self.prior = Prior(self.texts)
        self.pauses = shortest_pauses(episodes, annotated, self.tokenizer)
        scale = 1 / (X.std(0) + 0.05)
        X *= scale
        self.starts = self.evidence_of_kinds(X, said, going, kinds) * scale  # (C+1, F)
        self.words = self.evidence_of_words(X, said, kinds) * scale  # (W, F)
        return self

    def evidence_of_kinds(self, X, said, going, kinds):
        """Weights (C+1, F) of each kind and of silence, and `offset`, with which they go."""
        C = len(self.kinds)
        number = {kind: n for n, kind in enumerate(self.kinds)}
        target = torch.tensor([number[kinds[ids]] if ids else C for ids in said])
        share = torch.bincount(target, minlength=C + 1) / len(target)
        self.offset = share.clamp(min=1e-6).log()

        # whether what is going on happens again, nobody said
        offset = self.offset.repeat(len(said), 1)
        for n, ongoing in enumerate(going):
            again = [number[kinds[ids]] for ids in ongoing if ids in kinds]
            offset[n, [kind for kind in again if kind != target[n]]] = -math.inf

        self.offset[C] += self.left_out.log()
        weights = dense_weights if self.dense else sparse_weights
        return weights(X, target, offset, C + 1)

    def evidence_of_words(self, X, said, kinds):
        """Weights (W, F) of the W words that go on after a kind, which are `told`."""
        row, word, prior = [], [], []
        for n, ids in enumerate(said):
            for k in range(len(kinds[ids]), len(ids)) if ids else ():
                row.append(n)
                word.append(self.prior.place[ids[k]])
                prior.append(self.prior(ids[:k], left_out=ids[k]))
        self.told = torch.tensor(sorted(set(word)), dtype=torch.int64)
        if not row:
            return torch.zeros(0, X.shape[1])

        # what text knows already is held fixed: evidence learns only what it does not
        prior = torch.stack(prior)[:, self.told]
        target = torch.searchsorted(self.told, torch.tensor(word))
        return sparse_weights(X[row], target, prior, len(self.told), penalty=0.1)

    def rows(self, episodes, annotated):
        """Features of at most ROWS annotated steps with a caption and as many without, (n, F), and
        their answers, () of those without, and the answers that go on there since an earlier step;
        `left_out`: how much rarer those without were made."""
        said, going, steps = {}, defaultdict(list), []
        for i in annotated:
            captions = episodes[i].known_captions
            steps += [(i, t) for t in episodes[i].known.nonzero()[0].tolist()]
            said |= {(i, t): ids for t, ids in answers(captions, self.tokenizer).items()}
            for caption in captions:
                for t in range(caption.start + 1, caption.end):
                    going[i, t].append(said[i, caption.start])

        # of few episodes, what goes on would pass for silence of all else
        few = len(annotated) < FOLDS
        silent = [step for step in steps if step not in said and not (few and step in going)]
        spoken, silent_some = (x[:: -(-len(x) // ROWS) or 1] for x in (sorted(said), silent))
        shares = [len(a) / max(len(b), 1) for a, b in ((spoken, said), (silent_some, silent))]
        self.left_out = torch.tensor((shares[0] or 1.0) / (shares[1] or 1.0))

        chosen, X = sorted(spoken + silent_some), []
        for i, group in itertools.groupby(chosen, lambda step: step[0]):
            X.append(self.features(episodes[i].obs)[[t for _, t in group]])
        return torch.cat(X), [said.get(s, ()) for s in chosen], [going.get(s, ()) for s in chosen]

    def logits(self, obs):
        """obs (N, D) -> of each kind and of silence (N, C+1), evidence of words (N, W)."""
        X = self.features(obs)
        return self.offset + X @ self.starts.T, X @ self.words.T

    def captions(self, obs):  # (N, D) -> [Caption, ..]
        return self.write(*self.logits(obs), self.moment)

    def write(self, logits, evidence, moment, spelled=None):
        """moment: reach and threshold. What begins alike within a pause is said once.
        spelled: {(step, kind): ids} of other moments of the same."""
        captions, latest, spelled = [], {}, {} if spelled is None else spelled
        for t, kind in sorted(moments(logits, *moment)):
            if (t, kind) not in spelled:
                spelled[t, kind] = self.spell(self.kinds[kind], evidence[t])
            ids = spelled[t, kind]
            for first, last in spans(ids):
                begins = tuple(ids[first : first + 2])
                if t - latest.get(begins, -math.inf) > self.pauses.get(begins, PAUSE):
                    captions.append(Caption(t, t + 1, self.tokenizer.decode(ids[first:last])))
                latest[begins] = t
        return captions

    def spell(self, kind, evidence):
        """The likeliest words after a kind, one by one; evidence (W,)."""
        ids = list(kind)
        while ids[-1] != SILENCE and len(ids) < MOST:
            score = self.prior(ids) + UNKNOWN
            score[self.told] += evidence - UNKNOWN
            ids.append(self.prior.words[int(score.argmax())])
        return ids

    def save_pretrained(self, folder):
        """reader.safetensors: features and evidence, all else in its metadata; train_text.json."""
        names = "dense shared moment f1 kinds texts".split()
        about = {name: getattr(self, name) for name in names}
        about |= dict(past=self.features.past, pauses=list(self.pauses.items()))
        Path(folder).mkdir(parents=True, exist_ok=True)
        path = Path(folder, "reader.safetensors")
        save_tensors(tensors_of(self), path, {"about": json.dumps(about)})
        text = json.dumps(self.train_text)
        replace(Path(folder, "train_text.json"), lambda beside: beside.write_text(text))

    @classmethod
    def from_pretrained(cls, folder, tokenizer):
        """Reads what save_pretrained wrote."""
        weights, about = load_tensors(Path(folder, "reader.safetensors"))
        about = json.loads(about["about"])
        features = stored_features(weights, about["past"])
        reader = cls(features, tokenizer, about["dense"], about["shared"])
        for name in ("offset", "starts", "told", "words"):
            setattr(reader, name, weights[name])
        reader.load_state_dict(weights)
        reader.moment, reader.f1 = about["moment"], about["f1"]
        reader.kinds, reader.texts = (list(map(tuple, about[x])) for x in ("kinds", "texts"))
        reader.pauses = {tuple(begins): steps for begins, steps in about["pauses"]}
        reader.prior = Prior(reader.texts)
        read = Path(folder, "train_text.json")
        read = read_json(read, list) if read.exists() else []
        reader.train_text = [[Caption(*caption) for caption in captions] for captions in read]
        return reader


def moments(logits, reach, threshold):
    """[(step, kind), ..] where a kind starts with that probability within `reach` steps, likeliest
    first. What one explains counts for no other: all at its step, its kind within reach."""
    p, said = logits.softmax(-1)[:, :-1].T.contiguous(), []  # (C, N)
    N = p.shape[1]

    def nearby(first, last):
        """Sums of p within reach of the steps first .. last."""
        beyond = max(reach - first, 0), max(last + reach - N, 0)
        around = F.pad(p[:, max(first - reach, 0) : last + reach], beyond)
        return around.unfold(1, 2 * reach + 1, 1).sum(-1)

    near = nearby(0, N)  # (C, N)
    while near.numel():
        kind, t = divmod(int(near.argmax()), N)
        if near[kind, t] < threshold:
            break
        first = max(t - reach, 0)
        t = first + int(p[kind, first : t + reach + 1].argmax())
        said.append((t, kind))
        p[:, t] = 0
        p[kind, max(t - reach, 0) : t + reach + 1] = 0
        first, last = max(t - 2 * reach, 0), min(t + 2 * reach + 1, N)
        near[:, first:last] = nearby(first, last)
    return said


PAUSE = 7  # steps in which what begins alike is one caption, unless annotators repeat it sooner


def shortest_pauses(episodes, annotated, tokenizer):
    """{first two tokens: steps between the nearest captions that begin so}, at most PAUSE."""
    pauses = {}
    for i in annotated:
        latest = {}
        for caption in sorted(episodes[i].known_captions):
            begins = (*tokenizer.encode(caption.text), END)[:2]
            between = caption.start - latest.get(begins, -math.inf) - 1
            pauses[begins] = min(pauses.get(begins, PAUSE), max(between, 0))
            latest[begins] = caption.start
    return pauses


EVIDENCE = (False, False), (False, True), (True, True)  # features of a dense kind; dense weights
SHARED = 1, 3, 10**9  # texts that make a kind: closed list .. first words
MOMENTS = (1, 0.1), (0, 0.1), (1, 0.03), (1, 0.2), (3, 0.1), (3, 0.2), (3, 0.3)  # reach, threshold
FOLDS = 4


def shared_by_few(own, text):
    """One of SHARED, where too few annotated episodes say `own`, a set of answers, to try them:
    a closed list, or first words where their words in new order are an eighth of the text."""
    words = {token for ids in own for token in ids}
    new = [ids for ids in text if ids not in own and words.issuperset(ids)]
    return SHARED[-1] if 8 * len(new) > len(text) else SHARED[0]


def at_all_moments(reader, episode):
    """{moment: what the reader says of an episode's annotated steps}."""
    logits, known, spelled = reader.logits(episode.obs), episode.known, {}
    written = {moment: reader.write(*logits, moment, spelled) for moment in MOMENTS}
    return {moment: [c for c in of if known[c.start]] for moment, of in written.items()}


class Trials:
    """Readers of a part of the annotated episodes, and how well each says what is in the rest."""

    def __init__(self, episodes, annotated, tokenizer, text, past):
        self.episodes, self.annotated, self.text = episodes, annotated, text
        self.tokenizer, self.past = tokenizer, past
        self.features = {}  # {whether they are dense: Features}
        self.f1 = {}  # {(evidence, shared, moment): caption F1}
        n = min(len(annotated), FOLDS)
        folds = [annotated[k::n] for k in range(n)] if n > 1 else [[]]
        self.folds = folds if len(annotated) <= 16 else [annotated[1::2]]
        self.bar = tqdm(desc="trying readers", unit=" fits", leave=False, disable=None)

    def fitted(self, evidence, shared, annotated):
        (dense, dense_evidence), D = evidence, self.episodes.meta["obs_dim"]
        if dense not in self.features:
            self.features[dense] = Features(D, dense, self.past).measure(self.episodes)
        reader = Reader(self.features[dense], self.tokenizer, dense_evidence, shared)
        self.bar.update()
        return reader.fit(self.episodes, annotated, self.text)

    def add(self, evidence, shared):
        """F1 at all moments."""
        if (evidence, shared, MOMENTS[0]) in self.f1:
            return
        true, written = [], defaultdict(list)
        for fold in self.folds:
            others = [i for i in self.annotated if i not in fold]
            reader = self.fitted(evidence, shared, others)
            for i in fold or self.annotated:
                true.append(self.episodes[i].known_captions)
                for moment, captions in at_all_moments(reader, self.episodes[i]).items():
                    written[moment].append(captions)
        for moment in MOMENTS:
            self.f1[evidence, shared, moment] = score(true, written[moment])["f1"]

    def best(self):
        """The first of those that are as good but for chance."""
        n = sum(len(self.episodes[i].known_captions) for i in self.annotated)
        good = max(self.f1.values()) - 0.25 / math.sqrt(n)  # half a standard error
        return next(choice for choice, f1 in self.f1.items() if f1 >= good)


def choose_reader(episodes, annotated, tokenizer, text, past=8):
    """A reader of the annotated episodes. Evidence, kinds and moments are those with which a reader
    of a part says best what is in the rest, by caption F1, which `f1` keeps.

    text: captions of episodes without observations, a list of lists of Captions. past: steps that
    dense features look back, half a window, or the encoder does not see them.
    """
    text = [ids for captions in text for ids in answers(captions, tokenizer).values()]
    trials = Trials(episodes, annotated, tokenizer, text, past)
    if len(annotated) < FOLDS:  # a part of so few tells nothing
        said = [answers(episodes[i].known_captions, tokenizer).values() for i in annotated]
        choice = EVIDENCE[0], shared_by_few(set().union(*said), text), MOMENTS[1]
        trials.add(*choice[:2])
    else:
        for shared in SHARED:
            trials.add(EVIDENCE[0], shared)
        for evidence in EVIDENCE[1:]:
            trials.add(evidence, trials.best()[1])
        for shared in SHARED:
            trials.add(trials.best()[0], shared)
        choice = trials.best()
    reader = trials.fitted(*choice[:2], annotated)
    trials.bar.close()
    reader.moment, reader.f1, reader.tried = choice[2], trials.f1[choice], trials.f1
    return reader


class Encoder(nn.Module):
    def __init__(self, lm, features, T, pretrained=False):
        """lm: a GPTNeoX; features: of D numbers; T: steps of a window. pretrained: start as the
        plain lm."""
        super().__init__()
        self.lm, self.T = lm, T
        self.projector = Projector(features, lm.config.hidden_size)
        if pretrained:
            nn.init.zeros_(self.projector.dense_2.weight)
            nn.init.zeros_(self.projector.dense_2.bias)

    @property
    def obs_dim(self):
        return len(self.projector.features.mean)

    @property
    def device(self):
        return self.projector.features.mean.device

    def forward(self, obs, input_tok, step):
        """Hidden states (B, L, d) of the slots at `step` (B, L) of obs (B, T, D), given the token
        before each, input_tok (B, L)."""
        assert step.shape == input_tok.shape and len(obs) == len(step)
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
        obs, D = torch.as_tensor(obs).to(self.device), self.obs_dim
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
            x = self.lm.embed(tok) + seen[each[:, None], t]  # (B, n, d)
            p = self.next_token(self.lm.stack(x, cache=cache))  # (B, V)
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

    def next_token(self, hidden):
        """hidden (B, n, d) of slots -> probabilities (B, V) of the token at the last one."""
        return self.lm.embed_out(hidden[:, -1]).float().softmax(-1)

    @torch.no_grad()
    def stream(self, observations):
        """annotate() while the observations (D,) of one episode still come: yields what is said at
        each, a list of tokens, the last of them SILENCE, and of their probabilities.

        Every T/2 steps a cache starts; of the last two the older one writes, the younger is
        primed: constant cost and memory, the same text.
        """
        half, caches, recent = self.T // 2, [], []
        for t, obs in enumerate(observations):
            recent = recent[-self.projector.features.past :] + [obs]
            if t % half == 0:
                caches = caches[-1:] + [(t, self.lm.new_cache(1))]
            # a window sees nothing before its start
            windows = [torch.stack(recent[-(t - start + 1) :])[None] for start, _ in caches]
            seen = [self.projector(window, slice(-1, None)) for window in windows]  # (1, 1, d)
            ids, probs, before = [], [], SILENCE
            while before != SILENCE or not ids:
                embedded = self.lm.embed(torch.tensor([[before]], device=obs.device))
                both = zip(seen, caches, strict=True)
                hidden, *_ = [self.lm.stack(embedded + x, cache=cache) for x, (_, cache) in both]
                [p] = self.next_token(hidden)
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
    def from_pretrained(cls, name_or_dir):
        """Reads what save_pretrained wrote, alone or in a checkpoint; as GPTNeoX's."""
        folder = find_checkpoint(name_or_dir, "encoder")
        lm = GPTNeoX.from_pretrained(folder)
        path = Path(folder, "projector.safetensors")
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: not the encoder of a checkpoint")
        try:
            weights, about = load_tensors(path)
            if about.get("format") != FORMAT:
                raise ValueError("it writes another kind of stream: train it anew")
            T = int(about["T"])
            encoder = cls(lm, stored_features(weights, T // 2), T)
            encoder.projector.load_state_dict(weights)
        except (SafetensorError, LookupError, TypeError, ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"{path}: garbled, or of another model ({reason})") from None
        return encoder


def load(out_dir, device="cpu"):
    """Encoder, tokenizer, folder and settings of a run's best checkpoint. Raises ValueError."""
    folder, config = checkpoint.open_best(out_dir)
    encoder = Encoder.from_pretrained(folder / "encoder").to(device)
    return encoder, Tokenizer.from_file(folder / "tokenizer.json"), folder, config


TOGETHER = 2**26  # numbers of observations that are written at once


def written_captions(encoder, observations, tokenizer, longest=1):
    """What an encoder writes on each obs (N, D) of an iterable, N at most `longest`."""
    rows = min(max(TOGETHER // (longest * encoder.obs_dim), 1), 64)
    written, observations = [], iter(observations)
    while some := list(itertools.islice(observations, rows)):
        tok, step, _ = encoder.annotate(nn.utils.rnn.pad_sequence(some, batch_first=True))
        for obs, *slots in zip(some, tok.cpu(), step.cpu(), strict=True):
            captions = read_stream(*slots, tokenizer)
            written.append([caption for caption in captions if caption.start < len(obs)])
    return written


def draw(p, noise):
    """A token from each row of p (B, V), by inversion of noise (B,)."""
    tok = torch.searchsorted(p.cumsum(-1), noise[:, None].to(p.dtype).contiguous())
    return tok.clamp(max=p.shape[-1] - 1)[:, 0]
