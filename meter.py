"""
What training shows of itself: speed, model FLOPs utilisation, memory; and the log's lines once more in W&B or TensorBoard.

    meter = Meter(model, rows, steps, annotated_fraction, where)        rows: windows of a training step, of `steps` steps each
    meter.count(writes)                                      after every step; writes: whether the target wrote
    meter.read()                                             dict(steps_per_s, tokens_per_s, mfu, memory_gb) since the last reading

FLOPs are counted as in PaLM (Chowdhery et al. 2022, appendix B): what the model needs, a backward pass twice a forward pass.
"""
import sys
import time

import torch

from configurator import stop

PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "T4": 65e12}   # dense 16-bit FLOPs per second


def forward_flops(lm, rows, keys, spoken):
    """Of `rows` positions that see `keys` others on average, `spoken` of which become logits."""
    c, body = lm.config, sum(p.numel() for p in lm.gpt_neox["layers"].parameters())
    return 2 * rows * body + 4 * rows * keys * c.hidden_size * c.num_hidden_layers + 2 * spoken * c.vocab_size * c.hidden_size


def peak_flops(where):
    """FLOPs per second of a device: the maker's figure where PEAK has it, else what its fastest of a few matrix products reaches."""
    if where.startswith("cuda"):
        for name, flops in PEAK.items():
            if name in torch.cuda.get_device_name(): return flops
    a, best = torch.ones(1024, 1024, device=where), 0.0
    for _ in range(5):
        started = time.perf_counter()
        (a @ a)[0, 0].item()                                 # waits for the device
        best = max(best, 2 * 1024 ** 3 / (time.perf_counter() - started))
    return best


def memory(where):
    """Most bytes held so far: of the GPU's memory, else of the process."""
    if where.startswith("cuda"): return torch.cuda.max_memory_allocated()
    import resource  # not on Windows
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Meter:
    def __init__(self, model, rows, steps, annotated_fraction, where, devices=1):
        encoder, predictor, positions = model.encoder.lm, model.predictor.lm, rows * steps
        blocks = positions // model.predictor.stride * model.predictor.K * model.predicts
        self.write = forward_flops(encoder, positions, steps / 2, positions)
        self.train = 3 * (forward_flops(encoder, positions, steps / 2, positions * annotated_fraction)
                          + forward_flops(predictor, (positions + blocks) * model.predicts, steps / 2, blocks))
        self.where, self.positions, self.peak = where, positions, devices * peak_flops(where)
        self.since, self.steps, self.flops = time.perf_counter(), 0, 0.0

    def count(self, writes):
        self.steps, self.flops = self.steps + 1, self.flops + self.train + self.write * writes

    def read(self):
        now = time.perf_counter()
        took = now - self.since
        found = dict(steps_per_s=self.steps / took, tokens_per_s=self.steps * self.positions / took, mfu=self.flops / took / self.peak,
                     memory_gb=memory(self.where) / 1e9)
        self.since, self.steps, self.flops = now, 0, 0.0
        return found


def mirrors(wandb_project, tensorboard, out_dir, config):
    """Functions that take a line of the log, {name: value}: one for W&B and one for TensorBoard, where they are switched on."""
    found = []
    try:
        if wandb_project:
            import wandb
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter
    except ImportError as error: stop(f"{error}; pip install -r requirements-extra.txt")
    if wandb_project:
        run = wandb.init(project=wandb_project, dir=out_dir, config=config)
        found.append(lambda line: run.log(line, step=line["step"]))
    if tensorboard:
        board = SummaryWriter(out_dir)
        found.append(lambda line: [board.add_scalar(name, value, line["step"]) for name, value in line.items()] and board.flush())
    return found
