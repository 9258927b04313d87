import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data import END
from encoder import Encoder, Projector


def random_obs(*shape):
    return torch.randn(*shape, 5, dtype=torch.float64)


def probabilities(encoder, obs, tok, prev_token=END):
    """The teacher-forced pass over a whole stream (B, T, V)."""
    input_tok = F.pad(tok[:, :-1], (1, 0), value=prev_token)
    return encoder.lm.embed_out(encoder(obs, input_tok)).softmax(-1)


@pytest.mark.parametrize("prev_token", [END, 7])
def test_decoding_step_by_step_equals_the_teacher_forced_pass(encoder, prev_token):
    obs = random_obs(3, 8)
    tok, prob = encoder.annotate(obs, prev_token=torch.full((3,), prev_token))
    p = probabilities(encoder, obs, tok, prev_token)
    assert torch.equal(tok, p.argmax(-1))
    torch.testing.assert_close(prob, p.amax(-1).float())


def test_observations_may_be_arrays_and_wrong_ones_are_named(encoder):
    obs = random_obs(3, 8)
    assert torch.equal(encoder.annotate(obs.numpy())[0], encoder.annotate(obs)[0])
    for wrong in (obs[0], obs[..., :4]):
        with pytest.raises(ValueError, match=r"\(episodes, steps, 5\) is wanted"):
            encoder.annotate(wrong)
    obs[1, 2, 3] = float("nan")
    with pytest.raises(ValueError, match="NaN or Inf"):
        encoder.annotate(obs)


def test_noise_draws_from_the_distribution(encoder):
    obs = random_obs(1, 1)
    p = probabilities(encoder, obs, torch.tensor([[END]]))[0, 0]
    noise = (torch.arange(20000, dtype=torch.float64)[:, None] + 0.5) / 20000
    tok, _ = encoder.annotate(obs.expand(20000, 1, 5), noise=noise)
    share = torch.bincount(tok[:, 0], minlength=31) / 20000
    torch.testing.assert_close(share, p.float(), atol=1e-4, rtol=0)


def test_an_episode_longer_than_a_window_is_written_in_windows_primed_with_their_first_half(
    encoder,
):
    obs = random_obs(2, 21)
    tok, _ = encoder.annotate(obs)
    for start in range(4, 17, 4):
        window = slice(start, start + 8)
        input_tok = tok[:, start - 1 : start + 7][:, : obs[:, window].shape[1]]
        best = encoder.lm.embed_out(encoder(obs[:, window], input_tok)).argmax(-1)
        assert torch.equal(tok[:, start + 4 : start + 8], best[:, 4:])


@pytest.mark.parametrize("T", [8, 7])
@pytest.mark.parametrize("past", [1, 4, 9])
@pytest.mark.parametrize("steps", [1, 5, 8, 9, 21])
def test_streaming_writes_what_annotate_writes(tiny, T, past, steps):
    encoder = Encoder(tiny, 5, T)
    encoder.projector = Projector(5, tiny.config.hidden_size, past)
    encoder.double()
    obs = random_obs(2, steps)
    tok, prob = zip(*encoder.stream(obs.unbind(1)), strict=True)
    expected, expected_prob = encoder.annotate(obs)
    assert torch.equal(torch.stack(tok, 1), expected)
    torch.testing.assert_close(torch.stack(prob, 1), expected_prob)


def test_streaming_keeps_two_caches_however_long_it_is(encoder, monkeypatch):
    made, new_cache = [], encoder.lm.new_cache

    def counted(B, T):
        assert T <= encoder.T
        cache = new_cache(B, T)
        made.append(weakref.ref(cache[0]))
        return cache

    monkeypatch.setattr(encoder.lm, "new_cache", counted)
    for _ in encoder.stream(random_obs(1) for _ in range(99)):
        assert sum(cache() is not None for cache in made) <= 2
    assert len(made) == 25


def test_no_step_sees_a_later_observation(encoder):
    obs, tok = random_obs(3, 8), torch.randint(31, (3, 8))
    changed = obs.clone()
    changed[:, 5] += 1
    one, two = encoder(obs, tok), encoder(changed, tok)
    assert torch.equal(one[:, :5], two[:, :5])
    assert (one[:, 5:] != two[:, 5:]).any(-1).all()


def test_a_pretrained_encoder_starts_as_the_plain_language_model(tiny):
    encoder = Encoder(tiny, 5, 8, pretrained=True).double()
    tok = torch.randint(31, (2, 8))
    torch.testing.assert_close(tiny.embed_out(encoder(random_obs(2, 8), tok)), tiny(tok))


def test_a_saved_encoder_writes_the_same(encoder, tmp_path):
    encoder.float().save_pretrained(tmp_path / "encoder")
    again = Encoder.from_pretrained(tmp_path / "encoder")
    obs = random_obs(2, 12)
    for ours, theirs in zip(encoder.annotate(obs), again.annotate(obs), strict=True):
        assert torch.equal(ours, theirs)
    projector = tmp_path / "encoder" / "projector.safetensors"
    projector.write_bytes(projector.read_bytes()[:-1])
    with pytest.raises(ValueError, match="projector.safetensors: garbled"):
        Encoder.from_pretrained(tmp_path / "encoder")
    projector.unlink()
    with pytest.raises(FileNotFoundError, match="projector.safetensors is missing"):
        Encoder.from_pretrained(tmp_path / "encoder")


class Given(list):
    """Episodes whose observations are given."""

    obs = list.__getitem__


def test_changes_are_seen_where_all_features_weigh_alike():
    obs = torch.tensor([[0.0, 5.0], [1.0, 5.0], [1.0, 9.0]])
    projector = Projector(2, 4, past=2)
    for power, seen in ((0.0, 1), (4.0, 0)):
        projector.standardise(Given([obs.repeat(20, 1)]), power)
        change = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 4.0]]) * projector.scale
        expected = seen * change.clamp(-1, 1) * projector.feature_weight
        torch.testing.assert_close(projector.look(obs[None])[0, :, -2:], expected)


def test_brief_features_weigh_more_and_those_that_never_move_nothing():
    rng = np.random.default_rng(0)
    episodes = []
    for _ in range(30):
        slow = np.repeat(rng.normal(size=25), 8)  # stays for 8 steps
        episodes.append(np.stack((slow, rng.normal(size=200) * 50, np.full(200, 3.0)), 1))
    projector = Projector(3, 4, past=2)
    projector.standardise(Given(torch.tensor(x).float() for x in episodes), feature_power=2.0)
    correlations = [[np.corrcoef(x[1:, f], x[:-1, f])[0, 1] for f in (0, 1)] for x in episodes]
    expected = (1 - np.mean(correlations, 0)) ** 2
    weight = projector.feature_weight.numpy()
    np.testing.assert_allclose(weight[0] / weight[1], expected[0] / expected[1], rtol=0.1)
    np.testing.assert_allclose((weight**2).mean(), 1, rtol=1e-4)
    assert weight[2] == 0
    every = np.concatenate(episodes)
    np.testing.assert_allclose(projector.mean, every.mean(0), atol=1e-2)
    np.testing.assert_allclose(1 / projector.scale[:2], every.std(0)[:2], rtol=1e-3)
