"""Runs that are interrupted, resumed, out of disk space, or broken."""

import json
import multiprocessing
import re
import shutil
import sys
from unittest import mock

import interrupted as interruption
import pytest
import torch
from conftest import TEXTS, toy
from safetensors.torch import load_file
from test_data_faults import obs

import train
from data import Tokenizer, Windows
from encoder import Encoder, Reader
from runtime import checkpoint, distributed
from runtime.dataset import Episode, Episodes, write_shard
from runtime.shards import read_meta, write_meta

SMALL = """--n_embd=16 --n_layer=2 --n_head=2 --T=16 --K=2 --batch_size=4 --n_annotated=3
    --device=cpu --warmup_iters=5 --learning_rate=0.01 --projector_lr=0.01
    --max_iters=12 --eval_interval=4""".split()
LAST = "step-000012"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return toy.__wrapped__(tmp_path_factory.mktemp("data"))


def run(data, out, *more):
    """Trains here and now, in this process."""
    settings = dict(vars(train))
    argv, sys.argv = sys.argv, ["train.py", *SMALL, f"--data={data}", f"--out_dir={out}", *more]
    try:
        train.main()
    finally:
        sys.argv = argv
        vars(train).update(settings)
        torch.use_deterministic_algorithms(False)


def interrupted(what, at, data, out, *more, limit=None):
    """Trains in another process, in which something happens at a step: (exit status, output)."""
    arguments = [*SMALL, f"--data={data}", f"--out_dir={out}", *more]
    (ended,) = interruption.start(1, arguments, what, at, limit=limit)
    return ended


def contents(folder):
    """All that a checkpoint holds but the settings: {name: tensor or value}."""
    state = torch.load(folder / "state.pt", weights_only=True)
    optimizer = state.pop("optimizer")["state"]
    values = {f"optimizer {i} {k}": x for i, own in optimizer.items() for k, x in own.items()}
    for path in folder.rglob("*.safetensors"):
        tensors = load_file(path)
        values |= {f"{path.relative_to(folder)} {name}": x for name, x in tensors.items()}
    return values | state


def assert_same(one, two):
    """Bit for bit."""
    one, two = contents(one), contents(two)
    assert one.keys() == two.keys()
    for name, x in one.items():
        same = torch.equal(x, two[name]) if isinstance(x, torch.Tensor) else x == two[name]
        assert same, name


def logged(out):
    return [json.loads(line) for line in open(out / "log.jsonl")]


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """The folder of a run that is at its end."""
    out = tmp_path_factory.mktemp("finished") / "out"
    run(data, out)
    return out


@pytest.mark.parametrize("signal, code", [("TERM", 0), ("INT", 130), ("KILL", -9)])
def test_a_run_that_was_ended_goes_on_as_if_it_had_not(finished, data, tmp_path, signal, code):
    ended, said = interrupted(signal, 5, data, tmp_path / "out")
    assert ended == code, said
    newest = "step-000004" if signal == "KILL" else "step-000006"  # the step ends, then it saves
    assert checkpoint.newest(tmp_path / "out").name == newest
    run(data, tmp_path / "out", "--resume=True")
    assert_same(finished / LAST, tmp_path / "out" / LAST)
    assert logged(finished) == logged(tmp_path / "out")
    assert logged(finished)[-1]["loss_pseudo"] > 0  # the reader's text took part


def test_a_second_ctrl_c_ends_the_process_at_once(data, tmp_path):
    code, said = interrupted("INTINT", 5, data, tmp_path / "out")
    assert code in (-2, 130)
    assert checkpoint.newest(tmp_path / "out").name == "step-000004"


def test_evaluating_more_often_changes_nothing(finished, data, tmp_path):
    run(data, tmp_path / "out", "--eval_interval=1")
    one, two = contents(finished / LAST), contents(tmp_path / "out" / LAST)
    tensors = [name for name, x in one.items() if isinstance(x, torch.Tensor)]
    assert all(torch.equal(one[name], two[name]) for name in tensors)


def test_a_run_may_be_made_longer_but_not_another_model(
    finished, data, tmp_path, capsys, monkeypatch
):
    shutil.copytree(finished, tmp_path / "out")
    monkeypatch.delattr(Reader, "captions")  # what it read was kept
    run(data, tmp_path / "out", "--resume=True", "--max_iters=13", "--eval_interval=13")
    assert "max_iters 12 -> 13" in capsys.readouterr().out
    assert checkpoint.newest(tmp_path / "out").name == "step-000013"
    with pytest.raises(ValueError, match=r"is of another run \(n_embd 16 -> 32, K 2 -> 3\)"):
        run(data, tmp_path / "out", "--resume=True", "--n_embd=32", "--K=3")
    assert "weighed alike" not in capsys.readouterr().out  # before the reader is chosen


