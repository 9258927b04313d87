"""
Train an encoder that answers each observation with any number of words, together with a predictor
that decodes the next K tokens of that text from the encoder's hidden state, at every slot at once.

    python train.py config/crafter.py --K=4          one process
    torchrun --nproc_per_node=8 train.py             eight processes, the same global batch
    python train.py --help                           all settings

Where each step of the idea is:
    1. a dataset provides observation sequences                     data.Windows
    2. the encoder annotates with language tokens                   encoder.Encoder.annotate;
       what nobody annotated is read for it                         encoder.Reader
    3. the predictor decodes K tokens forward at each index,        Predictor
       teacher-forced, conditioned on the encoder's final hidden state
    4. the encoder is trained to optimise the predictor             Grounding.forward
"""

from configurator import check_range, configure, run
import copy
import functools
import json
import math
import os
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import safe_open
from torch.utils.checkpoint import checkpoint as recompute
from tqdm import tqdm

from data import END, SILENCE, Tokenizer, Windows, score, shortest_repeat
from encoder import Encoder, Features, Reader, choose_reader, written_captions
from model import Config, GPTNeoX, find_checkpoint, linear_cross_entropy
from runtime import checkpoint, distributed, files
from runtime.dataset import Episodes, choose_annotated, read_text
from runtime.distributed import all_reduce, print0
from runtime.log import open_log

# -----------------------------------------------------------------------------
# settings: Crafter on a CPU; config/*.py and --name=value override them
# data
data = "data/crafter"  # folder of a data set
out_dir = "out/crafter"  # checkpoints and log.jsonl
n_annotated = 64  # training episodes that keep their captions; more than there are: all
T = 16  # steps per window
batch_size = 64  # windows per step, over all processes
micro_batch = 16  # windows per forward pass of one process, those of like length together
# model
init_from = "scratch"  # 'scratch' | 'EleutherAI/pythia-160m' | a directory
n_layer = 3
n_head = 4
n_embd = 128
# predictor
K = 8  # tokens ahead
stride = 4  # predict from every stride-th slot; 1 takes twice as long
predict_weight = 0.5  # of loss_predict; 0: no predictor
detach = False  # True: no gradient from predictor to encoder (control)
pseudo_labels = True  # train on what a reader finds in the other episodes as well
# optimizer
max_iters = 400
warmup_iters = 50
learning_rate = 1e-3
projector_lr = 1e-3  # of the projector and of condition
weight_decay = 0.1
# run
eval_interval = 200
seed = 0
device = "auto"  # 'auto' | 'cpu' | 'cuda' | 'mps'
wandb = ""  # project of Weights & Biases to log to as well
shard = False  # True: a process holds a part of the weights, not all; see docs/running.md
resume = False  # go on from the newest checkpoint in out_dir
# -----------------------------------------------------------------------------
# what cannot change when a run is resumed
FIXED = "n_annotated T seed init_from n_layer n_head n_embd K stride pseudo_labels"

# -----------------------------------------------------------------------------
# K-ahead parallel prediction over L slots of text

DENSE = 48  # slots; with fewer the mask is faster than the fast path


