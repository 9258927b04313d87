import pytest
import torch
import torch.nn.functional as F

from data import END, SILENCE, Batch
from encoder import Encoder
from model import Config, GPTNeoX
from train import Grounding, Predictor, ahead_mask

V, D = 31, 5


def grounding(K, stride=1, **choices):
    """A random encoder and predictor in float64, the zero-initialised maps made random."""
    lm = lambda d: GPTNeoX(Config(vocab_size=V, hidden_size=d, num_hidden_layers=2, num_attention_heads=2)).double()
    model = Grounding(Encoder(lm(32), D, 8).double(), Predictor(lm(16), 32, K, stride=stride, **choices).double())
    torch.nn.init.normal_(model.predictor.condition.weight, std=0.3)
    for p in model.parameters(): p.data.mul_(2)                 # attention that looks at something
    return model


def a_batch(T, B=3):
    """A stream with silence, holes in what is known, and an episode that ends inside the window; and what was accepted."""
    tok = torch.randint(2, V, (B, T)).masked_fill(torch.rand(B, T) < 0.4, SILENCE)
    inside = torch.arange(T) < torch.tensor([T, T - 3, T])[:, None]
    known = torch.rand(B, T) < 0.5
    batch = Batch(torch.randn(B, T, D).double(), tok, known, inside, prev=torch.randint(V, (B,)), noise=None, keep=None)
    return tok, ~known & (torch.rand(B, T) < 0.5), batch


def one_by_one(model, batch, tok, good):
    """The losses and their counts by T separate runs, each given only its own prefix and its own block: the definition, in loops."""
    predictor, lm, K, T = model.predictor, model.predictor.lm, model.predictor.K, tok.shape[1]
    hidden = model.encoder(batch.obs, tok, batch.prev)
    message = predictor.message(hidden, model.encoder)
    ground = predict = own = hidden.sum() * 0
    known, good, targets = batch.known & batch.inside, good & batch.inside, 0
    for b in range(len(tok)):
        for t in range(T):
            loss = F.cross_entropy(model.encoder.logits(hidden[b, t]), tok[b, t])
            ground, own = ground + loss * known[b, t], own + loss * good[b, t]
        for t in range(0, T - 1, predictor.stride):
            following = [s for s in range(t + 1, T) if predictor.ahead == "steps" or tok[b, s] != SILENCE][:K]
            if not following: continue
            prefix = range(t + 1) if predictor.context == "all" else [t]
            main = torch.stack([lm.embed(tok[b, i - 1] if i else batch.prev[b]) + message[b, i] for i in prefix])
            block = lm.embed(torch.stack([tok[b, s] for s in [t, *following[:-1]]]))
            pos = torch.tensor([*prefix, *range(t + 1, t + 1 + len(following))])
            logits = lm.embed_out(lm.stack(torch.cat((main, block))[None], pos)[0, len(main):])
            loss = F.cross_entropy(logits, tok[b, following], reduction="none")
            predict = predict + (loss * (known | good)[b, following]).sum()
            targets += (known | good)[b, following].sum().item()
    return torch.stack((ground, predict, own)), [known.sum().item(), targets, good.sum().item()]


