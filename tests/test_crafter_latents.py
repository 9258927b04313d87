import multiprocessing.dummy
from unittest import mock

import numpy as np
import pytest
import torch

pytest.importorskip("crafter", reason="pip install -r requirements.txt")
from conftest import program  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from domains import crafter_latents, crafter_play  # noqa: E402
from domains.crafter_latents import Policy  # noqa: E402
from runtime.dataset import Episodes  # noqa: E402


def test_a_later_observation_changes_no_earlier_latent():
    policy = Policy(30)
    obs = torch.rand(2, 12, 30)
    changed = obs.clone()
    changed[:, 7] += 1
    before, after = policy.latents(obs), policy.latents(changed)
    assert torch.equal(before[:, :7], after[:, :7])
    assert (before[:, 7:] != after[:, 7:]).any(-1).all()  # and all that follow remember it


def toy_watched(rng, n=40):
    """The action is what the observation before said."""
    said = rng.integers(3, size=n)
    return np.eye(3, dtype=np.uint8)[said], np.roll(said, 1)


def test_a_clone_predicts_the_actions_of_episodes_it_never_saw():
    rng = np.random.default_rng(0)
    with mock.patch.multiple(crafter_latents, updates=60, PEAK=1e-2):
        policy = crafter_latents.clone([toy_watched(rng) for _ in range(30)])
    right, frequent = crafter_latents.accuracy(policy, [toy_watched(rng) for _ in range(30)])
    assert right > 0.9 and frequent < 0.4


def test_an_action_stands_beside_the_observation_that_it_follows():
    """The actions watched, played again, lead to the observations watched."""
    with mock.patch.multiple(crafter_latents, STEPS=30, AREA=20):
        obs, actions = crafter_latents.watch(3)
        env = crafter_latents.World(area=(20, 20), seed=3, length=0)
        env.reset()
        player = crafter_latents.Player(env, np.random.default_rng(3), crafter_latents.TASTE)
        first = crafter_latents.constants.actions.index(player.act())
        for action, seen in zip([first, *actions], obs, strict=False):
            inventory = dict(env._player.inventory)
            env.step(action)
            assert (crafter_latents.observe(env, inventory) == seen).all()
    assert len(obs) == len(actions) == 30


def test_the_data_set_has_latents_in_the_place_of_observations_and_all_else_as_it_was(tmp_path):
    data, out, policy = (tmp_path / name for name in ("data", "out", "policy.safetensors"))
    with mock.patch.object(crafter_play, "workers", multiprocessing.dummy.Pool):
        crafter_play.make(data, train=1, val=0, test=2, steps=20, area=20, processes=1)
    model = Policy(Episodes(data, "test").meta["obs_dim"])
    save_file(model.state_dict(), policy)
    arguments = f"--data={data}", f"--out={out}", f"--policy={policy}"
    assert program("domains/crafter_latents.py", *arguments)[0] == 0
    old, new = Episodes(data, "test"), Episodes(out, "test")
    same = [[(e.id, e.annotated, e.captions) for e in episodes] for episodes in (old, new)]
    assert same[0] == same[1] and new.meta["obs_dim"] == 192
    assert (old[1].pictures == new[1].pictures).all()
    latents = model.latents(old[1].obs[None])[0]
    assert torch.allclose(new[1].obs, latents.detach(), atol=1e-6)
    code, _, error = program("domains/crafter_latents.py", *arguments)
    assert code == 2 and f"{out}: something is there; remove it" in error
    policy.write_bytes(b"broken")
    code, _, error = program("domains/crafter_latents.py", *arguments)
    assert code == 2 and str(policy) in error and error.count("\n") == 1
