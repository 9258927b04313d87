"""
Grounds a domain's observations in language: trains an encoder that writes text, one token per observation, together with a
predictor that must foretell the next K tokens from the encoder's hidden state.

    python train.py                              the embedded default: Crafter (makes the episodes if they are not there)
    python train.py config/crafter.py --K=4      a config file, and single settings
    python train.py --help                       all settings
    torchrun --nproc_per_node=8 train.py         eight processes, the same run
"""
import copy
import json
import math
import os
import sys
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import safe_open
from tqdm import tqdm

import checkpoint
import evaluate
import processes
import pythia
from attention import ahead_attention
from configurator import Fault, configure, require, stop
from cross_entropy import cross_entropy
from data import END, SILENCE, Episodes, Tokenizer, Windows, choose_annotated, read_stream
from encoder import Encoder
from files import save_tensors
from meter import Meter, mirrors
from model import Config, GPTNeoX

# data
data = "data/crafter"                 # folder of a data set
out_dir = "out/crafter"               # where the run goes
n_annotated = 64                      # training episodes that keep their captions; the others are observations only
annotated_fraction = 0.5              # share of the windows that come from them
T = 16                                # steps of a window
batch_size = 64                       # windows of a step, over all processes
micro_batch = 0                       # windows of one pass of a process; 0: all it has
drop = 0.0                            # share of observation features the student does not see, drawn per window
brevity = 10.0                        # how much more brief features weigh: (1 - correlation from step to step) ** brevity; 0: all alike
# models, encoder and predictor alike
init_from = ""                        # a Pythia to start from, 'EleutherAI/pythia-160m' or a directory; '' is from scratch, in this shape:
hidden_size = 128                     # d
num_hidden_layers = 3                 # blocks
num_attention_heads = 4               # H
# the predictor
K = 8                                 # tokens ahead
ahead_stride = 4                      # predicts from every s-th step
ahead = "steps"                       # what is next: 'steps' (silence included) | 'spoken' (tokens that are not silence)
context = "all"                       # main-stream steps a block sees: 'all' up to its own | its 'own' only
through = "hidden"                    # what carries the message: 'hidden' state | 'text', the expected word embedding
attention = "auto"                    # of the predictor: the 'mask' up to 256 rows, else 'fast' | 'mask' | 'fast'
condition = True                      # False: the predictor never hears from the encoder (a control)
predict_weight = 0.5                  # of loss_predict beside loss_ground; 0: no predictor
cut = False                           # True: no gradient from predictor to encoder (a control)
# the text of unannotated steps
ema = 0.99                            # decay of the target encoder, per step
teacher = None                        # folder of a run whose encoder is the target, and stays as it is
write_from = 200                      # step from which the target writes
accept = 0.7                          # a written caption counts if each of its tokens had at least this probability
accept_silence = 0.95                 # written silence counts if it had at least this probability
accept_unit = "caption"               # accept whole 'caption's | single 'token's, as classic pseudo-labelling does
self_weight = 1.0                     # of loss_self, the encoder on what was accepted
# optimisation
max_iters = 600                       # steps
patience = 0                          # evaluations without a better F1 after which training stops; 0: goes on to max_iters
warmup = 50                           # steps of linear warm-up; then cosine to a tenth
lr = 1e-3                             # peak learning rate, of the encoder's language model
predictor_lr = None                   # of the predictor's language model; None: lr
projector_lr = None                   # of the projector and of condition; None: lr
freeze = ""                           # 'lm': train only projector, condition, and the embedding rows of SILENCE, which Pythia never trained
weight_decay = 0.1                    # of matrices
grad_clip = 1.0                       # largest gradient norm
max_bad_steps = 10                    # steps in a row that may be skipped because a loss or gradient is not finite
seed = 0                              # of the choice of episodes, the weights, the windows
# evaluation, checkpoints and the machine
eval_interval = 200                   # steps from one evaluation and checkpoint to the next
eval_episodes = 20                    # validation episodes of one evaluation
keep = 2                              # newest checkpoints that stay, beside the best
resume = False                        # True: go on from the newest checkpoint in out_dir, if there is one
device = "auto"                       # 'auto' | 'cpu' | 'cuda' | 'mps'
dtype = "auto"                        # 'auto': bfloat16 on CUDA, else float32 | 'bfloat16' by autocast | 'float32' | 'float64'
compile = False                       # torch.compile the models
wandb = ""                            # project of Weights & Biases to log to as well; '' is off
tensorboard = False                   # write the log for TensorBoard as well, into out_dir


