"""
Prints the grounded captions of an episode beside the true ones, with what the predictor expects to be said next.

    python sample.py                                         an episode of the test split
    python sample.py --out_dir=out/crafter --episode=3

A line per caption: step, true caption, written caption, the encoder's confidence (its least sure token), and the K tokens the
predictor expects after that step, knowing nothing later: "+3 place table" begins three steps on.
"""
import json

import torch

import checkpoint
import evaluate
from configurator import Fault, configure, stop
from data import END, SILENCE, Episodes, Tokenizer, read_stream, spans
from encoder import Encoder
from train import Predictor, pick_device

out_dir = "out/crafter"               # the run to load
data = ""                             # folder of a data set; default: the run's
split = "test"                        # which of its splits
episode = 0                           # which episode
device = "auto"                       # 'auto' | 'cpu' | 'cuda' | 'mps'


def expected(predictor, encoder, obs, tok, step, tokenizer):
    """The predictor's K tokens after `step`, as text with their offsets. obs (1, N, D), tok (1, N) the stream written so far."""
    start = max(step + 1 - encoder.window, 0)                # the window that ends at this step
    obs, prev = obs[:, start:step + 1], tok[:, start - 1] if start else torch.full_like(tok[:, 0], END)
    tok = tok[:, start:step + 1]
    hidden = encoder(obs, tok, prev)
    at = torch.tensor([step - start], device=tok.device)
    ids = predictor.forecast(tok, prev, predictor.message(hidden, encoder), at)[0][0, 0].tolist()
    if predictor.ahead == "spoken": return " ".join(tokenizer.decode(ids[a:b]) for a, b in spans(ids))
    under_way = step - start > 0 and tok[0, -1] > SILENCE    # the first tokens may finish a caption
    return ", ".join(("..." if a == 0 and under_way else f"+{a + 1} ") + tokenizer.decode(ids[a:b]).strip() for a, b in spans(ids))


@torch.no_grad()
def timeline(encoder, predictor, episodes, i, tokenizer, where):
    """(step, true caption, written caption, confidence or None, forecast) in order of time."""
    obs = evaluate.padded(episodes, [i], where)
    tok, prob = encoder.annotate(obs)
    for start, true, written, sure in evaluate.beside(episodes.captions(i), read_stream(tok[0], tokenizer), prob[0].cpu()):
        yield start, true, written, sure, expected(predictor, encoder, obs, tok, start, tokenizer)


def main():
    folder = checkpoint.chosen(out_dir)
    checkpoint.verify(folder)
    trained = json.loads((folder / "config.json").read_text())
    where = pick_device(device)
    tokenizer = Tokenizer.from_file(folder / "tokenizer.json")
    encoder = Encoder.from_pretrained(folder / "encoder").to(where).eval()
    predictor = Predictor.from_pretrained(folder / "predictor").to(where).eval()
    episodes = Episodes(data or trained["data"], split)
    if not 0 <= episode < len(episodes): stop(f"--episode={episode}: {split} has episodes 0 .. {len(episodes) - 1}")
    print(f"episode {episodes.records[episode]['id']} of {episodes.folder}, {split}; {folder}\n")
    print(f"{'step':>5}  {'true':22}  {'written':22}  sure  expected next")
    for start, true, written, sure, ahead in timeline(encoder, predictor, episodes, episode, tokenizer, where):
        print(f"{start:5}  {true:22}  {written:22}  {'' if sure is None else f'{sure:.2f}':4}  {ahead}".rstrip())


if __name__ == "__main__":
    configure(globals())
    try: main()
    except Fault as fault: stop(str(fault))
