"""How many processes train, and in how many micro-batches, changes nothing: gloo on the CPU."""

import functools
import json
import re
import warnings

import interrupted
import pytest
import torch
import torch.distributed as dist
from conftest import toy
from test_runs import assert_same, contents

from bench.faults import fork, wait
from encoder import Encoder, Features
from runtime import checkpoint, distributed

SMALL = """--n_embd=16 --n_layer=2 --n_head=2 --T=16 --K=2 --batch_size=8 --n_annotated=3
    --device=cpu
    --learning_rate=0.01 --projector_lr=0.01 --max_iters=10 --eval_interval=5""".split()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return toy.__wrapped__(tmp_path_factory.mktemp("data"))


def together(n, data, out, *more, what="none", **how):
    """Trains in n processes: [(exit status, what it printed), ..]."""
    arguments = [*SMALL, f"--data={data}", f"--out_dir={out}", *more]
    ended = interrupted.start(n, arguments, what, **how)
    if what == "none":
        assert not any(code for code, _ in ended), ended[0][1][-2000:]
    return ended


def largest_difference(one, two, but="nothing"):
    one, two = (contents(checkpoint.newest(out)) for out in (one, two))
    names = [name for name in one if "safetensors" in name and but not in name]
    return max((one[x] - two[x]).abs().max().item() for x in names if one[x].numel())


def losses(out):
    names = "loss_ground", "loss_predict", "loss_pseudo", "norm"
    _, *rows = [json.loads(line) for line in open(out / "log.jsonl")]
    return [row[name] for row in rows for name in names]


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    """Runs in one process: in float64, and in float32."""
    folder = tmp_path_factory.mktemp("alone")
    together(1, data, folder / "float64", dtype=torch.float64)
    together(1, data, folder / "float32")
    assert min(losses(folder / "float64")[2::4]) > 0  # the reader's text takes part
    return folder


@pytest.mark.parametrize("n, micro_batch", [(1, 3), (4, 1), (3, 2)])
def test_neither_processes_nor_micro_batches_change_the_run(alone, data, tmp_path, n, micro_batch):
    together(n, data, tmp_path / "out", f"--micro_batch={micro_batch}", dtype=torch.float64)
    assert losses(tmp_path / "out") == pytest.approx(losses(alone / "float64"), abs=1e-9)
    assert largest_difference(tmp_path / "out", alone / "float64") < 1e-9


def test_in_float32_they_change_it_by_rounding(alone, data, tmp_path):
    together(2, data, tmp_path / "out", "--micro_batch=2")
    assert losses(tmp_path / "out") == pytest.approx(losses(alone / "float32"), abs=1e-3)


def test_processes_with_very_uneven_annotation_agree(data, tmp_path):
    """One annotated episode: most windows have no known step. No micro-batches."""
    for n in (1, 4):
        more = "--n_annotated=1", "--max_iters=8"
        together(n, data, tmp_path / str(n), *more, dtype=torch.float64)
    assert losses(tmp_path / "4") == pytest.approx(losses(tmp_path / "1"), abs=1e-9)


@pytest.fixture(scope="module")
def three(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("three") / "out"
    together(3, data, out)
    return out


def test_three_processes_stop_at_the_same_step_and_go_on_bit_for_bit(three, data, tmp_path):
    stopped = together(3, data, tmp_path / "out", what="TERM", at=6)  # the last one alone hears it
    assert [code for code, _ in stopped] == [0] * 3, stopped[0][1]
    assert "stopped after step 7" in stopped[0][1]
    together(3, data, tmp_path / "out", "--resume=True")
    assert_same(checkpoint.newest(three), checkpoint.newest(tmp_path / "out"))


def test_a_killed_process_is_restarted_from_the_last_checkpoint(data, tmp_path):
    """By torchrun, whose processes are forks: they need not import torch again."""
    from torch.distributed.run import main as torchrun

    start = "--standalone --nproc_per_node=2 --max_restarts=1 --run_path --start_method=fork"
    command = [*start.split(), interrupted.__file__, "KILL", "7", *SMALL]
    command += [f"--data={data}", f"--out_dir={tmp_path / 'out'}"]
    code = wait(fork(functools.partial(torchrun, command), tmp_path / "printed"))
    printed = (tmp_path / "printed").read_text()
    assert code == 0, printed[-2000:]
    assert re.search("resuming from .*/step-000005", printed)
    together(2, data, tmp_path / "whole")
    assert_same(checkpoint.newest(tmp_path / "whole"), checkpoint.newest(tmp_path / "out"))


def test_the_fault_of_one_process_is_one_line(three, data):
    """The first one alone sees that another run is there, the others wait for it."""
    (code, text), (other, lost) = together(2, data, three, what="refused")
    assert code == other == 2 and "Traceback" not in text + lost and "[rank1]" not in lost
    assert (text + lost).count(f"{three}/step-000010 is there: --resume") == 1


def test_where_a_process_is_killed_the_other_ends_in_one_line(data, tmp_path):
    (code, text), (killed, _) = together(2, data, tmp_path / "out", what="KILL", at=7)
    assert code == 2 and killed == -9
    assert "Traceback" not in text and text.count("process 0 ends, for it has lost another") == 1


def test_one_process_gone_bad_makes_all_skip_the_step(data, tmp_path):
    more = "--max_iters=20"
    (code, text), (other, nothing) = together(2, data, tmp_path / "out", more, what="NAN", at=5)
    assert code == other == 2 and "step 14: ten steps in a row not finite" in text
    assert "Traceback" not in text + nothing


def test_a_batch_smaller_than_the_processes_is_one_line(data, tmp_path):
    for code, text in together(2, data, tmp_path / "out", "--batch_size=1", what="refused"):
        assert code == 2 and "--batch_size=1: each of 2 processes needs one" in text


def test_buffers_are_not_sent_at_each_step_nor_is_that_warned_of(tiny, monkeypatch):
    monkeypatch.setattr(distributed, "WORLD", 2)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ddp = distributed.wrap(Encoder(tiny, Features(6), 16))
        assert ddp.modules_buffers and not ddp.will_sync_module_buffers()
    finally:
        dist.destroy_process_group()