def test_a_run_does_not_go_on_with_other_data(finished, data, tmp_path):
    shutil.copytree(finished, tmp_path / "out")
    shutil.copytree(data, tmp_path / "toy")
    text = tmp_path / "toy/train-00000.jsonl"
    text.write_text(re.sub(r', "crc": \d+', "", text.read_text()).replace("walk", "work"))
    with pytest.raises(ValueError, match="was trained on other data"):
        run(tmp_path / "toy", tmp_path / "out", "--resume=True")
    shutil.copytree(data, tmp_path / "seen")  # the same captions of other observations
    train = Episodes(data, "train")
    made = [Episode(e.id, e.obs * 2, e.captions) for e in train]
    write_shard(tmp_path / "seen", "train", 0, made)
    write_meta(tmp_path / "seen", **read_meta(data))
    with pytest.raises(ValueError, match="was trained on other data"):
        run(tmp_path / "seen", tmp_path / "out", "--resume=True")
    shutil.copytree(data, tmp_path / "moved")  # the same data elsewhere is the same data
    run(tmp_path / "moved", tmp_path / "out", "--resume=True")


def test_two_runs_never_share_a_folder(finished, data, tmp_path):
    with pytest.raises(ValueError, match="step-000012 is there: --resume goes on"):
        run(data, finished)
    checkpoint.lock_run(tmp_path, False, {}, [], 0)  # gives up the other lock
    context = multiprocessing.get_context("fork")
    claimed, done = context.Event(), context.Event()

    def hold():
        with mock.patch.object(checkpoint, "resume_from"):  # it would use threads, after a fork
            checkpoint.lock_run(finished)
        claimed.set()
        done.wait()

    holder = context.Process(target=hold)
    holder.start()
    claimed.wait(60)
    with pytest.raises(ValueError, match="another run writes there"):
        run(data, finished, "--resume=True")
    done.set()
    holder.join()
    run(data, finished, "--resume=True")  # now it is free


def test_the_newest_checkpoints_and_the_best_stay(data, tmp_path, monkeypatch):
    scores = iter([0.2, 0.9, 0.9, 0.5, 0.1])  # of equals the later one
    monkeypatch.setattr(train, "evaluate", lambda *_: dict(f1=next(scores)))
    run(data, tmp_path / "out", "--max_iters=5", "--eval_interval=1")
    names = sorted(path.name for path in (tmp_path / "out").glob("*step-*"))
    assert names == ["step-000003", "step-000004", "step-000005"]
    assert checkpoint.best_folder(tmp_path / "out").name == "step-000003"
    Encoder.from_pretrained(checkpoint.best_folder(tmp_path / "out") / "encoder")
    (tmp_path / "out/best").write_text("nonsense")
    assert checkpoint.best_folder(tmp_path / "out").name == "step-000005"


def test_what_is_no_run_is_told_from_a_run_without_checkpoints(a_run, toy, tmp_path):
    for folder in (a_run, toy):
        with pytest.raises(ValueError, match=f"{folder.name}: no checkpoint; the folder of a run"):
            checkpoint.best_folder(folder)
    with pytest.raises(ValueError, match="no checkpoint; `python train.py --out_dir=.*` makes one"):
        checkpoint.best_folder(tmp_path / "new")


def test_a_checkpoint_without_its_checksums_is_told(finished, data, tmp_path):
    shutil.copytree(finished, tmp_path / "out")
    (tmp_path / "out" / LAST / "checksums.json").unlink()
    with pytest.raises(ValueError, match=f"{LAST} has lost its checksums.json"):
        run(data, tmp_path / "out", "--resume=True")


