import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from data import SILENCE
from encoder import MOST, Encoder, Features


def random_obs(*shape):
    return torch.randn(*shape, 5, dtype=torch.float64)


def probabilities(encoder, obs, tok, step):
    """The teacher-forced pass over the slots of a stream (B, L, V)."""
    before = F.pad(tok[:, :-1], (1, 0), value=SILENCE)
    return encoder.lm.embed_out(encoder(obs, before, step)).softmax(-1)


def forced(tok):
    """Where a stream (B, L) has no choice, for MOST tokens were said since the last SILENCE."""
    said = torch.zeros_like(tok)
    for i in range(1, tok.shape[1]):
        said[:, i] = (said[:, i - 1] + 1) * (tok[:, i - 1] != SILENCE)
    return said == MOST


def test_decoding_slot_by_slot_equals_the_teacher_forced_pass(encoder):
    obs = random_obs(3, 8)
    tok, step, prob = encoder.annotate(obs)
    within = step < 8
    p = probabilities(encoder, obs, tok, step.clamp(max=7))
    free = within & ~forced(tok)
    assert torch.equal(tok[free], p.argmax(-1)[free])
    assert (tok[~free] == SILENCE).all() and (within & ~free).any()
    expected = p.gather(2, tok[..., None])[..., 0].float()
    torch.testing.assert_close(prob[within], expected[within])


def test_each_row_goes_on_at_its_own_pace(encoder):
    obs = random_obs(5, 21)
    tok, step, prob = encoder.annotate(obs)
    lengths = (step < 21).sum(1)
    assert len(set(lengths.tolist())) > 2  # or nothing is shown
    for b, n in enumerate(lengths):
        alone = encoder.annotate(obs[b : b + 1])
        assert torch.equal(alone[0][0], tok[b, :n]) and torch.equal(alone[1][0], step[b, :n])
        torch.testing.assert_close(alone[2][0], prob[b, :n])
        assert (tok[b, n:] == SILENCE).all()
        ends = step[b, :n][tok[b, :n] == SILENCE]
        assert ends.tolist() == list(range(21))  # every step ends with SILENCE


def test_observations_may_be_arrays_and_wrong_ones_are_named(encoder):
    obs = random_obs(3, 8)
    assert torch.equal(encoder.annotate(obs.numpy())[0], encoder.annotate(obs)[0])
    for wrong in (obs[0], obs[..., :4]):
        with pytest.raises(ValueError, match=r"\(episodes, steps, 5\) is wanted"):
            encoder.annotate(wrong)
    obs[1, 2, 3] = float("nan")
    with pytest.raises(ValueError, match="NaN or Inf"):
        encoder.annotate(obs)


def test_noise_draws_from_the_distribution_and_ends_the_text(encoder):
    obs, first = random_obs(1, 1), torch.zeros(1, 1, dtype=torch.int64)
    p = probabilities(encoder, obs, first, first)[0, 0]
    noise = (torch.arange(20000, dtype=torch.float64)[:, None] + 0.5) / 20000
    tok, *_ = encoder.annotate(obs.expand(20000, 1, 5), noise=noise)
    assert tok.shape == (20000, 1)
    share = torch.bincount(tok[:, 0], minlength=31) / 20000
    torch.testing.assert_close(share, p.float(), atol=1e-4, rtol=0)


def test_an_episode_longer_than_a_window_is_written_in_windows_primed_with_their_first_half(
    encoder,
):
    obs = random_obs(1, 21)
    tok, step, _ = encoder.annotate(obs)
    for start in range(4, 17, 4):
        inside = (step[0] >= start) & (step[0] < start + 8)
        slots = tok[:, inside], step[:, inside] - start
        best = probabilities(encoder, obs[:, start : start + 8], *slots).argmax(-1)
        new = (slots[1] >= 4) & ~forced(slots[0])
        assert torch.equal(slots[0][new], best[new]) and new.any()