# ---------------------------------------------------------------------------------------------------------------------
# K-ahead parallel prediction


def ahead_mask(T, starts, K, context="all"):
    """Which rows see which, (T + S*K, T + S*K) bool. Rows: T main-stream steps, then for each start t its block (t, 1) .. (t, K)."""
    step, S = torch.arange(T, device=starts.device), len(starts)
    t = torch.cat((step, starts.repeat_interleave(K)))                                  # the step a row starts from
    j = torch.cat((torch.zeros_like(step), torch.arange(1, K + 1, device=starts.device).repeat(S)))   # its offset, 0 in the main stream
    main = (t[:, None] >= step) if context == "all" else (t[:, None] == step)          # up to and with step t, or t alone: (T+SK, T)
    own = (t[:, None] == t[None, T:]) & (j[:, None] >= j[None, T:])                     # a block sees itself, causally: (T+SK, SK)
    return torch.cat((main, own), 1)


def ahead_index(tok, starts, K, ahead):
    """The steps whose tokens are next after each start, (B, S, K); T where the window has none. tok (B, T)."""
    B, T = tok.shape
    if ahead == "steps":
        index = starts[:, None] + torch.arange(1, K + 1, device=tok.device)             # (S, K)
        return index.clamp(max=T).expand(B, -1, -1)
    step = torch.arange(T, device=tok.device).where(tok != SILENCE, T)                  # (B, T)
    following = step.flip(1).cummin(1).values.flip(1)                                   # first spoken step >= t
    following = F.pad(following, (0, 2), value=T)[:, 1:]                                # first spoken step > t; row T stays T
    index = [following[:, starts]]
    for _ in range(K - 1): index.append(following.gather(1, index[-1]))
    return torch.stack(index, -1)


class Predictor(nn.Module):
    """GPT-NeoX plus one linear map: main stream embed(tok_{i-1}) + condition(hidden_i), and from each start a block of K tokens."""

    def __init__(self, lm, encoder_width, K, ahead="steps", context="all", through="hidden", stride=1, attention="auto"):
        super().__init__()
        assert ahead in ("steps", "spoken") and context in ("all", "own") and through in ("hidden", "text")
        assert attention in ("auto", "mask", "fast")
        self.lm, self.K, self.ahead, self.context, self.through, self.stride = lm, K, ahead, context, through, stride
        self.attention = attention
        self.condition = nn.Linear(encoder_width, lm.config.hidden_size, bias=False)
        nn.init.zeros_(self.condition.weight)

    def message(self, hidden, encoder, cut=False):
        """What each main-stream step hears of the encoder, (B, T, d_encoder) -> (B, T, d); cut: without gradient to the encoder."""
        words = encoder.lm.embed_out.weight
        if cut: hidden, words = hidden.detach(), words.detach()
        if self.through == "hidden": return self.condition(hidden)
        return F.linear(hidden, words).softmax(-1) @ self.lm.gpt_neox.embed_in.weight

    def forward(self, tok, prev, message):
        """Final hidden states of all blocks (B, S, K, d), their targets, the token before each, and the target's step, (B, S, K)."""
        starts = torch.arange(0, tok.shape[1] - 1, self.stride, device=tok.device)      # (S,)
        index = ahead_index(tok, starts, self.K, self.ahead)                            # (B, S, K)
        target = F.pad(tok, (0, 1), value=END).gather(1, index.flatten(1)).view_as(index)
        before = torch.cat((tok[:, starts, None], target[..., :-1]), -1)                # block (t, j) reads the token before its target
        return self.decode(tok, prev, message, starts, before, self.attention), target, before, index

    def decode(self, tok, prev, message, starts, before, attention="mask"):
        """One pass over the main stream and the blocks whose input tokens are before (B, S, K); not by mask: a start every `stride`."""
        T, K = tok.shape[1], before.shape[2]
        main = self.lm.embed(torch.cat((prev[:, None], tok[:, :-1]), 1)) + message      # (B, T, d)
        x = torch.cat((main, self.lm.embed(before).flatten(1, 2)), 1)                   # (B, T+SK, d)
        pos = torch.cat((torch.arange(T, device=tok.device), (starts[:, None] + torch.arange(1, K + 1, device=tok.device)).flatten()))
        if attention == "fast" or attention == "auto" and len(pos) > 256:
            attend = lambda q, k, v: ahead_attention(q, k, v, T, K, self.stride, self.context)
        else:
            mask = ahead_mask(T, starts, K, self.context)
            attend = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, mask[-q.shape[2]:])
        return self.lm.stack(x, pos, attend, skip=T).unflatten(1, (-1, K))              # (B, S, K, d)

    @torch.no_grad()
    def forecast(self, tok, prev, message, starts):
        """The likeliest next K tokens from each start, decoded one after another, and their probabilities, (B, S, K)."""
        before, probs = tok[:, starts, None], []                                        # (B, S, 1)
        for j in range(self.K):
            prob, chosen = self.lm.embed_out(self.decode(tok, prev, message, starts, before)[:, :, j]).float().softmax(-1).max(-1)
            before = torch.cat((before, chosen[..., None]), -1)
            probs.append(prob)
        return before[..., 1:], torch.stack(probs, -1)

    def save_pretrained(self, folder):
        """config.json and model.safetensors as Pythia's, and condition.safetensors beside them."""
        self.lm.save_pretrained(folder)
        kept = dict(K=self.K, ahead=self.ahead, context=self.context, through=self.through, stride=self.stride)
        save_tensors(self.condition.state_dict(), Path(folder) / "condition.safetensors", {"predictor": json.dumps(kept)})

    @classmethod
    def from_pretrained(cls, folder):
        with safe_open(Path(folder) / "condition.safetensors", "pt") as f:
            weight, kept = f.get_tensor("weight"), json.loads(f.metadata()["predictor"])
        predictor = cls(GPTNeoX.from_pretrained(folder), weight.shape[1], **kept)
        predictor.condition.weight.data.copy_(weight)
        return predictor


