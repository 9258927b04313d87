import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import meter
import train
from encoder import Encoder
from model import Config, GPTNeoX


def grounding():
    shape = Config(300, 64, 2, 2)
    return train.Grounding(Encoder(GPTNeoX(shape), 6, 16), train.Predictor(GPTNeoX(shape), 64, K=4))


def test_flops_are_those_that_torch_counts():
    lm = grounding().encoder.lm
    with FlopCounterMode(display=False) as counter, torch.no_grad(): lm(torch.zeros(4, 16, dtype=torch.int64))
    ours = meter.forward_flops(lm, 4 * 16, 16, 4 * 16)        # torch counts the whole square of attention
    assert ours == pytest.approx(counter.get_total_flops(), rel=0.05)


def test_a_step_of_training_costs_what_torch_counts_forward_and_backward():
    model = grounding()
    model.predicts = False
    with FlopCounterMode(display=False) as counter: model.encoder.lm(torch.zeros(4, 16, dtype=torch.int64)).sum().backward()
    assert meter.Meter(model, 4, 16, 1.0, "cpu").train == pytest.approx(counter.get_total_flops(), rel=0.1)


def test_the_meter_counts_steps_since_it_was_last_read(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(meter.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(meter, "peak_flops", lambda where: 1e9)
    found = meter.Meter(grounding(), 8, 16, 0.5, "cpu")
    for _ in range(10): found.count(False)
    clock[0] = 2.0
    first = found.read()
    assert first["steps_per_s"] == 5 and first["tokens_per_s"] == 5 * 8 * 16 and first["memory_gb"] > 0.05
    assert first["mfu"] == pytest.approx(5 * found.train / 1e9)
    found.count(True)
    clock[0] = 3.0
    assert found.read()["mfu"] == pytest.approx((found.train + found.write) / 1e9)


def test_tensorboard_gets_the_names_and_values_of_the_log(tmp_path):
    pytest.importorskip("tensorboard", reason="pip install -r requirements-extra.txt")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    [mirror] = meter.mirrors("", True, str(tmp_path), {})
    for step in (1, 2): mirror(dict(step=step, ground=0.5 * step, f1=0.25))
    seen = EventAccumulator(str(tmp_path)).Reload()
    assert {"ground", "f1"} <= set(seen.Tags()["scalars"])
    assert [(e.step, e.value) for e in seen.Scalars("ground")] == [(1, 0.5), (2, 1.0)]


def test_wandb_gets_the_line_and_its_step(monkeypatch, tmp_path):
    import sys
    import types
    logged = []
    run = types.SimpleNamespace(log=lambda line, step: logged.append((step, json.dumps(line))))
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **about: run))
    [mirror] = meter.mirrors("project", False, str(tmp_path), {})
    mirror(dict(step=7, f1=0.25))
    assert logged == [(7, '{"step": 7, "f1": 0.25}')]


def test_a_missing_package_is_one_line(monkeypatch, capsys, tmp_path):
    import sys
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(SystemExit): meter.mirrors("project", False, str(tmp_path), {})
    assert "requirements-extra.txt" in capsys.readouterr().err
