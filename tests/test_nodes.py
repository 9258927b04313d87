"""Two nodes, each with a torchrun of its own, of which one is lost and comes back."""

import contextlib
import functools
import importlib
import os
import re
import signal
import socket
import time

import interrupted
import pytest
from conftest import toy
from test_processes import SMALL, together
from test_runs import assert_same

from bench.faults import fork, wait
from runtime import checkpoint

pytestmark = pytest.mark.skipif("SLOW" not in os.environ, reason="takes minutes; SLOW=1 runs it")


def node(command):
    """The torchrun of a node; what it starts is in its process group. Processes are forks."""
    from torch.distributed.run import main as torchrun

    os.setsid()
    signal.alarm(300)  # nodes that wait for each other for ever are a failure
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    torchrun(command)


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def test_a_node_that_is_lost_comes_back_and_the_run_goes_on(tmp_path):
    importlib.import_module("torch._inductor")  # train.py needs it: once, before the forks
    data, out = toy.__wrapped__(tmp_path), tmp_path / "out"
    start = "--nnodes=2 --nproc_per_node=1 --max_restarts=3 --local_addr=127.0.0.1 --rdzv_id=x"
    start += f" --rdzv_backend=c10d --rdzv_endpoint=127.0.0.1:{free_port()} --monitor_interval=0.1"
    start += " --run_path --start_method=fork"
    patience = "--rdzv_conf=keep_alive_interval=1,keep_alive_max_attempt=2,is_host="
    run = [*SMALL, "--max_iters=30", f"--data={data}", f"--out_dir={out}", "--resume"]
    nodes = []

    def begin(name, is_host=0):
        command = [*start.split(), f"{patience}{is_host}", interrupted.__file__, "none", "0", *run]
        nodes.append(fork(functools.partial(node, command), tmp_path / name))
        return nodes[-1]

    first, second = begin("first", is_host=1), begin("second")
    while not checkpoint.newest(out):
        time.sleep(0.05)
    os.killpg(second, signal.SIGKILL)
    os.waitpid(second, 0)
    assert checkpoint.newest(out).name != "step-000030"
    codes = wait(begin("again")), wait(first)
    for process in nodes:  # what is left of them, where they fail
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process, signal.SIGKILL)
    printed = (tmp_path / "first").read_text() + (tmp_path / "again").read_text()
    assert codes == (0, 0), printed[-3000:]
    assert re.search("resuming from .*/step-0000", printed)
    together(2, data, tmp_path / "whole", "--max_iters=30")
    assert_same(checkpoint.newest(tmp_path / "whole"), checkpoint.newest(out))
