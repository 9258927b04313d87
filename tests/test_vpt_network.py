"""The VPT network agrees with OpenAI's, however a recording is cut; other weights are refused."""

import importlib
import json
import sys
import types

import pytest
import torch
import vpt_made
from safetensors.torch import load_file
from vpt_made import SAMPLES, recipe, relative, save_weights, small, with_samples

from domains.vpt import network as vpt_network
from domains.vpt.network import VPT

# Latents of golden(), from this file's network when it agreed with every fixture to 4e-6.
GOLDEN = torch.tensor(
    [
        [1.0688, -0.26555, 1.94108, -0.18578, -0.41456, 0.30457],
        [-1.029, -1.04866, -0.14529, 0.86602, -0.49004, -0.4006],
        [-0.46475, -0.96035, -0.07108, 1.5494, -0.86795, 1.62032],
    ]
)


def frames(B, T, size, seed=3):
    return torch.randint(
        0,
        256,
        (B, T, size, size, 3),
        dtype=torch.uint8,
        generator=torch.Generator().manual_seed(seed),
    )


def run(vpt, frames, first, chunks):
    """frames in chunks, `first` (B, T) -> latent (B, T, D), and the last state."""
    latents, state, t = [], None, 0
    for n in chunks:
        latent, state = vpt(frames[:, t : t + n], first[:, t], state)
        latents.append(latent)
        t += n
    return torch.cat(latents, dim=1), state


def golden(vpt):
    """A few latents of the small network: two rows, 12 frames, row 1 starts anew at frame 7."""
    pixels = (recipe("frames", (2, 12, 32, 32, 3)) * 1e3).long().remainder(256).to(torch.uint8)
    first = torch.zeros(2, 12, dtype=torch.bool)
    first[1, 7] = True
    latent, _ = run(vpt, pixels, first, [3, 4, 1, 4])
    return torch.stack([latent[0, 11, :6], latent[1, 8, :6], latent[1, 11, :6]])


def test_latents_are_those_of_the_published_network():
    assert relative(golden(small()), GOLDEN) < 1e-4