def test_what_does_not_belong_to_a_run_neither_hurts_nor_is_touched(finished, data, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    shutil.copytree(out / LAST, out / ".step-000099")  # what a killed save left
    shutil.copytree(out / LAST, out / "step-000004-mine")
    (out / "step-000014").mkdir()
    (out / "step-notes.txt").touch()
    (out / LAST / ".DS_Store").touch()
    with open(out / "log.jsonl", "a") as log:
        log.write('\n{"step": null}\n' + "[" * 200_000 + '\n{"step": 12, "f')
    run(data, out, "--resume=True", "--max_iters=14", "--eval_interval=1")
    assert not (out / ".step-000099").exists()
    assert (out / "step-000004-mine").exists() and (out / "step-notes.txt").exists()
    assert [line["step"] for line in logged(out)] == [0, 4, 8, 12, 13, 14]


@pytest.mark.parametrize("limit", [3_000, 30_000])
def test_a_full_disk_leaves_the_previous_checkpoint(finished, data, tmp_path, limit):
    shutil.copytree(finished, tmp_path / "out")
    more = "--resume=True", "--max_iters=13"
    code, said = interrupted("none", -1, data, tmp_path / "out", *more, limit=limit)
    message = said.splitlines()[-1]
    assert code == 2
    assert message.startswith(f"{tmp_path / 'out'}/step-000013 cannot be saved: ")
    assert f"({tmp_path / 'out' / LAST}) is whole" in message and "Traceback" not in said
    assert_same(finished / LAST, tmp_path / "out" / LAST)
    assert not list((tmp_path / "out").glob(".step*"))


def test_a_folder_that_cannot_be_written_is_one_line(data, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file/out: Not a directory; choose another"):
        run(data, tmp_path / "file/out")


def test_every_file_of_a_checkpoint_is_guarded(finished, tmp_path):
    whole, copy = finished / LAST, tmp_path / LAST
    for path in sorted(path for path in whole.rglob("*") if path.is_file()):
        shutil.copytree(whole, copy, dirs_exist_ok=True)
        broken = copy / path.relative_to(whole)
        content = bytearray(broken.read_bytes())
        content[len(content) // 2] ^= 1
        broken.write_bytes(content)
        with pytest.raises(ValueError, match="not as saved|is not JSON"):
            checkpoint.verify(copy)
        if path.name != "checksums.json":
            broken.unlink()
            with pytest.raises(ValueError, match=f"{path.name} not as saved"):
                checkpoint.verify(copy)


def test_steps_gone_bad_are_skipped_and_change_nothing(data, tmp_path, capsys, monkeypatch):
    factors = iter([1] * 5 + [float("nan")] * 2 + [1] * 5)
    forward, lr_multiplier, updates = train.Grounding.forward, train.lr_multiplier, set()

    def sometimes_bad(self, *inputs):
        loss, parts = forward(self, *inputs)
        return loss * next(factors), parts

    def counted(step):
        updates.add(step)
        return lr_multiplier(step)

    monkeypatch.setattr(train.Grounding, "forward", sometimes_bad)
    monkeypatch.setattr(train, "lr_multiplier", counted)
    run(data, tmp_path / "out")
    assert capsys.readouterr().out.count("is not finite, the step is skipped") == 2
    assert len(updates) == 10
    tensors = contents(checkpoint.newest(tmp_path / "out")).values()
    assert all(x.isfinite().all() for x in tensors if isinstance(x, torch.Tensor))


def test_a_run_gone_bad_for_good_ends_and_names_its_checkpoint(data, tmp_path):
    code, said = interrupted("NAN", 5, data, tmp_path / "out", "--max_iters=20")
    assert code == 2 and "Traceback" not in said
    assert re.search("step 14: ten steps in a row .*out/step-000004", said)


def test_a_run_whose_last_step_is_bad_says_so(data, tmp_path):
    code, said = interrupted("NAN", 10, data, tmp_path / "out")
    assert code == 2 and "step 11 was not finite" in said.splitlines()[-1]


@pytest.mark.parametrize("value", [1e25, -3e38])
def test_one_absurd_observation_spoils_no_step(data, tmp_path, capsys, value):
    shutil.copytree(data, tmp_path / "toy")
    obs(value)(tmp_path / "toy")
    run(tmp_path / "toy", tmp_path / "out")
    assert "skipped" not in capsys.readouterr().out
    assert checkpoint.newest(tmp_path / "out").name == LAST


def test_training_without_any_caption_is_refused_unless_meant(data, tmp_path):
    shutil.copytree(data, tmp_path / "toy")
    text = tmp_path / "toy/train-00000.jsonl"
    text.write_text(re.sub(r'"captions": .*', '"captions": []}', text.read_text()))
    with pytest.raises(ValueError, match="no caption in the annotated episodes"):
        run(tmp_path / "toy", tmp_path / "a")
    run(tmp_path / "toy", tmp_path / "a", "--n_annotated=0", "--max_iters=4")


def test_the_batches_read_ahead_are_those_of_the_steps(data):
    tokenizer = Tokenizer.from_captions(TEXTS)
    episodes = Episodes(data, "train")
    windows = Windows(episodes, train.text_of(episodes, [0, 1], None), tokenizer, 16, 0, 2)
    batches = list(windows.batches(range(3, 7), range(2)))
    for step, [batch] in zip(range(3, 7), batches, strict=True):
        assert torch.equal(batch.obs, windows.batch(step, range(2))[0].obs)
    assert list(windows.batches(range(5, 5), range(2))) == []


def test_shares_are_even_and_cover_all_windows(monkeypatch):
    monkeypatch.setattr(distributed, "WORLD", 3)
    shares = []
    for rank in range(3):
        monkeypatch.setattr(distributed, "RANK", rank)
        shares.append(list(distributed.share(8)))
    assert sum(shares, []) == list(range(8))
    assert {len(share) for share in shares} == {2, 3}
