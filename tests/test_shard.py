"""A run whose weights are sharded is the run of one process: gloo on the CPU."""

import pytest
import torch
import torch.distributed as dist
from conftest import program, toy
from test_processes import losses, together
from test_runs import contents
from torch.testing._internal.distributed.fake_pg import FakeStore

from encoder import Encoder, Features
from model import Config, GPTNeoX
from runtime import checkpoint, distributed
from train import Grounding, Predictor

SHORT = "--max_iters=6 --eval_interval=3 --warmup_iters=2 --pseudo_labels=False".split()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return toy.__wrapped__(tmp_path_factory.mktemp("data"))


def trained(n, data, out, *more, **how):
    return together(n, data, out, *SHORT, *more, dtype=torch.float64, **how)


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone") / "out"
    trained(1, data, out)
    return out


def assert_close(one, two):
    """Weights, moments and losses; names, shapes and dtypes are the same."""
    assert losses(one) == pytest.approx(losses(two), abs=1e-9)
    one, two = (contents(checkpoint.newest(out)) for out in (one, two))
    del one["machine"], two["machine"]  # how many processes there were
    one, two = ({name: torch.as_tensor(x) for name, x in c.items()} for c in (one, two))
    torch.testing.assert_close(one, two, rtol=1e-8, atol=1e-9)


def test_what_four_sharded_processes_saved_one_process_goes_on_from(alone, data, tmp_path):
    more = "--shard", "--micro_batch=1"
    stopped = trained(4, data, tmp_path / "out", *more, what="TERM", at=3)
    assert [code for code, _ in stopped] == [0] * 4, stopped[0][1]
    assert checkpoint.newest(tmp_path / "out").name == "step-000004"
    trained(1, data, tmp_path / "out", "--resume")
    assert_close(tmp_path / "out", alone)


def test_what_one_process_saved_two_sharded_processes_go_on_from(alone, data, tmp_path):
    trained(1, data, tmp_path / "out", what="TERM", at=3)
    trained(2, data, tmp_path / "out", "--resume", "--shard")
    assert_close(tmp_path / "out", alone)
    code, said, err = program("sample.py", f"--out_dir={tmp_path / 'out'}")
    assert code == 0 and "written" in said, err


@pytest.mark.parametrize("more", ["--n_annotated=0", "--predict_weight=0"])
def test_a_sharded_encoder_writes_its_own_text_or_goes_without_a_predictor(data, tmp_path, more):
    trained(1, data, tmp_path / "one", more, "--max_iters=3")
    trained(2, data, tmp_path / "two", more, "--max_iters=3", "--shard")
    assert_close(tmp_path / "one", tmp_path / "two")


def test_each_process_holds_its_part_alone(monkeypatch):
    monkeypatch.setattr(distributed, "WORLD", 8)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    try:
        encoder, predictor = (GPTNeoX(Config(64, 32, 2, 2)) for _ in range(2))
        model = Grounding(Encoder(encoder, Features(6), 16), Predictor(predictor, 32, 4))
        everything = sum(x.numel() for x in model.parameters())
        distributed.place(model, "cpu", True)
        assert sum(x.to_local().numel() for x in model.parameters()) == everything / 8
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("n, more", [(1, ""), (3, "--batch_size=8")])
def test_where_nothing_can_be_shared_it_is_one_line(data, tmp_path, n, more):
    for code, text in together(n, data, tmp_path, "--shard", *more.split(), what="refused"):
        assert code == 2 and "--shard wants torchrun" in text and text.count("\n") == 1
