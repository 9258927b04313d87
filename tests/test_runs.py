import json
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, toy
from safetensors.torch import load_file

import checkpoint
import processes
import train
from configurator import Fault, configure
from data import Episodes, Tokenizer
from encoder import Encoder

SMALL = """--hidden_size=16 --num_hidden_layers=2 --num_attention_heads=2 --T=16 --K=2 --batch_size=4 --n_annotated=8 --device=cpu
    --warmup=5 --write_from=3 --accept=0.001 --accept_unit=token --self_weight=0.1 --max_iters=12 --eval_interval=4
    --eval_episodes=2""".split()
STEPS = ["step-000008", "step-000012"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return toy.__wrapped__(tmp_path_factory.mktemp("data"))


def run(data, out, *more, capsys=None):
    """Trains here and now, in this process; the report at the end is left out."""
    kept = dict(vars(train))
    try:
        train.conclude = lambda *_: None
        train.main(configure(vars(train), [*SMALL, f"--data={data}", f"--out_dir={out}", *more]))
    finally:
        vars(train).update(kept)
        torch.use_deterministic_algorithms(False)


def interrupted(what, at, data, out, *more, limit=None):
    """Trains in another process, in which something happens at a step; limit: bytes that no file may exceed, as on a full disk."""
    full = limit and (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    command = [sys.executable, ROOT / "tests/interrupted.py", what, str(at), *SMALL, f"--data={data}", f"--out_dir={out}", *more]
    return subprocess.run(command, capture_output=True, text=True, preexec_fn=full, env=os.environ | {"OMP_NUM_THREADS": "1"})


def contents(folder):
    """All that a checkpoint holds but the settings and how it is packed: {name: tensor or value}."""
    state = torch.load(folder / "state.pt", weights_only=True)
    optimizer = state.pop("optimizer")
    found = {f"optimizer {i} {k}": x for i, kept in optimizer["state"].items() for k, x in kept.items()} | state
    for path in folder.rglob("*.safetensors"): found |= {f"{path.relative_to(folder)} {k}": x for k, x in load_file(path).items()}
    return found


def assert_same(one, two):
    """Bit for bit."""
    one, two = contents(one), contents(two)
    assert one.keys() == two.keys()
    for name, x in one.items(): assert torch.equal(x, two[name]) if isinstance(x, torch.Tensor) else x == two[name], name


def logged(out):
    """The lines of a run's log, without what its speed was."""
    lines = [json.loads(line) for line in open(out / "log.jsonl")]
    return [{k: v for k, v in line.items() if k not in ("steps_per_s", "tokens_per_s", "mfu", "memory_gb")} for line in lines]


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """The folder of a run that is at its end."""
    out = tmp_path_factory.mktemp("finished") / "out"
    run(data, out)
    return out


@pytest.mark.parametrize("signal, code, dtype", [("TERM", 0, "float32"), ("INT", 0, "float32"), ("KILL", -9, "bfloat16")])
def test_a_run_that_was_ended_goes_on_as_if_it_had_not(finished, data, tmp_path, signal, code, dtype):
    out = finished
    if dtype != "float32": run(data, out := tmp_path / "whole", f"--dtype={dtype}")
    done = interrupted(signal, 5, data, tmp_path / "out", f"--dtype={dtype}")
    assert done.returncode == code
    newest = "step-000004" if signal == "KILL" else "step-000006"                       # the step is finished, then saved
    assert checkpoint.newest(tmp_path / "out").name == newest
    if code == 0: assert "stopped after step 6; the same command with --resume=True continues" in done.stdout
    run(data, tmp_path / "out", f"--dtype={dtype}", "--resume=True")
    assert_same(out / STEPS[-1], tmp_path / "out" / STEPS[-1])
    assert logged(out) == logged(tmp_path / "out")
    assert logged(out)[1]["accepted"] > 0                                               # the target's text took part


def test_a_second_ctrl_c_ends_the_process_at_once(data, tmp_path):
    done = interrupted("INTINT", 5, data, tmp_path / "out")
    assert done.returncode == -2 and checkpoint.newest(tmp_path / "out").name == "step-000004"


def test_evaluating_more_often_changes_nothing(finished, data, tmp_path):
    run(data, tmp_path / "out", "--eval_interval=1")
    one, two = contents(finished / STEPS[-1]), contents(tmp_path / "out" / STEPS[-1])
    assert all(torch.equal(x, two[name]) for name, x in one.items() if isinstance(x, torch.Tensor))


def test_a_run_may_be_made_longer_but_not_another_model(finished, data, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "out")
    run(data, tmp_path / "out", "--resume=True", "--max_iters=13", "--eval_interval=13")
    assert "max_iters 12 -> 13" in capsys.readouterr().out and checkpoint.newest(tmp_path / "out").name == "step-000013"
    with pytest.raises(Fault, match=r"is of another model \(K 2 -> 3, hidden_size 16 -> 32\)"):
        run(data, tmp_path / "out", "--resume=True", "--hidden_size=32", "--K=3")


def test_a_run_does_not_go_on_with_other_data(finished, data, tmp_path):
    shutil.copytree(finished, tmp_path / "out")
    shutil.copytree(data, tmp_path / "toy")
    text = tmp_path / "toy/train-00000.jsonl"
    text.write_text(re.sub(r', "crc": \d+', "", text.read_text()).replace("walk", "work"))
    with pytest.raises(Fault, match="was trained on other data"): run(tmp_path / "toy", tmp_path / "out", "--resume=True")
    shutil.copytree(data, tmp_path / "moved")
    run(tmp_path / "moved", tmp_path / "out", "--resume=True")                          # the same data elsewhere is the same data


def test_two_runs_never_share_a_folder(finished, data, tmp_path):
    with pytest.raises(Fault, match="step-000012 is there already: --resume=True continues it"): run(data, finished)
    checkpoint.claim(tmp_path, False)                                                   # which gives up the other claim
    other = f"import checkpoint; checkpoint.claim({str(finished)!r}, True); print(1, flush=True); input()"
    held = subprocess.Popen([sys.executable, "-c", other], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    held.stdout.readline()
    with pytest.raises(Fault, match="another run is writing there"): run(data, finished, "--resume=True")
    held.communicate(b"\n")


def test_the_newest_checkpoints_and_the_best_stay(data, tmp_path, monkeypatch):
    scores = iter([0.2, 0.9, 0.5, 0.9, 0.1])
    monkeypatch.setattr("evaluate.captions", lambda *_, **__: dict(f1=next(scores)))
    run(data, tmp_path / "out", "--max_iters=5", "--eval_interval=1", "--keep=1", "--write_from=9")
    assert sorted(p.name for p in (tmp_path / "out").glob("*step-*")) == ["step-000002", "step-000005"]
    assert checkpoint.chosen(tmp_path / "out").name == "step-000002"
    Encoder.from_pretrained(tmp_path / "out")
    (tmp_path / "out/best").write_text("nonsense")
    assert checkpoint.chosen(tmp_path / "out").name == "step-000005"


def test_what_a_killed_save_left_is_removed(finished, data, tmp_path):
    shutil.copytree(finished, tmp_path / "out")
    shutil.copytree(finished / STEPS[-1], tmp_path / "out/.step-000099.writing")
    run(data, tmp_path / "out", "--resume=True")
    assert not list((tmp_path / "out").glob(".step*"))


@pytest.mark.parametrize("limit", [3_000, 30_000, 90_000])
def test_a_full_disk_leaves_the_previous_checkpoint_and_says_so(finished, data, tmp_path, limit):
    shutil.copytree(finished, tmp_path / "out")
    done = interrupted("none", -1, data, tmp_path / "out", "--resume=True", "--max_iters=13", limit=limit)
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith(f"{tmp_path / 'out'}/step-000013 cannot be saved: ")
    assert f"({tmp_path / 'out' / STEPS[-1]}) is intact" in done.stderr and "Traceback" not in done.stderr
    assert_same(finished / STEPS[-1], tmp_path / "out" / STEPS[-1])
    assert not list((tmp_path / "out").glob(".step*"))


def test_a_folder_that_cannot_be_written_is_one_line(data, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(Fault, match="file/out cannot be written: Not a directory; choose"): run(data, tmp_path / "file/out")


def test_every_file_of_a_checkpoint_is_guarded(finished, tmp_path):
    for path in sorted((finished / STEPS[-1]).rglob("*")):
        if path.is_dir(): continue
        shutil.copytree(finished / STEPS[-1], tmp_path / "step-000012", dirs_exist_ok=True)
        broken = tmp_path / "step-000012" / path.relative_to(finished / STEPS[-1])
        data = bytearray(broken.read_bytes())
        data[len(data) // 2] ^= 1
        broken.write_bytes(data)
        with pytest.raises(Fault, match="not as saved: corrupted; remove that checkpoint"): checkpoint.verify(tmp_path / "step-000012")
        if broken.parent.name == "encoder":
            with pytest.raises(Fault, match=broken.name): Encoder.from_pretrained(broken.parent)
        broken.unlink()
        with pytest.raises(Fault): checkpoint.verify(tmp_path / "step-000012")


def test_steps_gone_bad_are_skipped_and_change_nothing(data, tmp_path, capsys, monkeypatch):
    seen, follow = [], train.follow
    monkeypatch.setattr("train.follow", lambda *given: (seen.append(1), follow(*given)))
    forward, factors = train.Grounding.forward, iter([1] * 5 + [float("nan")] * 2 + [1] * 5)
    monkeypatch.setattr("train.Grounding.forward", lambda self, *x: forward(self, *x) * next(factors))
    run(data, tmp_path / "out")
    said = capsys.readouterr().out
    assert "step 5: loss_ground and loss_predict and loss_self and gradient norm not finite, the step is skipped (number 1)" in said
    assert "(number 2)" in said and len(seen) == 10
    assert all(x.isfinite().all() for x in contents(checkpoint.newest(tmp_path / "out")).values() if isinstance(x, torch.Tensor))


def test_a_run_gone_bad_for_good_names_step_loss_and_checkpoint(data, tmp_path):
    done = interrupted("NAN", 5, data, tmp_path / "out", "--max_bad_steps=1")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert re.search(r"step 6: loss_ground and .* not finite, 2 steps in a row; the last good .* is .*/out/step-000004", done.stderr)


def test_a_spike_is_reported(capsys):
    state = dict(bad=0, skipped=0, norms=[1.0] * 30)
    assert train.sane(7, dict(ground=1.0), 30.0, state) and train.sane(8, dict(ground=1.0), 2.0, state)
    assert capsys.readouterr().out.strip() == "step 7: gradient norm 30, usually 1"


def test_training_without_any_caption_is_refused_unless_meant(data, tmp_path):
    shutil.copytree(data, tmp_path / "toy")
    text = tmp_path / "toy/train-00000.jsonl"
    text.write_text(re.sub(r'"captions": .*', '"captions": []}', text.read_text()))
    with pytest.raises(Fault, match="none of the 8 annotated training episodes has a caption"): run(tmp_path / "toy", tmp_path / "a")
    run(tmp_path / "toy", tmp_path / "a", "--n_annotated=0", "--max_iters=4")


def test_memory_stays_flat_on_data_larger_than_it(tmp_path):
    """A sparse shard of 8 GB: reading windows all over it neither maps nor keeps it, and opening it reads the index alone."""
    import struct
    import time
    rows, D = 8_000_000, 1024
    entries = dict(obs=("U8", [rows, D], rows * D), offsets=("I64", [1001], 8008))
    at, header = 0, {}
    for name, (kind, shape, size) in entries.items(): header[name] = dict(dtype=kind, shape=shape, data_offsets=[at, at := at + size])
    text = json.dumps(header).encode()
    with open(tmp_path / "train-00000.safetensors", "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        f.seek(rows * D, 1)
        f.write(torch.arange(0, rows + 1, rows // 1000).numpy().tobytes())
    line = dict(annotated="all", captions=[dict(start=5, end=6, text="walk")])
    (tmp_path / "train-00000.jsonl").write_text("".join(json.dumps(line | dict(id=str(n))) + "\n" for n in range(1000)))
    (tmp_path / "meta.json").write_text(json.dumps(dict(format=1, obs_dim=D, dtype="uint8", splits=["train"])))
    resident = lambda: int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1e3
    before, started = resident(), time.perf_counter()
    from data import Windows
    windows = Windows(Episodes(tmp_path, "train"), [0, 1], Tokenizer.from_captions(["walk"]), 64, 0.5, 0.2, 0)
    windows.batch(0, range(16))
    assert time.perf_counter() - started < 5
    for step in range(60): windows.batch(step, range(16))
    assert resident() - before < 100


def test_the_batches_read_ahead_are_those_of_the_steps(data):
    from data import Windows
    windows = Windows(Episodes(data, "train"), [0, 1], Tokenizer.from_captions(["walk"]), 16, 0.5, 0.2, 0)
    ahead = list(windows.ahead(range(3, 7), range(2)))
    for step, batch in zip(range(3, 7), ahead, strict=True): assert torch.equal(batch.obs, windows.batch(step, range(2)).obs)
    assert list(windows.ahead(range(5, 5), range(2))) == []


def test_shares_are_even_and_cover_all_windows(monkeypatch):
    monkeypatch.setattr(processes, "WORLD", 3)
    shares = []
    for rank in range(3):
        monkeypatch.setattr(processes, "RANK", rank)
        shares.append(list(processes.share(8)))
    assert sum(shares, []) == list(range(8)) and {len(s) for s in shares} == {2, 3}


def test_the_short_form_of_the_fault_bench():
    short = [sys.executable, "bench/faults.py", "--kills=2", "--disks=2", "--flips=30"]
    done = subprocess.run(short, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "| 2 | 2 ended bit-identical" in done.stdout and "0 tracebacks, 0 wrong" in done.stdout