def ahead_rule(row, column, L, K, stride):
    """Whether a row sees a column: L rows of the main stream, then blocks of K rows each."""
    block = (row - L) // K
    step = torch.where(row < L, row, block * stride)  # a row looks back from this step
    own = (row >= L) & (block == (column - L) // K) & (row >= column)
    return torch.where(column < L, column <= step, own)  # the main stream sees no block


def ahead_mask(L, S, K, stride, device):
    """The definition: which rows see which, (L+SK, L+SK) bool."""
    row = torch.arange(L + S * K, device=device)
    return ahead_rule(row[:, None], row, L, K, stride)


def ahead_attention(q, k, v, L, K, stride, rows=256):
    """The fast path: attention under ahead_mask in linear memory. q, k, v (B, H, L+SK, hs)."""
    B, H, N, _ = q.shape
    S, n = (N - L) // K, max(rows // K, 1)
    assert N == L + S * K and (S - 1) * stride < L
    if q.is_cuda:
        flex, mask = compiled_flex(), flex_mask(L, K, stride, N, q.device)
        parts = zip(*(x.split(65535 // H) for x in (q, k, v)), strict=True)  # of one CUDA grid
        return torch.cat([flex(*part, block_mask=mask) for part in parts])
    stream = F.scaled_dot_product_attention(*(x[:, :, :L] for x in (q, k, v)), is_causal=True)
    k_main, v_main = (x[:, :, :L].flatten(0, 1) for x in (k, v))  # (BH, L, hs)
    own = (x[:, :, L:].flatten(0, 1).unflatten(1, (S, K)) for x in (q, k, v))  # (BH, S, K, hs)
    out = []
    for first, *blocks in zip(range(0, S, n), *(x.split(n, 1) for x in own), strict=True):
        seen = (min(first + n, S) - 1) * stride + 1  # steps that the last of these blocks sees
        inputs = *blocks, k_main[:, :seen], v_main[:, :seen], first * stride, stride
        out.append(recompute(attend_blocks, *inputs, use_reentrant=False))
    return torch.cat((stream, torch.cat(out, 1).flatten(1, 2).unflatten(0, (B, H))), 2)


def attend_blocks(q, k, v, k_main, v_main, first, stride):
    """Consecutive blocks (BH, n, K, hs), from step `first` on, to k_main, v_main (BH, seen, hs)
    up to their steps, and to themselves."""
    n, K, hs = q.shape[1:]
    step = torch.arange(n, device=q.device).repeat_interleave(K) * stride + first
    later = torch.arange(k_main.shape[1], device=q.device) > step[:, None]  # (nK, seen)
    later_own = torch.ones(K, K, dtype=torch.bool, device=q.device).triu(1)
    q = q * hs**-0.5
    stream = (q.flatten(1, 2) @ k_main.mT).masked_fill_(later, -1e9)
    own = (q @ k.mT).masked_fill_(later_own, -1e9).flatten(1, 2)
    p, p_own = torch.cat((stream, own), -1).softmax(-1).split((k_main.shape[1], K), -1)
    return (p @ v_main).unflatten(1, (n, K)) + p_own.unflatten(1, (n, K)) @ v


@functools.lru_cache(8)
def flex_mask(L, K, stride, N, device):
    from torch.nn.attention.flex_attention import create_block_mask  # slow to import

    def rule(batch, head, row, column):
        return ahead_rule(row, column, L, K, stride)

    return create_block_mask(rule, None, None, N, N, device)


@functools.lru_cache(1)
def compiled_flex():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


class Predictor(nn.Module):
    """GPT-NeoX plus one linear map. Main-stream row i: embed(tok[i-1]) + condition(hidden[i])."""

    def __init__(self, lm, encoder_width, K, stride=1):
        super().__init__()
        self.lm, self.K, self.stride = lm, K, stride
        self.condition = nn.Linear(encoder_width, lm.config.hidden_size, bias=False)
        nn.init.zeros_(self.condition.weight)

    def blocks(self, x, value):
        """x (B, L) -> (B, S, K+1): from each start its own entry and the K after it."""
        S = len(range(0, x.shape[1] - 1, self.stride))
        return F.pad(x, (0, self.K), value=value).unfold(1, self.K + 1, self.stride)[:, :S]

    def forward(self, input_tok, hidden, inputs):
        """Hidden states of all blocks (B, S, k, d), in one pass.

        input_tok (B, L): the token before each slot; hidden (B, L, d_encoder); inputs (B, S, k):
        the tokens of each block but its last. Output (t, j) is about tok[t+j]: it saw tok[<t+j]
        and hidden[<=t], so no observation after the step of slot t.
        """
        L, (S, k) = input_tok.shape[1], inputs.shape[1:]
        assert hidden.shape[:2] == input_tok.shape and S == len(range(0, L - 1, self.stride))
        stream = self.lm.embed(input_tok) + self.condition(hidden)
        x = torch.cat((stream, self.lm.embed(inputs).flatten(1, 2)), 1)  # (B, L+Sk, d)
        step = torch.arange(L, device=x.device)
        start = torch.arange(S, device=x.device) * self.stride
        ahead = torch.arange(1, k + 1, device=x.device)
        pos = torch.cat((step, (start[:, None] + ahead).flatten()))
        if L >= DENSE:
            attend = functools.partial(ahead_attention, L=L, K=k, stride=self.stride)
        else:
            mask = ahead_mask(L, S, k, self.stride, x.device)
            attend = functools.partial(F.scaled_dot_product_attention, attn_mask=mask)
        return self.lm.stack(x, pos, attend)[:, L:].unflatten(1, (S, k))

    def save_pretrained(self, folder):
        """config.json and model.safetensors as Pythia's, and condition.safetensors beside them."""
        self.lm.save_pretrained(folder)
        weights, K = files.tensors_of(self.condition), {"K": str(self.K)}
        files.save_tensors(weights, Path(folder, "condition.safetensors"), K)

    @classmethod
    def from_pretrained(cls, folder):
        with safe_open(Path(folder, "condition.safetensors"), "pt") as file:
            weight, K = file.get_tensor("weight"), int(file.metadata()["K"])
        predictor = cls(GPTNeoX.from_pretrained(folder), weight.shape[1], K)
        predictor.condition.weight.data.copy_(weight)
        return predictor


class Losses(NamedTuple):
    """Of the three losses: their targets, how many these are, or what each is."""

    ground: torch.Tensor  # the encoder's, on what somebody annotated
    predict: torch.Tensor  # the predictor's, on all text
    pseudo: torch.Tensor  # the encoder's, on what a reader read


class Grounding(nn.Module):
    """Encoder, predictor and the three losses."""

    def __init__(self, encoder, predictor):
        super().__init__()
        self.encoder, self.predictor = encoder, predictor

    def targets(self, batch):
        """Which slots (B, L), and tokens of blocks (B, S, K), each loss is over."""
        ahead = self.predictor.blocks(batch.told, False)[..., 1:]
        return Losses(batch.known, ahead, batch.pseudo)

    def forward(self, batch, counts):
        """This part's share of the step's loss, and of each of the three, (3,).

        counts: Losses of how many targets there are in the whole step.
        """
        known, ahead, pseudo = self.targets(batch)
        before = F.pad(batch.tok[:, :-1], (1, 0), value=SILENCE)  # (B, L)
        hidden = self.encoder(batch.obs, before, batch.step)  # (B, L, d)
        words = self.encoder.lm.embed_out.weight
        weight = (known | pseudo) / (counts.ground + counts.pseudo)
        loss, each = linear_cross_entropy(hidden, words, batch.tok, weight)
        ground = (each * known).sum() / counts.ground
        own = (each * pseudo).sum() / counts.pseudo
        if predict_weight == 0:
            return loss, torch.stack(Losses(ground, 0 * ground, own))

        # not detached: this is where the encoder is trained to make the predictor good
        hidden = hidden.detach() if detach else hidden
        block = self.predictor.blocks(batch.tok, END)  # (B, S, K+1)
        out = self.predictor(before, hidden, block[..., :-1])
        words = self.predictor.lm.embed_out.weight
        predict, _ = linear_cross_entropy(out, words, block[..., 1:], ahead / counts.predict)
        loss = loss + predict_weight * predict
        return loss, torch.stack(Losses(ground, predict.detach(), own))


def own_text(encoder, batch):
    """The batch with a text that the encoder writes, which is the predictor's target alone."""
    tok, step, _ = encoder.annotate(batch.obs, batch.noise)
    inside = step < T
    step = step.clamp(max=T - 1)
    told = batch.told.gather(1, step) & inside  # the batch has a slot a step
    return batch._replace(tok=tok, step=step, told=told, known=told & False, pseudo=told & False)


# -----------------------------------------------------------------------------
# setup


def open_data():
    """The splits train and val, and which training episodes keep their captions."""
    if data == "data/crafter" and not os.path.exists("data/crafter/meta.json"):
        if distributed.RANK == 0:
            from domains import crafter_play

            crafter_play.make(data, text=250)
    distributed.broadcast(None)  # the others wait
    train, val = Episodes(data, "train"), Episodes(data, "val")
    longest = max(episode.steps for episode in train)
    if T > longest:
        raise ValueError(f"--T={T}: no training episode has more than {longest} steps")
    annotated = choose_annotated(train, n_annotated, seed)
    if annotated and not any(train[i].known_captions for i in annotated):
        raise ValueError(f"{data}: no caption in the annotated episodes; try --n_annotated=0")
    tell_data(train, val, annotated)
    return train, val, annotated


def tell_data(train, val, annotated):
    """Says how much is annotated, and what of val no annotation can teach."""
    said = [train[i].known_captions for i in annotated]
    texts = {caption.text for captions in said for caption in captions}
    print0(f"{len(annotated)} of {len(train)} training episodes annotated")
    if not annotated:
        return
    count, longest = sum(map(len, said)), max(len(text.split()) for text in texts)
    print0(f"they have {count} captions of {len(texts)} texts, of at most {longest} words")
    soonest = shortest_repeat(said)
    if soonest < math.inf:
        print0(f"the same text comes again after {soonest} steps or more")
    new = [caption for e in val for caption in e.captions if caption.text not in texts]
    if new:
        print0(f"{len(new)} captions of val have another text, as {new[0].text!r}")


def build(episodes, annotated, folder=None):
    """Tokenizer, encoder with predictor, and the reader, if there is to be one, on the CPU.

    folder: of the checkpoint that is resumed, which has the reader.
    """
    text = read_text(data)
    captions = [*(episodes[i].known_captions for i in annotated), *text]
    if init_from == "scratch":
        tokenizer = Tokenizer.from_captions({c.text for of in captions for c in of})
        config = Config(tokenizer.vocab_size, n_embd, n_layer, n_head)
        encoder_lm, predictor_lm = GPTNeoX(config), GPTNeoX(config)
    else:
        tokenizer = Tokenizer.from_file(find_checkpoint(init_from) / "tokenizer.json")
        encoder_lm = GPTNeoX.from_pretrained(init_from)
        predictor_lm = copy.deepcopy(encoder_lm)
        if encoder_lm.config.vocab_size < tokenizer.vocab_size:
            raise ValueError(f"{init_from}: tokenizer.json has more ids than the model has rows")
    reader = None
    if annotated and pseudo_labels:
        reader = reader_of(episodes, annotated, tokenizer, text, folder)
        print0(f"a reader of a part of the annotated episodes: F1 {reader.f1:.2f} on the rest")
        print0(str(reader))
        features = reader.features
    else:
        features = Features(episodes.meta["obs_dim"], past=T // 2).measure(episodes)
    encoder = Encoder(encoder_lm, features, T, pretrained=init_from != "scratch")
    if reader:
        encoder.projector.start_from(reader)
    predictor = Predictor(predictor_lm, encoder_lm.config.hidden_size, K, stride)
    predictor.requires_grad_(predict_weight > 0)
    return tokenizer, Grounding(encoder, predictor), reader


def reader_of(episodes, annotated, tokenizer, text, folder):
    """The reader of a checkpoint; without one it is fitted, by one process for all."""
    if folder:
        return Reader.from_pretrained(folder / "reader", tokenizer)
    print0("fitting a reader to the annotated steps")
    reader = None
    if distributed.RANK == 0:
        reader = choose_reader(episodes, annotated, tokenizer, text, T // 2)
    return distributed.broadcast(reader)


def text_of(episodes, annotated, reader):
    """{episode: its captions, which of its steps are annotated, and which have a text, (N,) bool}.

    Text is the annotators', else the reader's; where nobody annotated anything it is the encoder's
    own, and all steps have one. The reader keeps it: a run that goes on does not read again.
    """
    text, own = {}, range(distributed.RANK, len(episodes), distributed.WORLD)
    kept = reader.train_text if reader else []
    for i in tqdm(own, "reading", disable=None if reader else True):
        episode = episodes[i]
        known = episode.known & (i in annotated)
        captions = [caption for caption in episode.captions if known[caption.start]]
        if reader and not known.all():
            read = kept[i] if kept else reader.captions(episode.obs)
            captions += [caption for caption in read if not known[caption.start]]
        told = known | (reader is not None or not annotated)
        if told.any():
            text[i] = captions, known, told
    text = distributed.gather(text)
    if reader:
        reader.train_text = [text[i][0] for i in range(len(episodes))]
    return text


def configure_optimizer(model):
    """AdamW: weight decay on matrices alone, a learning rate of their own for the new maps."""
    new = [*model.encoder.projector.parameters(), *model.predictor.condition.parameters()]
    lm = [*model.encoder.lm.parameters(), *model.predictor.lm.parameters()]
    groups = []
    for params, peak in ((lm, learning_rate), (new, projector_lr)):
        matrices = [p for p in params if p.dim() >= 2]
        vectors = [p for p in params if p.dim() < 2]
        groups.append(dict(params=matrices, peak=peak, weight_decay=weight_decay))
        groups.append(dict(params=vectors, peak=peak, weight_decay=0.0))
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=lm[0].is_cuda)


def lr_multiplier(step):
    """Linear warm-up, then cosine to a tenth."""
    if step < warmup_iters:
        return (step + 1) / warmup_iters
    progress = (step - warmup_iters) / max(max_iters - warmup_iters, 1)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))


def set_learning_rates(optimizer, step):
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * lr_multiplier(step)


def check_settings():
    """Raises ValueError where a setting cannot be meant."""
    check_range(globals(), 2, "T")
    check_range(globals(), 1, "K stride", most=T - 1)  # no target lies beyond the window
    check_range(globals(), 1, "batch_size micro_batch n_layer n_head n_embd", most=2**20)
    check_range(globals(), 1, "eval_interval")
    if shard and (distributed.WORLD == 1 or batch_size % distributed.WORLD):
        raise ValueError("--shard wants torchrun, and a --batch_size that its processes divide")
    check_range(globals(), 0, "n_annotated predict_weight")
    check_range(globals(), 0, "seed", most=2**63 - 1)
    if not out_dir:
        raise ValueError("--out_dir= is empty: a folder is wanted")
    check_range(globals(), 0, "max_iters warmup_iters learning_rate projector_lr weight_decay")
    if init_from == "scratch":  # what build() would refuse is told before data and folder are made
        Config(1, n_embd, n_layer, n_head)
    else:
        find_checkpoint(init_from)


# -----------------------------------------------------------------------------
# evaluation


def evaluate(encoder, episodes, tokenizer, n=20):
    """Caption F1 on the first n episodes, the encoder writing freely; and what collapse shows."""
    first = episodes[:n]
    longest, observations = max(e.steps for e in first), (e.obs for e in first)
    written = written_captions(encoder, observations, tokenizer, longest)
    result = score([episode.captions for episode in first], written)
    steps = sum(episode.steps for episode in first)
    spoken = sum(len({caption.start for caption in captions}) for captions in written)
    distinct = len({caption.text for captions in written for caption in captions})
    scores = {name: result[name] for name in ("f1", "f1_exact", "word_f1", "precision", "recall")}
    return scores | dict(silence=1 - spoken / steps, distinct=distinct)


# -----------------------------------------------------------------------------
# the loop


def main():
    config = configure(globals())
    check_settings()
    own_device, autocast = distributed.init(device)
    torch.manual_seed(seed)
    train, val, annotated = open_data()
    identity, resuming = train.identity(), resume or distributed.RESTARTED
    folder = checkpoint.lock_run(out_dir, resuming, config, FIXED.split(), identity)
    print0(json.dumps(config))
    tokenizer, model, reader = build(train, annotated, folder)
    model = distributed.place(model, own_device, shard)
    optimizer = configure_optimizer(model)
    windows = Windows(train, text_of(train, annotated, reader), tokenizer, T, seed, micro_batch)

    # a run that was saved goes on where it stopped
    models = dict(encoder=model.encoder, predictor=model.predictor)
    saved = models | (dict(reader=reader) if reader else {})
    state = dict(step=0, best_f1=-1.0, best_step=0, identity=identity)
    if folder:
        state = checkpoint.restore_run(folder, models, optimizer, config)
    first = dict(annotated=[train[i].id for i in annotated])
    log = open_log(out_dir, state["step"], config, wandb, first)
    ddp = distributed.wrap(model)
    example = windows.batch(0, range(1))[0].to(own_device)
    distributed.warm_up(lambda: ddp(example, Losses(*torch.ones(3, device=own_device)))[0])
    caught, bad = distributed.catch_signals(), 0

    steps, began = range(state["step"], max_iters), time.monotonic()
    batches = windows.batches(steps, distributed.share(batch_size))
    batches = tqdm(batches, "training", len(steps), disable=None)
    for step, parts in zip(steps, batches, strict=True):
        parts = [part.to(own_device) for part in parts]
        if not annotated:
            with autocast, distributed.gathered(model.encoder):
                parts = [own_text(model.encoder, part) for part in parts]
        counts = sum(torch.stack([x.sum() for x in model.targets(part)]) for part in parts)
        counts = Losses(*all_reduce(counts).clamp(min=1))

        # forward and backward; micro-batches only save memory
        losses = torch.zeros(3, device=own_device)
        for part in parts:
            with distributed.no_sync(ddp, last=part is parts[-1]):
                with autocast:
                    loss, each = ddp(part, counts)
                (loss * distributed.WORLD).backward()  # DDP averages the gradients
            losses += each

        # update
        norm = distributed.clip_grad_norm(model, 1.0)
        signals = losses.new_tensor([len(caught)])  # of any process stop them all
        *losses, stopping = all_reduce(torch.cat((losses, signals))).tolist()
        bad = checkpoint.check_finite(out_dir, step, sum(losses) + norm, bad)
        if not bad:
            set_learning_rates(optimizer, step)
            optimizer.step()
        optimizer.zero_grad()

        # evaluate, log and save once in a while, and before the process ends
        state["step"] = step + 1
        due = (step + 1) % eval_interval == 0 or step + 1 == max_iters
        taking_part = shard or distributed.RANK == 0  # it takes all to gather sharded weights
        if due or step == steps.start + 9:
            pace = (time.monotonic() - began) / (step + 1 - steps.start)  # seconds a step
            print0(f"step {step + 1}: about {pace * (max_iters - step - 1) / 60:.0f} minutes left")
        if due and taking_part:
            with distributed.gathered(model.encoder):
                line = dict(step=step + 1, **evaluate(model.encoder, val, tokenizer), norm=norm)
            line |= {f"loss_{name}": x for name, x in zip(Losses._fields, losses, strict=True)}
            log(line)
            if line["f1"] >= state["best_f1"]:
                state |= dict(best_f1=line["f1"], best_step=step + 1)
        if (due or stopping) and not bad and taking_part:
            checkpoint.save(out_dir, saved, tokenizer, optimizer, config, state)
        if stopping:
            break
    distributed.leave()
    if bad:
        raise ValueError(f"step {state['step'] - 1} was not finite, so the run's end is not saved")
    tell_the_end(state, caught)


def tell_the_end(state, caught):
    rest = "; --resume goes on" if state["step"] < max_iters else ""
    print0(f"stopped after step {state['step']} of {max_iters}{rest}")
    print0(f"  best on val: step {state['best_step']}, F1 {max(state['best_f1'], 0):.3f}")
    print0(f"  python sample.py {out_dir}                  the captions of an episode")
    print0(f"  python -m bench.report {out_dir}            F1 on the test episodes, and controls")
    if "SIGINT" in caught:
        raise KeyboardInterrupt  # exit code 130: what follows && shall not go on


if __name__ == "__main__":
    run(main)