def at(index, steps):
    """Whether the step of each block's token is among `steps` (B, T) bool; index (B, S, K) as of ahead_index."""
    return F.pad(steps, (0, 1)).gather(1, index.flatten(1)).view_as(index)


class Grounding(nn.Module):
    """Encoder and predictor in one module whose forward returns the sums of the losses."""

    def __init__(self, encoder, predictor, cut=False, predicts=True, heeds=True):
        """cut: no gradient from predictor to encoder; predicts False: the predictor is left out; heeds False: loss_self is."""
        super().__init__()
        self.encoder, self.predictor, self.cut, self.predicts, self.heeds = encoder, predictor, cut, predicts, heeds
        predictor.requires_grad_(predicts)

    def forward(self, batch, tok, good):
        """Sums of loss_ground, loss_predict, loss_self, (3,). tok (B, T) is the full stream, good (B, T) what was accepted of it."""
        hidden = self.encoder(batch.obs, tok, batch.prev, batch.keep)                   # (B, T, d)
        known, good = batch.known & batch.inside, good & batch.inside
        speak = lambda rows: cross_entropy(hidden, self.encoder.lm.embed_out.weight, tok, rows)[0]
        ground = speak(known)
        itself = speak(good) if self.heeds else 0 * ground
        predict = 0 * ground
        if self.predicts: predict = self.predict(hidden, tok, batch.prev, known | good)[0]
        return torch.stack((ground, predict, itself))

    def counts(self, batch, tok, good):
        """How many targets each sum of `forward` is over, (3,), known before anything is computed."""
        known, good = batch.known & batch.inside, good & batch.inside
        starts = torch.arange(0, tok.shape[1] - 1, self.predictor.stride, device=tok.device)
        index = ahead_index(tok, starts, self.predictor.K, self.predictor.ahead)        # (B, S, K)
        return torch.stack((known.sum(), at(index, known | good).sum(), good.sum()))

    def predict(self, hidden, tok, prev, counted):
        """Sum of the predictor's losses on targets at counted steps (B, T), and of each block token, (B, S, K): its loss, target, the
        token before it, and whether it counted."""
        out, target, before, index = self.predictor(tok, prev, self.predictor.message(hidden, self.encoder, self.cut))
        counted = at(index, counted)
        total, loss = cross_entropy(out, self.predictor.lm.embed_out.weight, target, counted)
        return total, loss, target, before, counted


# ---------------------------------------------------------------------------------------------------------------------
# the text of unannotated steps


