import json
import weakref

import numpy as np
import pytest
import torch

import checkpoint
import files
from data import END
from encoder import Encoder, Projector


def stream(encoder, B=3, N=8):
    obs = torch.randn(B, N, 5, dtype=torch.float64)
    return obs, torch.randint(31, (B, N)), torch.rand(B, N) < 0.4


def test_decoding_step_by_step_equals_the_teacher_forced_pass(encoder):
    obs, _, _ = stream(encoder)
    tok, prob = encoder.annotate(obs)
    p = encoder.logits(encoder(obs, tok, torch.full((3,), END))).softmax(-1)
    assert torch.equal(tok, p.argmax(-1))
    torch.testing.assert_close(prob, p.gather(-1, tok[..., None])[..., 0].float())


def test_observations_of_the_wrong_shape_are_named_and_arrays_are_taken(encoder):
    obs, _, _ = stream(encoder)
    assert torch.equal(encoder.annotate(obs.numpy())[0], encoder.annotate(obs)[0])
    for wrong in (obs[0], obs[..., :4]):
        with pytest.raises(ValueError, match=r"\(episodes, steps, 5\) is wanted"): encoder.annotate(wrong)


def test_it_is_loaded_from_a_run_a_checkpoint_or_its_folder(encoder, tmp_path):
    encoder.save_pretrained(tmp_path / "run/step-000001/encoder")
    step = tmp_path / "run/step-000001"
    (step / "checksums.json").write_text(json.dumps(checkpoint.checksums(step)))
    for folder in (tmp_path / "run", step, step / "encoder"):
        assert torch.equal(Encoder.from_pretrained(folder).projector.mean, encoder.projector.mean.float())
    modes = {path.stat().st_mode & 0o777 for path in (step / "encoder").iterdir()}
    assert modes == {0o666 & ~files.UMASK}                     # safetensors' own are for their owner alone


def test_known_tokens_are_kept_and_heard(encoder):
    obs, forced, known = stream(encoder)
    tok, _ = encoder.annotate(obs, forced, known)
    free, _ = encoder.annotate(obs)
    assert torch.equal(tok[known], forced[known])
    assert not torch.equal(tok[~known], free[~known])


def test_noise_draws_from_the_distribution(encoder):
    obs = torch.randn(1, 1, 5, dtype=torch.float64)
    p = encoder.logits(encoder(obs, torch.zeros(1, 1, dtype=torch.int64), torch.tensor([END])))[0, 0].softmax(-1)
    u = (torch.arange(20000, dtype=torch.float64)[:, None] + 0.5) / 20000
    tok, _ = encoder.annotate(obs.expand(20000, 1, 5), noise=u)
    torch.testing.assert_close(torch.bincount(tok[:, 0], minlength=31) / 20000, p.float(), atol=1e-4, rtol=0)


def test_an_episode_longer_than_the_window_is_written_in_windows_primed_with_their_first_half(encoder):
    obs = torch.randn(2, 21, 5, dtype=torch.float64)
    tok, prob = encoder.annotate(obs)
    for start in range(4, 17, 4):
        hidden = encoder(obs[:, start:start + 8], tok[:, start:start + 8], tok[:, start - 1])
        p = encoder.logits(hidden).softmax(-1)[:, 4:]
        assert torch.equal(tok[:, start + 4:start + 8], p.argmax(-1))


def test_following_a_stream_writes_what_annotate_writes(tiny):
    for window in (8, 7):
        encoder = Encoder(tiny, 5, window).double()
        for steps in (1, 5, 8, 9, 21):
            obs = torch.randn(2, steps, 5, dtype=torch.float64)
            tok, prob = (torch.stack(x, 1) for x in zip(*encoder.follow(obs.unbind(1)), strict=True))
            expected, sure = encoder.annotate(obs)
            assert torch.equal(tok, expected)
            torch.testing.assert_close(prob, sure)


def test_following_a_stream_keeps_two_caches_however_long_it_is(encoder, monkeypatch):
    made, new_cache = [], encoder.lm.new_cache
    def counted(B, T):
        cache = new_cache(B, T)
        made.append(weakref.ref(cache[0]))
        assert T <= encoder.window
        return cache
    monkeypatch.setattr(encoder.lm, "new_cache", counted)
    for _ in encoder.follow(torch.randn(1, 5, dtype=torch.float64) for _ in range(99)):
        assert sum(cache() is not None for cache in made) <= 2
    assert len(made) == 25


def test_no_step_sees_a_later_observation(encoder):
    obs, tok, _ = stream(encoder)
    prev = torch.zeros(3, dtype=torch.int64)
    changed = obs.clone()
    changed[:, 5] += 1
    before, after = encoder(obs, tok, prev), encoder(changed, tok, prev)
    assert torch.equal(before[:, :5], after[:, :5])
    assert (before[:, 5:] != after[:, 5:]).any(-1).all()


def test_a_pretrained_encoder_starts_as_the_plain_language_model(tiny):
    encoder = Encoder(tiny, 5, 8, pretrained=True).double()
    tok = torch.randint(31, (2, 8))
    hidden = encoder(torch.randn(2, 8, 5, dtype=torch.float64), tok, torch.full((2,), END))
    torch.testing.assert_close(encoder.logits(hidden)[:, 1:], tiny(torch.cat((torch.full((2, 1), END), tok[:, :-1]), 1))[:, 1:])


def test_a_saved_encoder_writes_the_same(encoder, tmp_path):
    encoder.float().save_pretrained(tmp_path / "encoder")
    obs = torch.randn(2, 12, 5)
    again = Encoder.from_pretrained(tmp_path / "encoder")
    for ours, theirs in zip(encoder.annotate(obs), again.annotate(obs), strict=True): assert torch.equal(ours, theirs)


class Recorded(list):
    """Episodes whose observations are given."""
    obs = list.__getitem__


def test_brief_features_weigh_more_and_those_that_never_move_nothing():
    rng = np.random.default_rng(0)
    slow = [np.repeat(rng.normal(size=25), 8) for _ in range(30)]                       # stays for 8 steps
    episodes = [np.stack((s, rng.normal(size=200) * 50, np.full(200, 3.0)), 1) for s in slow]
    projector = Projector(3, 4)
    projector.standardise(Recorded(torch.tensor(x).float() for x in episodes), brevity=2.0)
    correlation = np.mean([[np.corrcoef(x[1:, f], x[:-1, f])[0, 1] for f in (0, 1)] for x in episodes], 0)
    weight, expected = projector.weight.numpy(), (1 - correlation) ** 2
    np.testing.assert_allclose(weight[0] / weight[1], expected[0] / expected[1], rtol=0.1)
    assert weight[2] == 0 and np.isclose((weight ** 2).mean(), 1, rtol=1e-4)
    everything = np.concatenate(episodes)
    np.testing.assert_allclose(projector.mean, everything.mean(0), atol=1e-2)
    np.testing.assert_allclose(1 / projector.scale[:2], everything.std(0)[:2], rtol=1e-3)
