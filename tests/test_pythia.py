"""Where checkpoints are found, and what is refused with which words."""

import json
import re
import subprocess
import sys
import types

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file

from model import Config, GPTNeoX

SHAPE = dict(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
NAME = "EleutherAI/pythia-tiny"


@pytest.fixture
def folder(tmp_path):
    GPTNeoX(Config(**SHAPE)).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    """An empty cache, and no huggingface_hub."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    return tmp_path / "hub"


def refused(source, message, kind=ValueError):
    """It is not loaded, and one line says why."""
    with pytest.raises(kind, match=message) as error:
        GPTNeoX.from_pretrained(source)
    assert "\n" not in str(error.value)


def edit(folder, **changes):
    """Changes keys of config.json; None removes one."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: x for key, x in config.items() if x is not None}))


def edit_tensors(folder, **changes):
    tensors = load_file(folder / "model.safetensors") | changes
    save_file({k: x for k, x in tensors.items() if x is not None}, folder / "model.safetensors")


def move_to_cache(hub, folder, commit, ref):
    """The folder as Hugging Face keeps it: models--owner--name/{refs,snapshots}."""
    repo = hub / "models--EleutherAI--pythia-tiny"
    (repo / "refs").mkdir(parents=True, exist_ok=True)
    (repo / "refs" / ref).write_text(commit)
    (repo / "snapshots").mkdir(exist_ok=True)
    folder.rename(repo / "snapshots" / commit)


# -----------------------------------------------------------------------------
# where weights come from


def test_names_are_found_in_the_hugging_face_cache_by_revision_and_commit(no_hub, tmp_path):
    weights = {}
    for commit, ref in (("abc", "main"), ("def", "step3000")):
        model = GPTNeoX(Config(**SHAPE))
        weights[commit] = model.embed_out.weight
        model.save_pretrained(tmp_path / "model")
        move_to_cache(no_hub, tmp_path / "model", commit, ref)
    for revision, commit in {"": "abc", "@main": "abc", "@step3000": "def", "@def": "def"}.items():
        model = GPTNeoX.from_pretrained(NAME + revision)
        assert torch.equal(model.embed_out.weight, weights[commit])


def test_without_the_model_one_line_says_how_to_fetch_it(no_hub, folder):
    command = f"pip install huggingface_hub && hf download {NAME} --revision step3"
    refused(f"{NAME}@step3", re.escape(command), FileNotFoundError)
    (folder / "model.safetensors").unlink()  # a cache that lacks its weights is no better
    move_to_cache(no_hub, folder, "abc", "step3")
    refused(f"{NAME}@step3", re.escape(command), FileNotFoundError)
    refused("out/none/x", "out/none/x: no such directory", FileNotFoundError)


def test_missing_models_are_downloaded_where_huggingface_hub_is_installed(
    no_hub, folder, monkeypatch
):
    def snapshot_download(name, revision, allow_patterns):
        if revision == "main":
            raise OSError("no network\nat all")
        assert (name, revision) == (NAME, "step3")
        assert {"*.json", "*.safetensors"} == set(allow_patterns)
        return str(folder)

    hub = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    GPTNeoX.from_pretrained(f"{NAME}@step3")
    refused(NAME, f"hf download {NAME} .*no network", FileNotFoundError)


# -----------------------------------------------------------------------------
# what is in them


def test_what_no_published_checkpoint_has_is_refused_not_misread(folder):
    edit(folder, tie_word_embeddings=True)
    tensors = load_file(folder / "model.safetensors")
    embed_out = tensors.pop("embed_out.weight")
    save_file(tensors, folder / "model.safetensors")
    refused(folder, "embed_out.weight")
    tensors = {name: x for name, x in tensors.items() if "attention.dense.bias" not in name}
    save_file(tensors | {"embed_out.weight": embed_out}, folder / "model.safetensors")
    refused(folder, "attention.dense.bias")


def test_old_and_new_rotary_keys_and_the_embedding_rows_of_the_weights(folder):
    edit(folder, vocab_size=50432, rotary_pct=0.5, rotary_emb_base=500)
    config = GPTNeoX.from_pretrained(folder).config
    assert (config.vocab_size, config.rotary_pct, config.rotary_emb_base) == (40, 0.5, 500)
    rope = dict(rope_type="default", partial_rotary_factor=1.0, rope_theta=77.0)
    edit(folder, rotary_pct=None, rotary_emb_base=None, rope_parameters=rope)
    config = GPTNeoX.from_pretrained(folder).config
    assert (config.rotary_pct, config.rotary_emb_base) == (1.0, 77.0)
    edit(folder, rope_parameters=None)  # neither: the defaults of transformers
    assert GPTNeoX.from_pretrained(folder).config.rotary_pct == 0.25


def test_ignored_buffers_of_old_checkpoints_are_dropped(folder):
    mask = torch.ones(9, dtype=torch.bool)
    inv_freq = "gpt_neox.layers.1.attention.rotary_emb.inv_freq"
    edit_tensors(folder, **{"gpt_neox.layers.0.attention.bias": mask, inv_freq: torch.ones(2)})
    GPTNeoX.from_pretrained(folder)


CONFIGS = {
    "model_type is 'llama', rope": dict(model_type="llama"),
    "model_type is None": dict(model_type=None),
    "hidden_act is 'relu', like 'gelu'": dict(hidden_act="relu"),
    "rope type 'linear'": dict(rope_scaling=dict(type="linear", factor=2.0)),
    "rope type 'yarn'": dict(rope_parameters=dict(rope_type="yarn", rope_theta=1e4)),
    "hidden_size is '16'": dict(hidden_size="16"),
    "use_parallel_residual is 1": dict(use_parallel_residual=1),
    "num_hidden_layers is 1000000000": dict(num_hidden_layers=10**9),
    "rotary_pct is nan": dict(rotary_pct=float("nan")),
    "rotary_emb_base is 1000": dict(rotary_emb_base=10**400),
    "16 dimensions are not divisible by 3 heads": dict(num_attention_heads=3),
    "Missing key.*layers.2": dict(num_hidden_layers=3),
    "Unexpected key.*layers.1": dict(num_hidden_layers=1),
}


@pytest.mark.parametrize("message", CONFIGS)
def test_a_config_that_is_not_understood_is_refused(folder, message):
    edit(folder, **CONFIGS[message])
    refused(folder, message)


BIAS = "gpt_neox.layers.1.attention.dense.bias"
TENSORS = {
    f"Missing key.*{BIAS}": {BIAS: None},
    "Missing key.*gpt_neox.embed_in.weight": {"gpt_neox.embed_in.weight": None},
    "Unexpected key.*lora": dict(lora=torch.ones(2)),
    rf"size mismatch for {BIAS}: .*\[17\].*\[16\]": {BIAS: torch.ones(17)},
    f"tensor {BIAS} is stored as torch.int8": {BIAS: torch.ones(16, dtype=torch.int8)},
    r"size mismatch for embed_out.weight: .*\[39, 16\]": {"embed_out.weight": torch.ones(39, 16)},
}


@pytest.mark.parametrize("message", TENSORS)
def test_tensors_that_do_not_fit_are_named(folder, message):
    edit_tensors(folder, **TENSORS[message])
    refused(folder, f"{folder}.*: .*{message}")


@pytest.mark.parametrize("size", [0, 5, 500, -1])
def test_truncated_files_are_named(folder, size):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    refused(folder, "model.safetensors.*truncated")


def test_shards_are_read_and_a_lost_one_shows(folder):
    whole, tensors = folder / "model.safetensors", load_file(folder / "model.safetensors")
    for n in (0, 1):
        names = sorted(tensors)[n::2]
        save_file({x: tensors[x] for x in names}, folder / f"model-{n}.safetensors")
    whole.unlink()
    model = GPTNeoX.from_pretrained(folder)
    assert all(torch.equal(p, tensors[name]) for name, p in model.named_parameters())
    (folder / "model-1.safetensors").unlink()
    refused(folder, "Missing key")


def save_shards(model, folder, n):
    """As transformers saves in n shards, with the index that says which has which tensor."""
    folder.mkdir(exist_ok=True)
    tensors, weight_map = load_file(model / "model.safetensors"), {}
    for k in range(n):
        name, names = f"model-{k + 1:05d}-of-{n:05d}.safetensors", sorted(tensors)[k::n]
        save_file({x: tensors[x] for x in names}, folder / name)
        weight_map |= dict.fromkeys(names, name)
    index = json.dumps(dict(metadata={}, weight_map=weight_map))
    (folder / "model.safetensors.index.json").write_text(index)
    (folder / "config.json").write_bytes((model / "config.json").read_bytes())


def test_of_two_savings_in_one_folder_the_index_tells_which_counts(folder, tmp_path):
    both, right = tmp_path / "both", load_file(folder / "model.safetensors")
    GPTNeoX(Config(**SHAPE)).save_pretrained(tmp_path / "other")
    save_shards(tmp_path / "other", both, 3)
    save_shards(folder, both, 2)
    model = GPTNeoX.from_pretrained(both)
    assert all(torch.equal(p, right[name]) for name, p in model.named_parameters())
    (both / "model-00002-of-00002.safetensors").rename(tmp_path / "elsewhere")
    refused(both, "model-00002-of-00002.safetensors is missing")
    (both / "model.safetensors.index.json").unlink()
    refused(both, r"shards of several savings \(of 00002, of 00003\)")


def test_an_index_that_leads_out_of_the_folder_is_refused(folder):
    (folder / "model.safetensors").rename(folder.parent / "x.safetensors")
    for weight_map in (dict(a="../x.safetensors"), dict(a=3), ["a"]):
        index = json.dumps(dict(weight_map=weight_map))
        (folder / "model.safetensors.index.json").write_text(index)
        refused(folder, "index.json: weight_map is not")


def test_a_tensor_that_two_shards_have_is_refused(folder):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    bias = load_file(folder / "model-00001-of-00002.safetensors")["embed_out.weight"]
    save_file({"embed_out.weight": bias + 1}, folder / "model-00002-of-00002.safetensors")
    refused(folder, "another shard has embed_out.weight too")


def test_of_a_bin_the_line_is_told_that_converts_it(folder, monkeypatch):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    shared = tensors | dict.fromkeys(["embed_out.weight"], tensors["gpt_neox.embed_in.weight"])
    torch.save(shared, folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="convert the .bin: cd '") as error:
        GPTNeoX.from_pretrained(folder)
    line = re.search('python -c "(.*)"$', str(error.value))[1]
    monkeypatch.chdir(folder)
    exec(line, {})
    model = GPTNeoX.from_pretrained(folder)
    assert all(torch.equal(p, shared[name]) for name, p in model.named_parameters())


def test_missing_files_are_named(folder):
    (folder / "model.safetensors").unlink()
    refused(folder, "model.safetensors is missing", FileNotFoundError)
    (folder / "config.json").write_text("{")
    refused(folder, "config.json is not JSON")
    (folder / "config.json").unlink()
    refused(folder, "config.json is missing")


MEASURE = """
import sys
import torch
from model import GPTNeoX

def memory():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

before = memory()
model = GPTNeoX.from_pretrained(sys.argv[1])
print((memory() - before) / sum(p.nbytes for p in model.parameters()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_loaded_model_takes_its_own_memory_and_none_for_the_file(tmp_path):
    GPTNeoX(Config(hidden_size=256, num_hidden_layers=2)).save_pretrained(tmp_path)
    command = [sys.executable, "-c", MEASURE, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert 0.9 < float(done.stdout) < 1.15