MISTAKES = {
    "no relative term": [
        ('torch.einsum("bhtn,ntk->bhtk", r, curve)', 'torch.einsum("bhtn,ntk->bhtk", 0 * r, curve)')
    ],
    "1/sqrt(d)": [("1 / q.shape[-1]", "q.shape[-1] ** -0.5")],
    "window - 1": [("(distance < W)", "(distance < W - 1)")],
    "window + 1": [("(distance < W)", "(distance < W + 1)")],
    "first is ignored": [("valid & ~first[:, None]", "valid")],
    "residual before the norm": [
        ("x = self.pre_r_ln(x) ", "skip, x = x, self.pre_r_ln(x) "),
        ("x = x + out", "x = skip + out"),
    ],
    "BGR": [("frames.permute(", "frames.flip(-1).permute(")],
    "flattened as H, W, C": [("x.flatten(1)", "x.permute(0, 2, 3, 1).flatten(1)")],
    "no relu after the second convolution": [
        ('block["conv1"](block["conv0"](x))', 'block["conv1"].layer(block["conv0"](x))')
    ],
    "no relu before the last layer": [("self.lastlayer(F.relu(x))", "self.lastlayer(x)")],
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_network_would_be_seen(mistake):
    source = open(vpt_network.__file__).read()
    for right, wrong in MISTAKES[mistake]:
        assert source.count(right) == 1, right
        source = source.replace(right, wrong)
    module = types.ModuleType("mutant")
    exec(source, module.__dict__)
    assert relative(golden(small(module)), GOLDEN) > 5e-3


@pytest.mark.parametrize("chunks", [[1] * 12, [5, 7], [3, 3, 3, 3], [11, 1]])
def test_any_chunking_gives_the_result_of_the_whole(chunks):
    vpt, x, first = small(), frames(2, 12, 32), torch.zeros(2, 12, dtype=torch.bool)
    assert relative(run(vpt, x, first, chunks)[0], run(vpt, x, first, [12])[0]) < 5e-6


def test_a_reset_equals_a_fresh_start_and_leaves_the_other_row_alone():
    vpt, x, first = small(), frames(2, 12, 32), torch.zeros(2, 12, dtype=torch.bool)
    whole, _ = run(vpt, x, first, [12])
    first[1, 6] = True
    found, _ = run(vpt, x, first, [6, 6])
    assert relative(found[0], whole[0]) < 5e-6
    assert relative(found[1:, 6:], run(vpt, x[1:, 6:], first[1:, 6:], [6])[0]) < 5e-6


def test_a_file_of_weights_is_read_without_its_heads(tmp_path):
    vpt = VPT.from_weights(save_weights(tmp_path / "a.weights"))
    assert (vpt.D, vpt.window, vpt.size) == (32, 4, 32)
    assert relative(golden(vpt), GOLDEN) < 1e-4


ATTENTION = "net.recurrent_layer.blocks.0.r.orc_block."


@pytest.mark.parametrize(
    "change, complaint",
    [
        (lambda t: t.pop("net.lastlayer.layer.weight"), "net.lastlayer.layer.weight"),
        (lambda t: t.pop("net.final_ln.weight"), "final_ln.weight is missing"),
        (lambda t: t.update({"net.conv3d_layer.layer.weight": torch.zeros(1)}), "net.conv3d_layer"),
        (lambda t: t.update({"net.final_ln.bias": torch.zeros(31)}), "net.final_ln.bias"),
        (lambda t: t.update({"net.final_ln.bias": "text"}), "state dict"),
        (lambda t: t.update({"net.final_ln.weight": torch.tensor(1.0)}), "of another shape"),
        (lambda t: t.update({7: torch.zeros(1)}), "no state dict of named tensors"),
        (lambda t: t.update({ATTENTION + "r_layer.weight": torch.zeros(30, 32)}), "for 3 heads"),
        (lambda t: t.clear(), "missing"),
    ],
)
def test_weights_of_another_network_are_one_clear_error(tmp_path, change, complaint):
    tensors = torch.load(save_weights(tmp_path / "a.weights"))
    change(tensors)
    torch.save(tensors, tmp_path / "b.weights")
    with pytest.raises(ValueError, match=complaint):
        VPT.from_weights(tmp_path / "b.weights")


def test_a_norm_before_the_recurrence_is_read_where_the_weights_have_one(tmp_path):
    vpt = small(pre_lstm_ln=True)
    x, first = frames(1, 5, 32), torch.ones(1, dtype=torch.bool)
    latent, _ = VPT.from_weights(save_weights(tmp_path / "a.weights", vpt))(x, first)
    seen = torch.nn.functional.layer_norm(
        vpt.see(x[0]), (32,), vpt.pre_lstm_ln.weight, vpt.pre_lstm_ln.bias
    )
    expected, _ = small().remember(seen[None], first)
    assert relative(latent, expected) < 1e-6


@pytest.mark.parametrize(
    "content", [b"", b"<?xml version='1.0'?><Error/>", b"PK\x03\x04 cut short"]
)
def test_a_file_that_holds_no_weights_is_one_clear_error(tmp_path, content):
    (tmp_path / "a.weights").write_bytes(content)
    with pytest.raises(ValueError, match="a.weights: not a .weights file"):
        VPT.from_weights(tmp_path / "a.weights")


def test_a_pickle_is_never_executed(tmp_path):
    (tmp_path / "a.model").write_bytes(
        b"cbuiltins\nexec\n(S'open(%r, \"w\")'\ntR." % str(tmp_path / "ran").encode()
    )
    with pytest.raises(ValueError, match="not a .weights file"):
        VPT.from_weights(tmp_path / "a.model")
    assert not (tmp_path / "ran").exists()


@with_samples
def test_tiny32_agrees_in_latents_traces_and_caches():
    vpt, want = (
        VPT.from_weights(SAMPLES / "fixtures/fake.weights"),
        load_file(SAMPLES / "fixtures/tiny32.safetensors"),
    )
    x, first, about = (
        want["io.frames"],
        want["io.first"].bool(),
        json.loads((SAMPLES / "fixtures/tiny32.json").read_text()),
    )
    never = torch.zeros_like(first)
    found, state = run(vpt, x, first, about["chunks"])
    assert relative(found, want["io.latent"]) < 1e-4
    for layer, (valid, k, v) in enumerate(state):
        assert (valid[:, None] == want[f"io.state.{layer}.mask"].bool()).all()
        assert (
            relative(k, want[f"io.state.{layer}.k"]) < 1e-4
            and relative(v, want[f"io.state.{layer}.v"]) < 1e-4
        )
    for chunks in [[24], [1] * 24, [5, 1, 3, 8, 1, 2, 4], [23, 1], [3] * 8]:
        assert relative(run(vpt, x, never, chunks)[0], want["io.latent_noreset"]) < 1e-4


def traces(vpt, modules, run):
    """What the named modules give while run() runs, their calls strung together."""
    seen = {name: [] for name in modules}
    hooks = [
        module.register_forward_hook(
            lambda m, x, y, name=name: seen[name].append(y[0] if isinstance(y, tuple) else y)
        )
        for name, module in modules.items()
    ]
    run()
    for hook in hooks:
        hook.remove()
    return {
        name: torch.cat(parts, dim=1 if parts[0].ndim == 3 else 0) for name, parts in seen.items()
    }


def assert_stages_agree(vpt, want, chunks, first):
    """Per frame: the convolutions and the embedding; in time: every block."""
    x = want["io.frames"]
    found = traces(
        vpt,
        dict(cnn=vpt.img_process["cnn"]["dense"], img=vpt.img_process["linear"]),
        lambda: vpt.see(x.flatten(0, 1)),
    )
    blocks = {f"block{i}": block for i, block in enumerate(vpt.recurrent_layer["blocks"])}
    found |= traces(vpt, blocks, lambda: run(vpt, x, first, chunks))
    for name, value in found.items():
        expected = want[f"io.trace.{name}"]
        assert relative(value.view(expected.shape), expected) < 1e-4, name


@with_samples
def test_every_stage_of_tiny32_agrees():
    vpt, want = (
        VPT.from_weights(SAMPLES / "fixtures/fake.weights"),
        load_file(SAMPLES / "fixtures/tiny32.safetensors"),
    )
    chunks = json.loads((SAMPLES / "fixtures/tiny32.json").read_text())["chunks"]
    assert_stages_agree(vpt, want, chunks, want["io.first"].bool())


@with_samples
def test_the_1x_geometry_agrees():
    about, want = (
        json.loads((SAMPLES / "fixtures/recipe1x.json").read_text()),
        load_file(SAMPLES / "fixtures/recipe1x.safetensors"),
    )
    vpt = vpt_made.fill(
        VPT(channels=[64, 128, 128], D=1024, heads=8, layers=4, window=128, size=128)
    )
    assert {name: list(p.shape) for name, p in vpt.state_dict().items()} == about["shapes"]
    sys.path.append(str(SAMPLES))
    want["io.frames"], never = (
        importlib.import_module("recipe").make_frames(1, 8, 128, 11),
        torch.zeros(1, 8, dtype=torch.bool),
    )
    assert (
        relative(run(vpt, want["io.frames"], never, about["chunks"])[0], want["io.latent"]) < 1e-4
    )
    assert_stages_agree(vpt, want, about["chunks"], never)


@pytest.mark.parametrize(
    "width, D, heads, parameters",
    [(4, 1024, 8, 62_016_576), (8, 2048, 16, 230_539_904), (12, 3072, 24, 505_575_616)],
)
def test_the_sizes_of_1x_2x_and_3x_are_read_off_their_tensors(width, D, heads, parameters):
    sizes = dict(
        channels=[16 * width, 32 * width, 32 * width],
        D=D,
        heads=heads,
        layers=4,
        window=128,
        size=128,
    )
    with torch.device("meta"):
        vpt = VPT(**sizes)
    assert vpt_network.geometry(vpt.state_dict(), "x") == sizes | dict(pre_lstm_ln=False)
    assert sum(p.numel() for p in vpt.parameters()) == parameters