def accepted(tok, prob, known, threshold, silence, unit="caption"):
    """Which self-written steps may be targets, (B, T) bool: silence, and captions accepted as a whole.

    A caption counts if each of its tokens had at least `threshold` probability, it came to its END, and no known token cut in;
    silence if it had at least `silence`: where it is unsure a caption may be missing, and learning from that ends in saying nothing.
    unit 'token' looks at each token alone (Lee 2013, pseudo-labels).
    """
    if unit == "token": return ~known & (prob >= threshold)
    before = F.pad(tok[:, :-1], (1, 0), value=END)
    ends = (tok == END) & (before > SILENCE)                                            # an END after nothing belongs to no caption
    spoken = (tok > SILENCE) | ends
    caption = ((tok > SILENCE) & (before <= SILENCE)).cumsum(1)                         # (B, T) the number of the caption a step is in
    per_caption = lambda x, how: torch.zeros_like(prob).scatter_reduce(1, caption, x.float(), how, include_self=False).gather(1, caption)
    least = per_caption(prob.masked_fill(~spoken, 1), "amin")
    whole = (per_caption(ends, "amax") > 0) & (per_caption(known & spoken, "amax") == 0)
    sure = torch.where(spoken, whole & (least >= threshold), (tok == SILENCE) & (prob >= silence))
    return sure & ~known


@torch.no_grad()
def follow(target, encoder, decay):
    for slow, fast in zip(target.parameters(), encoder.parameters(), strict=True): slow.lerp_(fast, 1 - decay)


# ---------------------------------------------------------------------------------------------------------------------
# the loop


def default_data():
    """Makes the Crafter episodes where they are asked for and not there."""
    if data == "data/crafter" and not os.path.exists("data/crafter/meta.json"):
        from domains import crafter_play
        crafter_play.make(data)


def words(captions):
    """The tokenizer of the pretrained model, or one made from the annotated captions."""
    if not init_from: return Tokenizer.from_captions(captions)
    try: return Tokenizer.from_file(pythia.find(init_from) / "tokenizer.json")
    except (FileNotFoundError, ValueError) as error: raise Fault(str(error)) from None


def language_models(tokenizer):
    """Those of encoder and predictor; a pretrained one is read once."""
    if not init_from:
        shape = Config(tokenizer.vocab_size, hidden_size, num_hidden_layers, num_attention_heads)
        return GPTNeoX(shape), GPTNeoX(shape)
    try: lm = GPTNeoX.from_pretrained(init_from)
    except (FileNotFoundError, ValueError) as error: raise Fault(str(error)) from None
    if lm.config.vocab_size < tokenizer.vocab_size: raise Fault(f"{init_from}: its tokenizer has more ids than its embedding has rows")
    return lm, copy.deepcopy(lm)


def build(tokenizer, episodes, where):
    """Encoder and predictor of this configuration, standardised to the training episodes; the target encoder."""
    speaker, foreteller = language_models(tokenizer)
    encoder = Encoder(speaker, episodes.meta["obs_dim"], T, pretrained=bool(init_from))
    encoder.projector.standardise(episodes, brevity)
    predictor = Predictor(foreteller, speaker.config.hidden_size, K, ahead, context, through, ahead_stride, attention)
    model = Grounding(encoder, predictor, cut, predicts=predict_weight > 0, heeds=self_weight > 0)
    if not condition or through != "hidden": predictor.condition.requires_grad_(False)
    model = model.to(where, torch.float64 if dtype == "float64" else torch.float32)
    target = Encoder.from_pretrained(teacher).to(model.encoder.lm.embed_out.weight) if teacher else copy.deepcopy(model.encoder)
    if freeze == "lm": freeze_all_but_silence(model)
    size = lambda part: f"{sum(p.numel() for p in part.parameters()):,} parameters"
    weigh = encoder.projector.effective()
    processes.say(f"observations of {episodes.meta['obs_dim']} features, as if {weigh:.1f} weighed alike (--brevity={brevity:g})")
    processes.say(f"{tokenizer.vocab_size} tokens, on {where}; encoder {size(encoder)}, predictor {size(predictor)}")
    return model, target.requires_grad_(False)


