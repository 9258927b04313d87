"""How many processes train, and in how many micro-batches, changes nothing: gloo processes on the CPU, started by torchrun."""
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

import interrupted
import pytest
import torch
from conftest import ROOT, toy
from test_runs import assert_same, contents

import checkpoint
import processes
import train

SMALL = """--hidden_size=16 --num_hidden_layers=2 --num_attention_heads=2 --T=16 --K=2 --batch_size=8 --n_annotated=4 --device=cpu
    --write_from=4 --accept=0.001 --accept_unit=token --self_weight=0.1 --max_iters=20 --eval_interval=5
    --eval_episodes=2""".split()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return toy.__wrapped__(tmp_path_factory.mktemp("data"))


def torchrun(n, data, out, *more, what="none", at=-1):
    """train.py in n processes as a user starts them, in the last of which something happens at a step."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}", "--max_restarts=1"]
    command = [*start, ROOT / "tests/interrupted.py", what, str(at), *SMALL, f"--data={data}", f"--out_dir={out}", *more]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def child(rank, n, meeting, what, at, arguments):
    """One of the processes of `together`."""
    said = os.open(f"{meeting}/{rank}.txt", os.O_CREAT | os.O_WRONLY)
    for stream in (1, 2): os.dup2(said, stream)
    sys.stdout, sys.stderr, code = open(1, "w"), open(2, "w"), 1
    try:
        torch.set_num_threads(1)
        processes.RANK, processes.WORLD = rank, n
        processes.dist.rendezvous = lambda _: iter([(processes.dist.FileStore(f"{meeting}/store", n), rank, n)])
        train.conclude = lambda *_: None
        interrupted.main(what, at, arguments)
        code = 0
    except SystemExit as stopped: code = stopped.code
    except BaseException: traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr): stream.flush()
        os._exit(code)


def together(n, data, out, *more, what="none", at=-1):
    """The same, but forked from a server that has imported torch: [(exit status, what it printed), ..]."""
    context, meeting = multiprocessing.get_context("forkserver"), tempfile.TemporaryDirectory()
    context.set_forkserver_preload(["torch"])
    arguments = [*SMALL, f"--data={data}", f"--out_dir={out}", *more]
    children = [context.Process(target=child, args=(rank, n, meeting.name, what, at, arguments)) for rank in range(n)]
    for each in children: each.start()
    for each in children: each.join()
    said = [Path(f"{meeting.name}/{rank}.txt").read_text() for rank in range(n)]
    codes = [each.exitcode for each in children]
    if what == "none": assert not any(codes), said[0][-2000:]
    return list(zip(codes, said, strict=True))


def largest_difference(one, two, but="nothing"):
    one, two = contents(checkpoint.newest(one)), contents(checkpoint.newest(two))
    return max((x - two[name]).abs().max().item() for name, x in one.items() if "safetensors" in name and but not in name)


def losses(out):
    return [json.loads(line)[name] for line in open(out / "log.jsonl") for name in ("ground", "predict", "self", "norm", "accepted")]


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    """{type of numbers: folder of a run in one process}; in float32 the text is held fixed."""
    folder = tmp_path_factory.mktemp("alone")
    together(1, data, folder / "float64", "--dtype=float64")
    together(1, data, folder / "float32", "--write_from=99")
    assert sum(losses(folder / "float64")[4::5]) > 0                                           # self-written text takes part
    return folder


@pytest.mark.parametrize("n, micro_batch", [(1, 3), (2, 0), (4, 1), (3, 2)])
def test_neither_processes_nor_micro_batches_change_the_run(alone, data, tmp_path, n, micro_batch):
    together(n, data, tmp_path / "out", "--dtype=float64", f"--micro_batch={micro_batch}")
    assert losses(tmp_path / "out") == pytest.approx(losses(alone / "float64"), abs=1e-9)
    assert largest_difference(tmp_path / "out", alone / "float64") < 1e-9


def test_in_float32_they_change_it_by_rounding(alone, data, tmp_path):
    together(2, data, tmp_path / "out", "--write_from=99", "--micro_batch=2")
    assert losses(tmp_path / "out") == pytest.approx(losses(alone / "float32"), abs=1e-5)
    # the keys' biases have no gradient but rounding, which AdamW scales up to full steps; and they change no output
    assert largest_difference(tmp_path / "out", alone / "float32", but="query_key_value.bias") < 1e-5


def test_processes_with_very_uneven_annotation_agree(data, tmp_path):
    """One annotated window of eight: three of four processes have none."""
    for n in (1, 4): together(n, data, tmp_path / str(n), "--dtype=float64", "--annotated_fraction=0.125", "--max_iters=8")
    assert losses(tmp_path / "4") == pytest.approx(losses(tmp_path / "1"), abs=1e-9)
    assert largest_difference(tmp_path / "1", tmp_path / "4") < 1e-9


@pytest.fixture(scope="module")
def four(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("four") / "out"
    together(4, data, out)
    return out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_four_processes_stop_at_the_same_step_and_go_on_bit_for_bit(four, data, tmp_path, dtype):
    whole = four
    if dtype == "bfloat16": together(4, data, whole := tmp_path / "whole", "--dtype=bfloat16")
    found = together(4, data, tmp_path / "out", f"--dtype={dtype}", what="TERM", at=6)   # only the last of them hears of it
    assert [code for code, _ in found] == [0] * 4 and "stopped after step 7" in found[0][1]
    together(4, data, tmp_path / "out", f"--dtype={dtype}", "--resume=True")
    assert_same(checkpoint.newest(whole), checkpoint.newest(tmp_path / "out"))


def test_a_killed_process_is_restarted_from_the_last_checkpoint(four, data, tmp_path):
    done = torchrun(4, data, tmp_path / "out", what="KILL", at=13)
    assert done.returncode == 0 and re.search("resuming from .*/step-000010", done.stdout), done.stderr[-2000:]
    assert_same(checkpoint.newest(four), checkpoint.newest(tmp_path / "out"))


def test_one_process_gone_bad_makes_all_skip_the_step(data, tmp_path):
    (code, said), (other, nothing) = together(2, data, tmp_path / "out", "--max_bad_steps=1", what="NAN", at=5)
    assert code == other == 2 and "step 5: loss_ground and" in said and "2 steps in a row" in said and "in a row" not in nothing


def test_a_machine_with_too_few_windows_is_one_line(data, tmp_path):
    for code, said in together(2, data, tmp_path / "out", "--batch_size=1", what="refused"):
        assert code == 2 and "--batch_size=1: 2 processes need a window each" in said


def test_the_default_data_set_is_made_once(data, tmp_path):
    """The others wait for the first process: were they to make it too, or to begin without it, this would end badly."""
    script = tmp_path / "late.py"
    script.write_text(f"""
import shutil, sys, time
sys.path.insert(0, {str(ROOT)!r})
import train
def make():
    print("made")
    time.sleep(2)
    shutil.copytree({str(data)!r}, {str(tmp_path / "late")!r})
train.default_data, train.data, train.device = make, {str(tmp_path / "late")!r}, "cpu"
train.prepare_machine()
train.open_data()
""")
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script],
                          capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and done.stdout.count("made") == 1, done.stderr

