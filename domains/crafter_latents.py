"""
Crafter seen through a policy network, as VPT sees Minecraft: its latents are the observations.

    python -m domains.crafter_latents
    python -m domains.crafter_latents --data=data/crafter-fresh --out=data/crafter-latents-fresh

A recurrent policy is cloned from what the scripted player does in worlds that no data set has
(behavioural cloning, as Baker et al. 2022, arXiv 2206.11795, do). Its hidden state, 192 numbers a
step, is the observation; episodes, splits, captions and pictures stay those of --data. No caption
is read while it is cloned. It is kept in a file, so that several data sets have the same latents.
"""

from configurator import check_range, configure, run
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from domains.crafter_play import PER_SHARD, observe
from domains.crafter_player import Player, World, constants
from runtime.dataset import Episode, Episodes, read_text, write_shard, write_text
from runtime.files import alone, check_empty, save_tensors
from runtime.program import workers
from runtime.shards import read_meta, shard_path, write_meta

data = "data/crafter"  # folder of a data set by crafter_play.py
out = "data/crafter-latents"  # folder to write
policy = "data/crafter-policy.safetensors"  # file of the policy; cloned where there is none
episodes = 300  # that it is cloned from
updates = 800  # of the policy
processes = 0  # 0: all cores

WIDTH = 192
BATCH, SPAN, PEAK = 16, 64, 3e-3  # windows of an update, their steps, learning rate
FIRST_SEED = 2_000_000  # of the worlds it is cloned in
STEPS, AREA, TASTE = 240, 36, 2.0  # as crafter_play.py has them, from the world's first step on

# -----------------------------------------------------------------------------
# the policy


class Policy(nn.Module):
    """Observations so far -> the next action. Its hidden state is the latent."""

    def __init__(self, obs_dim):
        super().__init__()
        self.see = nn.Linear(obs_dim, WIDTH)
        self.remember = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.act = nn.Linear(WIDTH, len(constants.actions))

    def latents(self, obs):  # (B, N, D) -> (B, N, WIDTH)
        return self.remember(F.gelu(self.see(obs.float())))[0]

    def forward(self, obs):  # (B, N, D) -> logits of the action after each step (B, N, actions)
        return self.act(self.latents(obs))

    def loss(self, obs, actions):  # actions (B, N), -1 beyond an episode's end
        return F.cross_entropy(self(obs).flatten(0, 1), actions.flatten(), ignore_index=-1)


def watch(seed):
    """An episode of the scripted player: obs (N, D), and the action after each of them (N,)."""
    env = World(area=(AREA, AREA), seed=seed, length=0)
    env.reset()
    player = Player(env, np.random.default_rng(seed), TASTE)
    obs, actions = [], []
    dead = False
    while len(obs) <= STEPS and not dead:
        inventory, action = dict(env._player.inventory), player.act()
        dead = env.act(action)
        obs.append(observe(env, inventory))
        actions.append(constants.actions.index(action))
    return np.stack(obs[:-1]), np.array(actions[1:])


def watch_all():
    """The episodes that the policy is cloned from, [(obs, actions), ..]."""
    seeds = range(FIRST_SEED, FIRST_SEED + episodes)
    with workers(processes) as pool:
        watched = pool.imap(watch, seeds)
        return list(tqdm(watched, "watching the player", episodes, unit="episode"))


def pad(watched):
    """obs (B, N, D) and actions (B, N) of episodes; -1 beyond the end of each."""
    obs, actions = ([torch.from_numpy(x) for x in xs] for xs in zip(*watched, strict=True))
    return pad_sequence(obs, True), pad_sequence(actions, True, -1)


def clone(watched):
    """A policy that imitates the episodes watched; a tenth of them only judges it."""
    torch.manual_seed(0)
    n = len(watched) // 10
    obs, actions = pad(watched[n:])
    model = Policy(obs.shape[2])
    optimizer = torch.optim.AdamW(model.parameters(), PEAK)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK, updates)
    for _ in tqdm(range(updates), "cloning"):
        episode, step = windows(*actions.shape)
        loss = model.loss(obs[episode, step], actions[episode, step])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    right, frequent = accuracy(model, watched[:n])
    print(f"actions of unseen episodes: {right:.2f} right, {frequent:.2f} by the most frequent")
    return model


def windows(count, steps):
    """Which episodes (BATCH, 1) and which of their steps (BATCH, n), drawn at random."""
    n = min(SPAN, steps)
    start = torch.randint(steps - n + 1, (BATCH, 1))
    return torch.randint(count, (BATCH, 1)), start + torch.arange(n)


@torch.no_grad()
def accuracy(model, watched):
    """Share of the next actions that it predicts, and the share of the most frequent one."""
    obs, actions = pad(watched)
    known = actions >= 0
    right = (model(obs).argmax(-1) == actions)[known].float().mean().item()
    return right, (actions[known].bincount().max() / known.sum()).item()


def the_policy(obs_dim):
    """The one on disk; cloned and kept where there is none. Raises ValueError."""
    path, model = Path(policy), Policy(obs_dim)
    if not path.exists():
        save_tensors(clone(watch_all()).state_dict(), path)
    try:
        model.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} is no policy for {data} ({reason})") from None
    return model


# -----------------------------------------------------------------------------
# the data set


@torch.no_grad()
def translate(episode, model):
    """The episode with the policy's latents as observations."""
    obs = model.latents(episode.obs[None])[0]
    return Episode(episode.id, obs, episode.captions, episode.annotated, episode.pictures)


def write_split(source, split, model):
    for first in tqdm(range(0, len(source), PER_SHARD), split):
        translated = [translate(episode, model) for episode in source[first : first + PER_SHARD]]
        write_shard(out, split, first // PER_SHARD, translated)


def main():
    configure(globals())
    check_range(globals(), 10, "episodes")
    check_range(globals(), 1, "updates")
    check_range(globals(), 0, "processes", most=1000)
    if Path(out).resolve() == Path(data).resolve():
        raise ValueError(f"--out={out} is the data set that is read: choose another")
    meta = read_meta(data)
    model = the_policy(meta["obs_dim"])
    with alone(out):
        check_empty(out)
        for split in meta["splits"]:
            if shard_path(data, split, 0).exists():  # fresh worlds are a test split alone
                write_split(Episodes(data, split), split, model)
        meta |= dict(obs_dim=WIDTH, dtype="float32")
        meta["source"] += ", latents of its clone"
        write_text(out, read_text(data))
        write_meta(out, **meta)


if __name__ == "__main__":
    run(main)