def freeze_all_but_silence(model):
    """Freezes both language models (Tsimpoukelli et al. 2021, Frozen, arXiv 2106.13884) but for the embedding rows of SILENCE."""
    def silence_only(grad):
        kept = torch.zeros_like(grad)
        kept[SILENCE] = grad[SILENCE]
        return kept

    for lm in (model.encoder.lm, model.predictor.lm):
        trained = lm.embed_out.weight.requires_grad                                     # not if there is no loss_predict
        lm.requires_grad_(False)
        for weight in {lm.gpt_neox.embed_in.weight, lm.embed_out.weight}:
            if trained: weight.requires_grad_(True).register_hook(silence_only)


def adamw(model):
    """Groups: the encoder's language model, the predictor's, projector and condition; of each the matrices, then the vectors."""
    groups = []
    for part in ([model.encoder.lm], [model.predictor.lm], [model.encoder.projector, model.predictor.condition]):
        found = [p for module in part for p in module.parameters()]
        decay = 0.0 if freeze == "lm" and len(part) == 1 else weight_decay              # the rows beside SILENCE must stay as they are
        groups += [dict(params=[p for p in found if p.dim() >= 2], weight_decay=decay), dict(params=[p for p in found if p.dim() < 2])]
    return torch.optim.AdamW(groups, lr, betas=(0.9, 0.95), weight_decay=0.0)


def learning_rates(step):
    """Of each group of `adamw`: linear warm-up, then cosine to a tenth of the peak."""
    share = (step + 1) / warmup if step < warmup else 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warmup) / max(max_iters - warmup, 1)))
    return [peak * share for peak in (lr, predictor_lr or lr, projector_lr or lr) for _ in range(2)]


def check_settings():
    """Stops with one line where a setting cannot be meant."""
    require(globals(), choices=dict(ahead=("steps", "spoken"), context=("all", "own"), through=("hidden", "text"),
                                    attention=("auto", "mask", "fast"), accept_unit=("caption", "token"),
                                    freeze=("", "lm"), device=("auto", "cpu", "cuda", "mps"),
                                    dtype=("auto", "bfloat16", "float32", "float64")),
            least=dict.fromkeys("""n_annotated micro_batch brevity predict_weight write_from self_weight max_iters patience warmup lr
                                   predictor_lr projector_lr weight_decay grad_clip max_bad_steps""".split(), 0)
            | dict.fromkeys("batch_size num_hidden_layers num_attention_heads K ahead_stride eval_interval eval_episodes keep".split(), 1)
            | dict.fromkeys("annotated_fraction drop ema accept accept_silence".split(), 0) | dict(T=2, hidden_size=8),
            most=dict.fromkeys("annotated_fraction drop ema accept accept_silence".split(), 1))
    if not init_from and hidden_size % (8 * num_attention_heads):
        stop(f"--hidden_size={hidden_size}: a multiple of 8 for each of {num_attention_heads} heads")


def pick_device(device):
    if device == "cuda" and not torch.cuda.is_available(): stop("--device=cuda: torch sees none; --device=cpu")
    if device != "auto": return device
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def write(target, batch, step):
    """The full streams (B, T) of this process's windows, and which of their steps the target wrote and may be targets (B, T) bool."""
    if step < write_from: return batch.tok, torch.zeros_like(batch.known)
    tok, prob = target.annotate(batch.obs, batch.tok, batch.known, batch.prev, batch.noise)
    return tok, accepted(tok, prob, batch.known, accept, accept_silence, accept_unit)


