"""
Prints the grounded captions of an episode beside the true ones, and what the predictor expects.

    python sample.py out/mine --episode=3              an episode of the test split
    python sample.py --episode=all --json              a JSON object per written caption of a split
    python -m scripts.page out/mine                    pages to look at in a browser

A line per caption: when, true caption, written caption, the encoder's confidence (its least sure
token), and what the predictor expects in the next K tokens: "+3 place table" is three steps on.
Times are seconds where the data set says how many steps a second has.
"""

from configurator import check_range, configure, run
import difflib
from json import dumps
from unicodedata import normalize

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from data import SILENCE, match, read_stream, spans
from encoder import load
from runtime.dataset import Episodes
from runtime.distributed import pick_device
from train import Predictor

out_dir = "out/crafter"  # the run to load
data = ""  # folder of a data set; '': the run's
split = "test"  # which of its splits
episode = "0"  # which episode: its name or its number; 'all'
min_prob = 0.0  # captions with a less sure token are left out
json = False  # a JSON object per written caption instead of text
device = "auto"  # 'auto' | 'cpu' | 'cuda' | 'mps'


def predictor_of(folder, config, device):
    """The predictor of a checkpoint; None where it was not trained."""
    if config.get("predict_weight") == 0:
        return None
    return Predictor.from_pretrained(folder / "predictor").to(device)  # stride 1


def number_of(source, split, name):
    """The number of an episode of a split, given by its name or number."""
    name = normalize("NFC", name)  # é is one character or two
    names = [normalize("NFC", episode.id) for episode in source]
    if name in names:
        return names.index(name)
    if name in map(str, range(len(names))):
        return int(name)
    [nearest] = difflib.get_close_matches(name, names, 1, 0.0)
    hint = f"it has 0 .. {len(names) - 1}, or a name, as {nearest!r}"
    for other in source.meta["splits"]:
        if name in [episode.id for episode in Episodes(source.folder, other)]:
            hint = f"it is in --split={other}"
    raise ValueError(f"--episode={name}: not in the split {split}; {hint}")


def timestamp(step, rate):
    """A number of steps as the data set gives time: in seconds where it has a rate."""
    return step / rate if rate else step


def ahead_cache(L):
    """Attention of a layer under train.ahead_mask: L rows, then a row of each block at a time."""
    keys, values, masks = [], [], [torch.ones(L, L, dtype=torch.bool).tril()]

    def attend(q, k, v):  # (B, H, L, hs)
        keys.append(k)
        values.append(v)
        mask = torch.cat(masks, 1)  # (L, n L)
        masks.append(torch.eye(L, dtype=torch.bool))  # a block sees itself
        k, v = torch.cat(keys, 2), torch.cat(values, 2)
        return F.scaled_dot_product_attention(q, k, v, mask.to(q.device))

    return attend


def look_ahead(encoder, predictor, obs, tok, step):
    """The likeliest K tokens after each slot of windows, and how likely: (B, L, K) each.
    obs (B, T, D), tok and step (B, L)."""
    lm = predictor.lm
    before = F.pad(tok[:, :-1], (1, 0), value=SILENCE)  # (B, L)
    hidden = encoder(obs, before, step)
    pos = torch.arange(tok.shape[1], device=tok.device)
    layers = [ahead_cache(len(pos)) for _ in lm.gpt_neox.layers]
    lm.stack(lm.embed(before) + predictor.condition(hidden), pos, cache=layers)
    ids, probs = [], []
    for ahead in range(1, predictor.K + 1):
        hidden = lm.stack(lm.embed(tok), pos + ahead, cache=layers)
        prob, tok = lm.embed_out(hidden).float().softmax(-1).max(-1)  # (B, L)
        ids.append(tok.cpu())
        probs.append(prob.cpu())
    return torch.stack(ids, -1), torch.stack(probs, -1)


def written_windows(obs, tok, step, half):
    """The windows in which annotate() wrote a stream: observations, tokens, their steps, and which
    slots are the last of a step that no window before it has."""
    N = len(obs)
    for start in range(0, max(N - half, 1), half):
        end = min(start + 2 * half, N)
        inside = (step >= start) & (step < end)
        said, at = tok[inside], step[inside] - start  # (l,)
        new = (said == SILENCE) & (at >= (half if start else 0))
        yield obs[start:end], said, at, new