@pytest.mark.parametrize("T", [8, 7])
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("steps", [1, 5, 8, 9, 21])
def test_streaming_says_at_each_step_what_annotate_writes(tiny, T, dense, steps):
    encoder = Encoder(tiny, Features(5, dense, T // 2), T).double()
    obs = random_obs(steps)
    tok, step, prob = (x[0] for x in encoder.annotate(obs[None]))
    said = list(encoder.stream(obs))
    assert len(said) == steps
    for t, (ids, probs) in enumerate(said):
        assert ids == tok[step == t].tolist()
        torch.testing.assert_close(torch.tensor(probs), prob[step == t])


def test_streaming_keeps_two_caches_however_long_it_is(encoder, monkeypatch):
    made, new_cache = [], encoder.lm.new_cache

    def counted(B):
        cache = new_cache(B)
        made.append(weakref.ref(cache[0]))
        return cache

    monkeypatch.setattr(encoder.lm, "new_cache", counted)
    for _ in encoder.stream(random_obs() for _ in range(41)):
        assert sum(cache() is not None for cache in made) <= 2
    assert len(made) == 11


def test_no_step_sees_a_later_observation(encoder):
    obs, tok = random_obs(3, 8), torch.randint(31, (3, 20))
    step = torch.randint(8, (3, 20)).sort(1).values
    changed = obs.clone()
    changed[:, 5] += 1
    one, two = encoder(obs, tok, step), encoder(changed, tok, step)
    assert torch.equal(one[step < 5], two[step < 5])
    assert (one[step >= 5] != two[step >= 5]).any(-1).all()


def test_a_pretrained_encoder_starts_as_the_plain_language_model(tiny):
    encoder = Encoder(tiny, Features(5), 8, pretrained=True).double()
    tok, step = torch.randint(31, (2, 20)), torch.randint(8, (2, 20)).sort(1).values
    torch.testing.assert_close(tiny.embed_out(encoder(random_obs(2, 8), tok, step)), tiny(tok))


def test_a_saved_encoder_writes_the_same(encoder, tmp_path):
    encoder.float().save_pretrained(tmp_path / "encoder")
    again = Encoder.from_pretrained(tmp_path / "encoder")
    obs = random_obs(2, 12)
    for ours, theirs in zip(encoder.annotate(obs), again.annotate(obs), strict=True):
        assert torch.equal(ours, theirs)
    projector = tmp_path / "encoder" / "projector.safetensors"
    save_file(load_file(projector), projector, {"T": "8"})  # as it was with a token a step
    with pytest.raises(ValueError, match="projector.safetensors: .*another kind of stream"):
        Encoder.from_pretrained(tmp_path / "encoder")
    projector.write_bytes(projector.read_bytes()[:-1])
    with pytest.raises(ValueError, match="projector.safetensors: garbled"):
        Encoder.from_pretrained(tmp_path / "encoder")
    projector.unlink()
    with pytest.raises(FileNotFoundError, match="projector.safetensors is missing"):
        Encoder.from_pretrained(tmp_path / "encoder")


def test_features_are_measured_over_all_steps_and_values_of_few():
    rng = np.random.default_rng(0)
    parts = rng.normal(1e4, 50, (200, 1)), rng.integers(0, 4, (200, 1)) * 2, np.full((200, 1), 3)
    every = torch.tensor(np.concatenate(parts, 1)).float()
    features = Features(3).measure([SimpleNamespace(obs=obs) for obs in every.split(50)])
    np.testing.assert_allclose(features.mean, every.double().mean(0), rtol=1e-6)
    std = every[:, :2].double().std(0, correction=0)
    np.testing.assert_allclose(1 / features.scale[:2], std, rtol=1e-4)
    assert features.scale[2] == 0  # it never moves
    assert features.column.tolist() == [1] * 4 and features.value.tolist() == [0, 2, 4, 6]


def test_what_is_seen_of_a_step_as_by_hand():
    obs = torch.tensor([[0.0, 5], [2, 5], [2, 9]])
    features = Features(2, values=2)
    features.mean[:], features.scale[:] = 1, 0.5
    features.column[:], features.value[:] = 0, torch.tensor([0.0, 2.0])
    expected = [  # state (clipped at 3 deviations), change, values, and whether just taken on
        [-0.5, 2, 0, 0, 1, 0, 0, 0],
        [0.5, 2, 1, 0, 0, 1, 0, 1],
        [0.5, 3, 0, 2, 0, 1, 0, 0],
    ]
    assert features(obs).tolist() == expected and features.size() == 8
    features = Features(2, dense=True, past=2)
    features.mean[:], features.scale[:] = 1, 0.5
    # state, change, and the difference from the mean of two steps before
    some = [[-0.5, 2, 0, 0, 0, 0], [0.5, 2, 1, 0, 1, 0], [0.5, 3, 0, 2, 0.5, 2]]
    assert features(obs)[:, :6].tolist() == some
    mixtures = (torch.tensor(some) @ features.mix + features.shift).clamp(min=0)
    torch.testing.assert_close(features(obs)[:, 6:], mixtures)
    assert torch.equal(features.mix, Features(2, dense=True).mix)
    assert features.size() == features(obs).shape[1] == 6 + 1500