@pytest.mark.parametrize("attention", ["mask", "fast"])
@pytest.mark.parametrize("T, K, choices", [
    (9, 3, {}), (9, 3, dict(context="own")), (9, 3, dict(ahead="spoken")), (9, 3, dict(through="text")), (9, 3, dict(stride=3)),
    (7, 10, dict(ahead="spoken", through="text", stride=2)), (5, 1, dict(context="own", through="text", stride=2)),
])
def test_one_pass_equals_separate_runs(T, K, choices, attention):
    model = grounding(K, attention=attention, **choices)
    tok, good, batch = a_batch(T)
    parameters = dict(model.named_parameters())
    ours, (theirs, counts) = model(batch, tok, good), one_by_one(model, batch, tok, good)
    assert model.counts(batch, tok, good).tolist() == counts
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    weights = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    grads = [torch.autograd.grad(sums @ weights, parameters.values(), materialize_grads=True) for sums in (ours, theirs)]
    for name, a, b in zip(parameters, *grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("attention", ["mask", "fast"])
@pytest.mark.parametrize("choices", [{}, dict(context="own"), dict(ahead="spoken"), dict(stride=3)])
def test_logits_and_the_gradient_of_hidden_equal_those_of_separate_runs(choices, attention):
    T, K = 9, 3
    model = grounding(K, attention=attention, **choices)
    lm, tok, prev, hidden = model.predictor.lm, a_batch(T)[0], torch.randint(V, (3,)), torch.randn(3, T, 32, dtype=torch.float64)
    out = lambda hidden, way: model.predictor(tok, prev, model.predictor.condition(hidden))[0] if way else alone(hidden)
    starts = range(0, T - 1, model.predictor.stride)

    def alone(hidden):                                          # each start with a stream cut off behind it
        blocks = []
        for t in starts:
            first = 0 if "context" not in choices else t
            _, _, before, _ = model.predictor(tok, prev, model.predictor.condition(hidden))
            main = lm.embed(torch.cat((prev[:, None], tok[:, :-1]), 1))[:, first:t + 1] + model.predictor.condition(hidden[:, first:t + 1])
            x = torch.cat((main, lm.embed(before[:, t // model.predictor.stride])), 1)
            blocks.append(lm.stack(x, torch.arange(first, t + 1 + K))[:, -K:])
        return torch.stack(blocks, 1)

    ours, theirs = (lm.embed_out(out(h, way)) for h, way in ((hidden.requires_grad_(), True), (hidden, False)))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    grad = torch.randn_like(ours)
    torch.testing.assert_close(*(torch.autograd.grad(x, hidden, grad) for x in (ours, theirs)), rtol=1e-10, atol=1e-10)


def changed(before, after, attention):
    """Which blocks' tokens differ, (S, K) bool: in any bit by the mask, by more than 1e-12 on the fast path."""
    return ((before - after).abs().amax((0, 3)) > (0 if attention == "mask" else 1e-12))


@pytest.mark.parametrize("attention", ["mask", "fast"])
@pytest.mark.parametrize("choices", [{}, dict(context="own"), dict(stride=3), dict(ahead="spoken")])
def test_a_block_sees_what_it_may_and_nothing_else(choices, attention):
    """Changes one hidden state, one observation, one token at a time: exactly the blocks that may see it change."""
    T, K = 11, 3
    model = grounding(K, attention=attention, **choices)
    obs, tok, prev = torch.randn(1, T, D).double(), torch.randint(2, V - 1, (1, T)), torch.randint(V, (1,))
    hidden = model.encoder(obs, tok, prev)
    run = lambda hidden, tok: model.predictor(tok, prev, model.predictor.condition(hidden))[0].detach()
    base, all_before = run(hidden, tok), "context" not in choices
    t, j = torch.arange(0, T - 1, model.predictor.stride)[:, None], torch.arange(1, K + 1)
    for s in range(T):
        other = hidden.clone()
        other[:, s] += 1
        sees_hidden = (t >= s if all_before else t == s).expand(-1, K)
        assert changed(base, run(other, tok), attention).equal(sees_hidden), f"hidden {s}"
        other = obs.clone()
        other[:, s] += 1
        assert changed(base, run(model.encoder(other, tok, prev), tok), attention).equal((t >= s).expand(-1, K)), f"observation {s}"
        other = tok.clone()
        other[:, s] += 1
        own = (t <= s) & (s < t + j)                            # block (t, j) reads tok_t .. tok_{t+j-1}, the main stream tok_{i-1}
        sees_token = own | (t > s if all_before else t == s + 1)
        assert changed(base, run(hidden, other), attention).equal(sees_token), f"token {s}"


def test_the_mask_of_three_steps_and_two_ahead():
    rows = """
        100 0000
        110 0000
        111 0000
        100 1000
        100 1100
        110 0010
        110 0011"""
    expected = torch.tensor([[int(c) for c in row.replace(" ", "")] for row in rows.split("\n")[1:]], dtype=torch.bool)
    assert ahead_mask(3, torch.tensor([0, 1]), 2).equal(expected)
    assert ahead_mask(3, torch.tensor([0, 1]), 2, 0)[:, :3].int().argmax(1).tolist() == [0, 1, 2, 0, 0, 1, 1]
    assert (ahead_mask(3, torch.tensor([0, 1]), 2, 0)[:, :3].sum(1) == 1).all()


def test_the_likeliest_forecast_is_what_one_pass_finds_likeliest():
    """Decoded one after another at any start, the K tokens are the argmax of the parallel pass over a stream that holds them."""
    model = grounding(3)
    tok, prev, message = torch.randint(2, V, (2, 9)), torch.tensor([END, 4]), torch.randn(2, 9, 16).double()
    found, prob = model.predictor.forecast(tok, prev, message, torch.tensor([4]))
    tok[:, 5:8] = found[:, 0]
    logits = model.predictor.lm.embed_out(model.predictor(tok, prev, message)[0][:, 4])
    assert logits.argmax(-1).equal(found[:, 0])
    torch.testing.assert_close(prob[:, 0], logits.float().softmax(-1).amax(-1))


def test_automatic_takes_the_mask_for_few_rows_and_the_fast_path_for_many(monkeypatch):
    import train
    used = []
    fast = train.ahead_attention
    monkeypatch.setattr(train, "ahead_attention", lambda *x: (used.append(len(x)), fast(*x))[1])
    model = grounding(8)
    for T, expected in ((8, 0), (40, 2)):                       # a call for each of two layers
        used.clear()
        model.predictor(torch.randint(V, (1, T)), torch.tensor([END]), torch.zeros(1, T, 16).double())
        assert len(used) == expected


@pytest.mark.parametrize("through", ["hidden", "text"])
@pytest.mark.parametrize("cut", [True, False])
def test_the_cut_stops_the_gradient_from_predictor_to_encoder(through, cut):
    model = grounding(3, through=through)
    model.cut = cut
    tok, good, batch = a_batch(9)
    model(batch, tok, good)[1].backward()                        # loss_predict alone
    reached = [name for name, p in model.encoder.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    assert (reached == []) == cut
    assert all(p.grad is not None for p in model.predictor.lm.parameters())
