"""Where checkpoints are found, what is refused and with which words, how much memory loading takes."""
import fnmatch
import json
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import pythia
from model import Config, GPTNeoX

SHAPE = dict(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    GPTNeoX(Config(**SHAPE)).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    """An empty cache, and no huggingface_hub."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    return tmp_path / "hub"


def same(a, b):
    b = dict(b.named_parameters())
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def edit(folder, **changes):
    file = folder / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


def edit_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def in_cache(hub, folder, commit, ref):
    """The folder as Hugging Face keeps it: models--owner--name/{refs,snapshots}."""
    repo = hub / "models--EleutherAI--pythia-tiny"
    (repo / "refs").mkdir(parents=True, exist_ok=True)
    (repo / "refs" / ref).write_text(commit)
    (repo / "snapshots").mkdir(exist_ok=True)
    folder.rename(repo / "snapshots" / commit)


# ---------------------------------------------------------------------------------------------------------------------
# where weights come from


def test_names_are_found_in_the_hugging_face_cache_by_revision_and_commit(no_hub, tmp_path):
    models = {}
    for commit, ref in (("abc", "main"), ("def", "step3000")):
        model = GPTNeoX(Config(**SHAPE))
        model.save_pretrained(tmp_path / "model")
        models[commit] = dict(model.named_parameters())
        in_cache(no_hub, tmp_path / "model", commit, ref)
    for name, commit in (("", "abc"), ("@main", "abc"), ("@step3000", "def"), ("@def", "def")):
        assert same(models[commit], GPTNeoX.from_pretrained("EleutherAI/pythia-tiny" + name))


def test_the_cache_is_where_the_environment_says(monkeypatch):
    for variable in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"): monkeypatch.delenv(variable, raising=False)
    assert pythia.cache_folder() == Path.home() / ".cache/huggingface/hub"
    monkeypatch.setenv("HF_HOME", "/a")
    assert pythia.cache_folder() == Path("/a/hub")
    monkeypatch.setenv("HF_HUB_CACHE", "/b")
    assert pythia.cache_folder() == Path("/b")


def test_without_the_model_one_line_says_how_to_fetch_it(no_hub, folder):
    command = "pip install huggingface_hub && hf download EleutherAI/pythia-tiny --revision step3 config.json model.safetensors"
    with pytest.raises(FileNotFoundError, match=re.escape(command)): GPTNeoX.from_pretrained("EleutherAI/pythia-tiny@step3")
    (folder / "model.safetensors").unlink()                 # a cache that lacks its weights is no better
    in_cache(no_hub, folder, "abc", "step3")
    with pytest.raises(FileNotFoundError, match=re.escape(command)): GPTNeoX.from_pretrained("EleutherAI/pythia-tiny@step3")
    with pytest.raises(FileNotFoundError, match="out/none/x: no such directory"): GPTNeoX.from_pretrained("out/none/x")


def test_missing_models_are_downloaded_where_huggingface_hub_is_installed(no_hub, folder, monkeypatch, tmp_path):
    asked, offered = [], tmp_path / "offered"
    folder.rename(offered)
    def snapshot_download(name, revision, allow_patterns):
        asked.append((name, revision))
        shutil.copytree(offered, folder, dirs_exist_ok=True, ignore=lambda _, files: {
            f for f in files if not any(fnmatch.fnmatch(f, pattern) for pattern in allow_patterns)})
        return str(folder)
    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=snapshot_download))
    GPTNeoX.from_pretrained("EleutherAI/pythia-tiny@step3")
    assert asked == [("EleutherAI/pythia-tiny", "step3")]
    shutil.rmtree(folder)                                   # an old repository holds pytorch_model.bin only
    torch.save(load_file(offered / "model.safetensors"), offered / "pytorch_model.bin")
    (offered / "model.safetensors").unlink()
    assert GPTNeoX.from_pretrained("EleutherAI/pythia-tiny")
    def fails(*args, **kwargs): raise OSError("no network\nat all")
    monkeypatch.setattr(sys.modules["huggingface_hub"], "snapshot_download", fails)
    with pytest.raises(FileNotFoundError, match="hf download EleutherAI/pythia-tiny .*OSError: no network") as e:
        GPTNeoX.from_pretrained("EleutherAI/pythia-tiny")
    assert "\n" not in str(e.value)


class Trap:
    """An object that acts when it is unpickled."""
    sprung = []

    def __reduce__(self):
        return Trap.spring, ()

    @staticmethod
    def spring():
        Trap.sprung.append(True)
        return torch.ones(2)


@pytest.mark.parametrize("shards", [1, 2])
def test_old_pytorch_files_are_read_without_unpickling_objects(folder, shards):
    tensors = {name: t.half() for name, t in load_file(folder / "model.safetensors").items()}
    kept = {name: t.float() for name, t in tensors.items()}
    tensors["gpt_neox.layers.0.attention.bias"] = torch.ones(1, 1, 9, 9, dtype=torch.bool)
    tensors["gpt_neox.layers.0.attention.masked_bias"] = torch.tensor(-1e9)
    tensors["gpt_neox.layers.0.attention.rotary_emb.inv_freq"] = torch.ones(2)
    (folder / "model.safetensors").unlink()
    names = ["pytorch_model.bin"] if shards == 1 else ["pytorch_model-1.bin", "pytorch_model-2.bin"]
    for i, name in enumerate(names): torch.save(dict(list(tensors.items())[i::shards]), folder / name)
    if shards > 1: (folder / "pytorch_model.bin.index.json").write_text(json.dumps(dict(weight_map=dict(enumerate(names)))))
    assert same(kept, GPTNeoX.from_pretrained(folder))
    torch.save({"x": Trap()}, folder / names[0])
    with pytest.raises(ValueError, match=f"{names[0]} is truncated, or holds more than tensors"): GPTNeoX.from_pretrained(folder)
    assert not Trap.sprung


def test_a_checkpoint_with_both_embeddings_is_tied_only_where_they_are_equal(folder):
    edit(folder, tie_word_embeddings=True)
    assert not GPTNeoX.from_pretrained(folder).config.tie_word_embeddings
    edit_tensors(folder, lambda t: t.update({"embed_out.weight": t["gpt_neox.embed_in.weight"].clone()}))
    model = GPTNeoX.from_pretrained(folder)
    assert model.config.tie_word_embeddings and model.embed_out.weight is model.gpt_neox.embed_in.weight


# ---------------------------------------------------------------------------------------------------------------------
# what is in them


def test_old_and_new_rotary_keys_and_the_embedding_rows_of_the_weights(folder):
    edit(folder, vocab_size=50432, rotary_pct=0.5, rotary_emb_base=500)
    config = GPTNeoX.from_pretrained(folder).config
    assert (config.vocab_size, config.rotary_pct, config.rotary_emb_base) == (40, 0.5, 500)
    edit(folder, rotary_pct=..., rotary_emb_base=..., rope_parameters=dict(rope_type="default", partial_rotary_factor=1.0, rope_theta=77.0))
    config = GPTNeoX.from_pretrained(folder).config
    assert (config.rotary_pct, config.rotary_emb_base) == (1.0, 77.0)
    edit(folder, rope_parameters=None)                                                   # neither: the defaults of transformers
    assert GPTNeoX.from_pretrained(folder).config.rotary_pct == 0.25


@pytest.mark.parametrize("change, message", [
    (dict(model_type="llama"), "model_type is 'llama', but only gpt_neox"),
    (dict(model_type=...), "model_type is None"),
    (dict(hidden_act="relu"), "hidden_act is 'relu', but only gelu"),
    (dict(rope_scaling=dict(type="linear", factor=2.0)), "rope_scaling is .*linear"),
    (dict(rope_parameters=dict(rope_type="yarn", rope_theta=1e4)), "rope_scaling is .*yarn"),
    (dict(hidden_size=...), "hidden_size is None"),
    (dict(num_attention_heads=3), "hidden_size is 16"),
])
def test_a_config_that_is_not_understood_is_refused(folder, change, message):
    edit(folder, **change)
    with pytest.raises(ValueError, match=f"config.json: {message}") as e: GPTNeoX.from_pretrained(folder)
    assert "\n" not in str(e.value)


BIAS = "gpt_neox.layers.1.attention.dense.bias"


@pytest.mark.parametrize("change, message", [
    (lambda t: t.pop(BIAS), f"tensor {BIAS} is missing"),
    (lambda t: t.update(lora=torch.ones(2)), "model.safetensors: tensor lora is unknown"),
    (lambda t: t.update({BIAS: torch.ones(17)}), rf"model.safetensors: {BIAS} has shape \[17\], but config.json asks for \[16\]"),
    (lambda t: t.update({BIAS: torch.ones(16, dtype=torch.int8)}), f"model.safetensors: {BIAS} is stored as I8"),
    (lambda t: t.update({"embed_out.weight": torch.ones(39, 16)}), r"embed_out.weight has shape \[39, 16\]"),
])
def test_tensors_that_do_not_fit_are_named(folder, change, message):
    edit_tensors(folder, change)
    with pytest.raises(ValueError, match=message) as e: GPTNeoX.from_pretrained(folder)
    assert "\n" not in str(e.value) and str(folder) in str(e.value)


def test_ignored_buffers_of_old_checkpoints_are_dropped(folder):
    kept = load_file(folder / "model.safetensors")
    edit_tensors(folder, lambda t: t.update({"gpt_neox.layers.0.attention.bias": torch.ones(9, dtype=torch.bool),
                                             "gpt_neox.layers.1.attention.rotary_emb.inv_freq": torch.ones(2)}))
    assert same(kept, GPTNeoX.from_pretrained(folder))


@pytest.mark.parametrize("keep", [0, 5, 500, -1])
def test_truncated_files_are_named(folder, keep):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match="model.safetensors.*truncated"): GPTNeoX.from_pretrained(folder)


def test_missing_files_are_named(folder):
    GPTNeoX.from_pretrained(folder).save_pretrained(folder, shard_bytes=9000)
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 2 and not (folder / "model.safetensors").exists()              # an earlier save would be read instead
    shards[1].unlink()
    with pytest.raises(FileNotFoundError, match=f"{shards[1].name} is missing"): GPTNeoX.from_pretrained(folder)
    for file in folder.glob("model*"): file.unlink()
    with pytest.raises(FileNotFoundError, match="no model.safetensors"): GPTNeoX.from_pretrained(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is not JSON"): GPTNeoX.from_pretrained(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="config.json is missing"): GPTNeoX.from_pretrained(folder)


def test_a_tensor_larger_than_one_chunk_is_read_whole(tmp_path):
    whole = {"x": torch.randn(100, 7).half()}
    save_file(whole, tmp_path / "model.safetensors")
    assert torch.equal(pythia.read_tensor(pythia.read_index(tmp_path)["x"], torch.float32, chunk=64), whole["x"].float())


MEASURE = """
import sys, torch
from model import GPTNeoX
def memory(key): return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) * 1024
before, dtype = memory("VmRSS"), getattr(torch, sys.argv[2])
model = GPTNeoX.from_pretrained(sys.argv[1], dtype=dtype)
print((memory("VmHWM") - before) / sum(p.numel() * dtype.itemsize for p in model.parameters()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_takes_no_more_memory_than_the_model(tmp_path):
    model = GPTNeoX(Config())                                                            # as Pythia-70m
    for stored, run in (("float16", "float32"), ("float32", "float32"), ("bfloat16", "bfloat16")):
        model.save_pretrained(tmp_path, getattr(torch, stored))
        command = [sys.executable, "-c", MEASURE, str(tmp_path), run]
        peak = float(subprocess.run(command, cwd=Path(pythia.__file__).parent, capture_output=True, text=True, check=True).stdout)
        assert 0.9 < peak < 1.15, (stored, run, peak)
        print(stored, run, peak)
