"""Which of many processes this is: by torchrun, or by all that it would say."""

import socket
from datetime import timedelta

import pytest
import torch

from runtime import distributed
from runtime.distributed import ALONE, ranks

MEANT = dict(RANK="2", WORLD_SIZE="3", MASTER_ADDR="localhost")
BY_TORCHRUN = MEANT | dict(
    TORCHELASTIC_RUN_ID="none",
    LOCAL_RANK="0",
    LOCAL_WORLD_SIZE="2",
    TORCHELASTIC_RESTART_COUNT="1",
)


def test_torchrun_tells_ranks():
    assert ranks(BY_TORCHRUN) == ((2, 3, 0, 2, 1), "")
    assert ranks({}) == (ALONE, "")


@pytest.mark.parametrize(
    "left_over",
    [
        dict(WORLD_SIZE="3"),
        dict(RANK="1", WORLD_SIZE="3", LOCAL_RANK="1", TORCHELASTIC_RESTART_COUNT="1"),
        dict(RANK=""),
        MEANT | dict(RANK=""),
        MEANT | dict(RANK="3"),
        MEANT | dict(WORLD_SIZE="three"),
    ],
)
def test_ranks_left_over_in_the_environment_are_ignored_in_one_line(left_over):
    numbers, told = ranks(left_over)
    assert numbers == ALONE and told.endswith("ignored") and "\n" not in told
    here = {"RANK", "WORLD_SIZE"} & left_over.keys()
    assert all(f"{name}={left_over[name]}" in told for name in here)


def test_other_programs_may_give_all_of_the_ranks_which_is_told():
    told = "process 2 of 3, for the environment has RANK=2 and WORLD_SIZE=3 and MASTER_ADDR="
    assert ranks(MEANT) == ((2, 3, 2, 3, 0), told + "localhost")
    assert ranks(dict(RANK="0", WORLD_SIZE="1", MASTER_ADDR="localhost")) == (ALONE, "")
    assert ranks(dict(MASTER_ADDR="localhost")) == (ALONE, "")


def test_a_run_says_from_where_its_rank_is(monkeypatch, capsys):
    monkeypatch.setattr(distributed, "LEFT_OVER", "RANK=7 in the environment")
    monkeypatch.setattr(torch, "use_deterministic_algorithms", bool)
    assert distributed.init("cpu")[0] == "cpu"
    assert capsys.readouterr().err == "RANK=7 in the environment\n"


def test_where_the_others_do_not_come_a_line_says_so_soon(monkeypatch):
    given = dict(RANK="0", WORLD_SIZE="3", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed, "PATIENCE", timedelta(seconds=0.1))
    with pytest.raises(ValueError, match="not all of .* 1/3 .*; to run alone, unset RANK WORLD_"):
        distributed.meet()


def test_what_a_torchrun_that_is_gone_left_over_is_told_at_once(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    given = MEANT | dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    for name, value in (given | dict(TORCHELASTIC_USE_AGENT_STORE="True")).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"no torchrun at 127.0.0.1:{port} .*refused.*; .* unset"):
        distributed.meet()