def sane(step, losses, norm, state):
    """Whether a step may change the weights: losses {name: value} and gradient norm are finite. Raises Fault after too many in a row."""
    wrong = [f"loss_{name}" for name, x in losses.items() if not math.isfinite(x)] + ["gradient norm"] * (not math.isfinite(norm))
    wrong = " and ".join(wrong)
    state["bad"] = state["bad"] + 1 if wrong else 0
    if state["bad"] > max_bad_steps:
        if processes.RANK > 0: sys.exit(2)                                              # the first speaks for all
        raise Fault(f"step {step}: {wrong} not finite, {state['bad']} steps in a row; the last good checkpoint is "
                    f"{checkpoint.newest(out_dir)}, --resume=True --lr={lr / 2:g} goes on from it more gently")
    if wrong:
        state["skipped"] += 1
        processes.say(f"step {step}: {wrong} not finite, the step is skipped (number {state['skipped']})")
        return False
    usual = sorted(state["norms"])[len(state["norms"]) // 2] if len(state["norms"]) >= 20 else math.inf   # the running median
    if norm > 10 * usual: processes.say(f"step {step}: gradient norm {norm:.3g}, usually {usual:.3g}")
    state["norms"] = [*state["norms"], norm][-100:]
    return True


def target_scores(target, score):
    """How well the target writes: its F1, and of what would be accepted of it, how many captions, and the share that is right."""
    nothing = lambda tok: torch.zeros_like(tok, dtype=torch.bool)
    taken = score(target, keep=lambda tok, prob: accepted(tok, prob, nothing(tok), accept, accept_silence, accept_unit))
    return dict(target_f1=score(target)["f1"], target_accepted=taken["written"], target_accepted_right=taken["precision"])


def record(log, mirrored, model, target, val, tokenizer, where, state, line):
    """Lets encoder and target write on validation episodes; a line in the log and its mirrors, and the best score so far."""
    some = range(min(eval_episodes, len(val)))
    score = lambda encoder, keep=None: evaluate.captions(encoder, val, some, tokenizer, where, keep=keep)
    found = score(model.encoder)
    line |= {k: v for k, v in found.items() if k != "kinds"}
    if line["step"] > write_from: line |= target_scores(target, score)
    log.write(json.dumps(line) + "\n")
    log.flush()
    for mirror in mirrored: mirror(line)
    processes.say("  ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in line.items()))
    state["stale"] += 1
    if state["best"] is None or found["f1"] > state["best"][0]: state["best"], state["stale"] = (found["f1"], line["step"]), 0


def conclude(model, tokenizer, train, annotated, test, where):
    """The report of the best checkpoint, and an episode it never saw."""
    if (Path(out_dir) / "best").exists():
        best = checkpoint.chosen(out_dir)
        for part in ("encoder", "predictor"):
            module = getattr(model, part)
            module.load_state_dict(type(module).from_pretrained(best / part).state_dict())
    results = evaluate.report(model, tokenizer, train, annotated, test, T, where)
    (Path(out_dir) / "results.json").write_text(json.dumps(results, indent=2))
    evaluate.show(results)
    print(f"\nAn episode it never saw (more: python sample.py --out_dir={out_dir}):")
    tok, prob = model.encoder.annotate(evaluate.padded(test, [0], where))
    for start, true, written, sure in evaluate.beside(test.captions(0), read_stream(tok[0], tokenizer), prob[0].cpu())[:12]:
        print(f"{start:5}  {true:22}  {written:22}" + (f"  {sure:.2f}" if written else ""))


def prepare_machine():
    """The device of this process, and the autocast of its forward passes; on a CPU everything is repeatable to the last bit."""
    where = processes.join(pick_device(device))
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(where == "cpu")
    torch.utils.deterministic.fill_uninitialized_memory = False
    low = dtype == "bfloat16" or (dtype == "auto" and where.startswith("cuda"))
    return where, torch.autocast(where.partition(":")[0], torch.bfloat16, enabled=low)


def open_data():
    """The three splits, and which training episodes keep their captions."""
    if processes.RANK == 0: default_data()
    processes.tell(None)                                                                # the others wait
    train, val, test = (Episodes(data, split) for split in ("train", "val", "test"))
    annotated = [i for i in choose_annotated(len(train), len(train), seed) if train.records[i]["annotated"]][:n_annotated]
    if annotated and not any(train.captions(i) for i in annotated):
        raise Fault(f"{data}: none of the {len(annotated)} annotated training episodes has a caption; --n_annotated=0 trains without any")
    if batch_size < processes.WORLD: raise Fault(f"--batch_size={batch_size}: {processes.WORLD} processes need a window each")
    processes.say(f"{len(annotated)} of {len(train)} training episodes annotated")
    return train, val, test, annotated


def begin(model, target, optimizer, config, identity):
    """What a run knows beside its weights; those and it as they were saved, where it is resumed."""
    again = resume or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0          # torchrun restarts all when one was killed
    folder = processes.tell(checkpoint.claim(out_dir, again) if processes.RANK == 0 else None)
    machine = (torch.get_num_threads(), processes.WORLD)
    if not folder: return dict(step=0, best=None, stale=0, bad=0, skipped=0, norms=[], data=identity, machine=machine)
    state, changed = checkpoint.resume(folder, model, target, optimizer, config, identity)
    if state["machine"] != machine: changed += [f"threads and processes {state['machine']} -> {machine}: the same but for rounding"]
    processes.say(f"resuming from {folder}" + "".join(f"; {change}" for change in changed))
    if processes.RANK == 0: checkpoint.tidy(out_dir, state["best"], keep)
    return state | dict(machine=machine)


def backward(run, batch, tok, good, counts, cast):
    """Gradients of a step's loss, `micro_batch` windows at a time; returns this process's part of the three mean losses, (3,)."""
    total, part = 0, micro_batch or batch_size
    for a in range(0, len(tok), part):
        with processes.quiet(run, last=a + part >= len(tok)):
            with cast: sums = run(batch.part(a, a + part), tok[a:a + part], good[a:a + part])
            losses = sums / counts.clamp(min=1)
            loss_ground, loss_predict, loss_self = losses
            loss = loss_ground + predict_weight * loss_predict + self_weight * loss_self
            (loss * processes.WORLD).backward()                                         # DDP averages the gradients
        total = total + losses.detach()
    return total


def main(config):
    check_settings()
    where, cast = prepare_machine()
    processes.say(json.dumps(config))
    train, val, test, annotated = open_data()
    tokenizer = words([c.text for i in annotated for c in train.captions(i)])
    model, target = build(tokenizer, train, where)
    optimizer = adamw(model)
    state = begin(model, target, optimizer, config, train.identity())
    windows = Windows(train, annotated, tokenizer, T, annotated_fraction, drop, seed)
    mine = processes.share(batch_size)
    run = processes.parallel(torch.compile(model) if compile else model)
    with cast: processes.settle(run, windows.batch(0, mine[:1]).to(where))
    log = checkpoint.open_log(out_dir, state["step"]) if processes.RANK == 0 else None
    mirrored = mirrors(wandb, tensorboard, out_dir, config) if processes.RANK == 0 else []
    asked, stopping, steps = processes.listen(), False, range(state["step"], max_iters)

    meter, speed = Meter(model, batch_size, T, annotated_fraction, where, processes.WORLD), {}
    progress = tqdm(steps, "training", initial=state["step"], total=max_iters, disable=processes.RANK > 0 or None)
    for step, batch in zip(progress, windows.ahead(steps, mine), strict=False):
        batch = batch.to(where)
        with cast: tok, good = write(target, batch, step)
        counts = torch.cat((model.counts(batch, tok, good), torch.tensor([len(asked)], device=where)))
        counts, stopping = processes.total(counts).split([3, 1])                        # over all processes, before any backward

        optimizer.zero_grad()
        total = backward(run, batch, tok, good, counts, cast)
        norm = nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
        *losses, norm, n_accepted, stopping = torch.cat((processes.total(total), norm[None], counts[2:], stopping)).tolist()
        losses = dict(zip(("ground", "predict", "self"), losses, strict=True))
        if sane(step, losses, norm, state):
            for group, rate in zip(optimizer.param_groups, learning_rates(step), strict=True): group["lr"] = rate
            optimizer.step()
            if not teacher: follow(target, model.encoder, min(ema, (1 + step) / (10 + step)))
        state["step"] = step + 1
        meter.count(step >= write_from)
        if (step + 1) % 10 == 0:
            speed = meter.read()
            progress.set_postfix({name: f"{value:.3g}" for name, value in (losses | speed).items() if name != "steps_per_s"})
        due = (step + 1) % eval_interval == 0 or step + 1 == max_iters
        if due and processes.RANK == 0:
            line = dict(step=step + 1, **losses, norm=norm, accepted=int(n_accepted), **speed)
            record(log, mirrored, model, target, val, tokenizer, where, state, line)
            meter.read()                                                                # evaluation is no training
            if patience and state["stale"] >= patience: asked.append("patience")        # all processes learn of it in the next step
        if (due or stopping) and not state["bad"] and processes.RANK == 0:
            processes.say(checkpoint.save(out_dir, model, target, optimizer, tokenizer, config, state, keep))
        if stopping: break
    progress.close()
    processes.leave()
    if stopping and "patience" not in asked:
        processes.say(f"stopped after step {state['step']}; the same command with --resume=True continues")
    elif processes.RANK == 0:
        if "patience" in asked: processes.say(f"stopped after step {state['step']}: {patience} evaluations without a better F1")
        conclude(model, tokenizer, train, annotated, test, where)


if __name__ == "__main__":
    try: main(configure(globals()))
    except Fault as fault: stop(str(fault))