@torch.no_grad()
def forecasts(encoder, predictor, obs, tok, step):
    """The likeliest K tokens after all that is said at each step, and how likely: (N, K).
    obs (1, N, D); its stream tok, step (1, L)."""
    windows = list(written_windows(obs[0], tok[0], step[0], encoder.T // 2))
    parts = []
    for first in range(0, len(windows), 8):  # so many are quicker at once
        group = zip(*windows[first : first + 8], strict=True)
        *inputs, new = (pad_sequence(x, batch_first=True) for x in group)
        parts.append([x[new.cpu()] for x in look_ahead(encoder, predictor, *inputs)])
    ids, probs = (torch.cat(part) for part in zip(*parts, strict=True))
    return ids, probs


def forecast_text(ids, tokenizer, rate):
    """A forecast (K,), made when a step had its answer, as text."""
    told = []
    for first, last in spans(ids):
        ahead = ids[:first].count(SILENCE) + 1
        text = tokenizer.decode(ids[first:last]).strip()
        told.append(f"+{timestamp(ahead, rate):.3g} {text}")
    return ", ".join(told)


def with_confidence(tok, step, prob, tokenizer):
    """The captions of a stream (L,), each with the probability of its least sure token."""
    captions = read_stream(tok, step, tokenizer)
    least = [prob[first:last].min().item() for first, last in spans(tok.tolist())]
    return [(caption, round(p, 3)) for caption, p in zip(captions, least, strict=True)]


def judge(episode, written):
    """All captions in order of time: dict(step, kind, text, true, written, sure). true, written:
    (start, end) or None. kind: 'hit', 'missed', 'false', or 'unknown' where nobody annotated.

    written: [(caption, how sure), ..].
    """
    confidence = {id(caption): sure for caption, sure in written}  # the same may stand there twice
    written, known = [caption for caption, _ in written], episode.known
    pairs = match(episode.captions, written)
    found = {id(caption) for pair in pairs for caption in pair}
    pairs += [(caption, None) for caption in episode.captions if id(caption) not in found]
    pairs += [(None, caption) for caption in written if id(caption) not in found]
    rows = []
    for true, said in pairs:
        step, _, text = said or true
        if true:
            kind = "hit" if said else "missed"
        else:
            kind = "false" if known[step] else "unknown"
        row = dict(step=step, kind=kind, text=text)
        row |= dict(true=true and true[:2], written=said and said[:2])
        rows.append(row | dict(sure=confidence.get(id(said))))
    return sorted(rows, key=lambda row: row["step"])


def annotate_episode(encoder, predictor, episodes, i, tokenizer, min_prob=0.0):
    """Rows of `judge` with what was expected after each; the stream tok, step, prob (L,), and
    forecasts (N, K)."""
    if episodes.meta["obs_dim"] != encoder.obs_dim:
        raise ValueError(f"{episodes.folder}: obs_dim is not the run's; --data names another")
    obs = episodes[i].obs[None].to(encoder.device)
    tok, step, prob = encoder.annotate(obs)
    nothing = torch.zeros(obs.shape[1], 0, dtype=torch.int64)
    ahead = forecasts(encoder, predictor, obs, tok, step) if predictor else (nothing, nothing)
    stream = tok[0].cpu(), step[0].cpu(), prob[0].cpu()
    written = [pair for pair in with_confidence(*stream, tokenizer) if pair[1] >= min_prob]
    rows, rate = judge(episodes[i], written), episodes.meta["steps_per_second"]
    for row in rows:
        row["expected"] = forecast_text(ahead[0][row["step"]].tolist(), tokenizer, rate)
    return rows, stream, ahead


def as_json(rows, name, rate):
    """The written captions, an object a line, as scripts.pack takes them."""
    unit = "seconds" if rate else "steps"
    for row in rows:
        if row["written"]:
            start, end = (timestamp(step, rate) for step in row["written"])
            line = dict(episode=name, start=start, end=end, unit=unit)
            print(dumps(line | {key: row[key] for key in ("text", "kind", "sure", "expected")}))


def as_text(rows, rate):
    """A table of all captions, a line each."""
    width = max([7] + [len(row["text"]) for row in rows])
    unit, digits = ("seconds", 8) if rate else ("step", 5)
    expected = "expected next" if any(row["expected"] for row in rows) else ""
    print(f"{unit:>{digits}}  {'true':{width}}  {'written':{width}}  sure  {expected}")
    for row in rows:
        true, written = (row["text"] if row[side] else "" for side in ("true", "written"))
        sure = "" if row["sure"] is None else f"{row['sure']:.2f}"
        when = f"{timestamp(row['step'], rate):{digits}g}"
        print(f"{when}  {true:{width}}  {written:{width}}  {sure:4}  {row['expected']}")


def main():
    configure(globals(), bare="out_dir")
    check_range(globals(), 0, "min_prob", most=1)
    encoder, tokenizer, folder, config = load(out_dir, pick_device(device))
    predictor = predictor_of(folder, config, encoder.device)
    episodes = Episodes(data or config["data"], split)
    every, rate = range(len(episodes)), episodes.meta["steps_per_second"]
    for i in every if episode == "all" else [number_of(episodes, split, episode)]:
        rows, *_ = annotate_episode(encoder, predictor, episodes, i, tokenizer, min_prob)
        name = episodes[i].id
        if json:
            as_json(rows, name, rate)
            continue
        print(f"episode {name} of {episodes.folder}, {split}; {folder}\n")
        as_text(rows, rate)


if __name__ == "__main__":
    run(main)
