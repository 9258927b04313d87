"""
Checkpoints of the GPT-NeoX family on disk: where they are, what is in them, reading them into a model, writing them.

    folder = find("EleutherAI/pythia-160m@step3000")            # a directory, or a name in the Hugging Face cache, or downloaded
    shape = read_config(folder)                                 # keyword arguments of model.Config
    stored = read_index(folder)                                 # which tensor lies where; nothing is read yet

Formats: safetensors (github.com/huggingface/safetensors: 8 bytes header length, JSON header, data) and PyTorch's zip files; config.json as
transformers 4 and 5 write it. Whatever does not fit raises one line that names file and tensor, before any tensor is read.
"""
import json
import math
import os
import re
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

from files import replace, save_tensors

IGNORED = re.compile(r"attention\.(bias|masked_bias)$|rotary_emb\.inv_freq$")          # buffers of old checkpoints
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
ACTIVATIONS = {"gelu": "none", "gelu_fast": "tanh", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}   # -> F.gelu's approximate
SHAPES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
OTHERS = ("layer_norm_eps", "use_parallel_residual", "attention_bias", "hidden_act", "tie_word_embeddings")


# ---------------------------------------------------------------------------------------------------------------------
# where weights come from


def cache_folder():
    """The Hugging Face cache: HF_HUB_CACHE, or hub/ in HF_HOME, or its default."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home, "hub")).expanduser()


def weight_files(folder):
    """The files that hold the tensors, safetensors first: one, or the shards of an index; FileNotFoundError if one is missing."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        files, index = [folder / name], folder / f"{name}.index.json"
        if not files[0].exists() and index.exists():
            files = [folder / shard for shard in sorted(set(read_json(index).get("weight_map", {}).values()))]
            for file in files:
                if not file.exists(): raise FileNotFoundError(f"{file} is missing, but {index.name} names it: fetch the checkpoint again")
        if files and files[0].exists(): return files
    raise FileNotFoundError(f"{folder}: no model.safetensors, model.safetensors.index.json or pytorch_model.bin there")


def complete(folder):
    try: return (folder / "config.json").exists() and bool(weight_files(folder))
    except FileNotFoundError: return False


def find(name_or_dir):
    """The folder with the config.json and weights of a directory, or of a name on the Hugging Face hub such as
    EleutherAI/pythia-160m or EleutherAI/pythia-160m@step3000: from the local cache, else downloaded if huggingface_hub is installed.
    Raises FileNotFoundError with the command that fetches it.
    """
    if Path(name_or_dir).expanduser().is_dir(): return Path(name_or_dir).expanduser()
    name, _, revision = str(name_or_dir).partition("@")
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name): raise FileNotFoundError(f"{name_or_dir}: no such directory")
    cached = cache_folder() / f"models--{name.replace('/', '--')}"
    ref = cached / "refs" / (revision or "main")
    snapshot = cached / "snapshots" / (ref.read_text().strip() if ref.is_file() else revision or "main")
    return snapshot if complete(snapshot) else download(name, revision or "main")


def download(name, revision):
    missing = f"{name}@{revision} is neither a directory nor in {cache_folder()}; fetch it with: "
    command = f"hf download {name} --revision {revision} config.json model.safetensors tokenizer.json"
    try:
        from huggingface_hub import snapshot_download
    except ImportError: raise FileNotFoundError(f"{missing}pip install huggingface_hub && {command}") from None
    fetch = lambda *weights: Path(snapshot_download(name, revision=revision, allow_patterns=["config.json", "tokenizer.json", *weights]))
    try:
        folder = fetch("model.safetensors", "model-*.safetensors", "model.safetensors.index.json")
        return folder if complete(folder) else fetch("pytorch_model*.bin", "pytorch_model.bin.index.json")
    except Exception as e:               # whatever the network or the hub says, in one line
        raise FileNotFoundError(f"{missing}{command}  ({type(e).__name__}: {next(iter(str(e).splitlines()), '')})") from e


# ---------------------------------------------------------------------------------------------------------------------
# reading


def read_json(file):
    if not file.exists(): raise FileNotFoundError(f"{file} is missing: not a checkpoint in the layout of transformers")
    try: return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as e: raise ValueError(f"{file} is not JSON ({e}): fetch it again") from None


def read_config(folder):
    """Keyword arguments for model.Config from config.json (old keys rotary_pct, rotary_emb_base; new ones rope_parameters)."""
    file = folder / "config.json"
    stored = read_json(file)
    rope = stored.get("rope_parameters") or stored.get("rope_scaling") or {}
    refuse = lambda key, value, accepted: ValueError(f"{file}: {key} is {value!r}, but only {accepted} can be read")
    if stored.get("model_type") != "gpt_neox": raise refuse("model_type", stored.get("model_type"), "gpt_neox")
    if rope.get("rope_type", rope.get("type", "default")) != "default": raise refuse("rope_scaling", rope, "plain rotary embedding")
    if stored.get("hidden_act", "gelu") not in ACTIVATIONS: raise refuse("hidden_act", stored["hidden_act"], ", ".join(ACTIVATIONS))
    for key in SHAPES:
        if not isinstance(stored.get(key), int): raise refuse(key, stored.get(key), "a whole number")
    if stored["hidden_size"] % stored["num_attention_heads"]: raise refuse("hidden_size", stored["hidden_size"], "multiples of the heads")
    return dict(rotary_pct=rope.get("partial_rotary_factor", stored.get("rotary_pct", 0.25)),
                rotary_emb_base=rope.get("rope_theta", stored.get("rotary_emb_base", 10000.0)),
                **{key: stored[key] for key in SHAPES + OTHERS if key in stored})


class Stored(NamedTuple):
    """Where a tensor lies: at `start` bytes of a safetensors file, or as the (memory-mapped) `tensor` of a PyTorch file."""
    file: Path
    shape: list
    dtype: torch.dtype
    start: int = 0
    tensor: torch.Tensor = None


def read_index(folder):
    """name -> Stored of every tensor of a checkpoint, its ignored buffers left out."""
    stored = {}
    for file in weight_files(folder):
        stored |= index_pytorch(file) if file.suffix == ".bin" else index_safetensors(file)
    stored = {name: s for name, s in stored.items() if not IGNORED.search(name)}
    for name, s in stored.items():
        if s.dtype not in DTYPES.values(): raise ValueError(f"{s.file}: {name} is stored as {s.dtype}, not as one of {', '.join(DTYPES)}")
    return stored


def index_pytorch(file):
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
        return {name: Stored(file, list(t.shape), t.dtype, tensor=t) for name, t in tensors.items()}
    except Exception as e:               # of unpickling, of zip, of what is no dictionary of tensors
        raise ValueError(f"{file} is truncated, or holds more than tensors ({type(e).__name__}): fetch it again") from e


def index_safetensors(file):
    whole, stored = os.path.getsize(file), {}
    try:
        with open(file, "rb") as f:
            begin = 8 + int.from_bytes(f.read(8), "little")
            header = json.loads(f.read(min(begin, whole) - 8))
        entries = [(name, e["dtype"], e["shape"], *e["data_offsets"]) for name, e in header.items() if name != "__metadata__"]
    except (ValueError, LookupError, TypeError, AttributeError):
        raise ValueError(f"{file} has no readable header: truncated, or not safetensors; fetch it again") from None
    for name, dtype, shape, start, end in entries:
        if begin + end > whole or dtype in DTYPES and end - start != math.prod(shape) * DTYPES[dtype].itemsize:
            raise ValueError(f"{file}: the bytes of {name} are not all there: truncated, fetch it again")
        stored[name] = Stored(file, shape, DTYPES.get(dtype, dtype), begin + start)
    return stored


def check(stored, model, folder):
    """Every tensor of the model (on any device) is stored in its shape, and no other is; else one line."""
    wanted = {name: list(p.shape) for name, p in model.named_parameters()}
    for name in wanted:
        if name not in stored: raise ValueError(f"{folder}: tensor {name} is missing")
        if stored[name].shape != wanted[name]:
            raise ValueError(f"{stored[name].file}: {name} has shape {stored[name].shape}, but config.json asks for {wanted[name]}")
    for name, s in stored.items():
        if name not in wanted: raise ValueError(f"{s.file}: tensor {name} is unknown to GPT-NeoX as config.json describes it")


def read(stored, dtype):
    """name -> tensor in the dtype asked for, a few tensors at a time."""
    take = lambda s: read_tensor(s, dtype) if s.tensor is None else s.tensor.to(dtype, copy=True)
    with ThreadPoolExecutor() as pool: return dict(zip(stored, pool.map(take, stored.values()), strict=True))


def read_tensor(stored, dtype, chunk=2 ** 18):
    """Reads `chunk` bytes at a time: the pages of a mapped file would count as memory."""
    out, size, buffer = torch.empty(stored.shape, dtype=dtype), stored.dtype.itemsize, torch.empty(chunk, dtype=torch.uint8)
    with open(stored.file, "rb") as f:
        f.seek(stored.start)
        for part in out.view(-1).split(chunk // size):
            read = buffer[:len(part) * size]
            f.readinto(read.numpy())
            part.copy_(read.view(stored.dtype))
    return out


# ---------------------------------------------------------------------------------------------------------------------
# writing


def write(folder, config, tensors, dtype=None, shard_bytes=5 * 10 ** 9):
    """Writes config.json and the tensors, as model.safetensors or, above shard_bytes, as numbered shards with an index.
    Each file appears whole under its name; weights of an earlier save are removed last.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards, size, total = [[]], 0, 0
    for name, t in tensors.items():
        n = t.numel() * (dtype or t.dtype).itemsize
        if shards[-1] and size + n > shard_bytes: shards, size = shards + [[]], 0
        shards[-1].append(name)
        size, total = size + n, total + n
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)] if shards[1:] else ["model.safetensors"]
    for file, shard in zip(names, shards, strict=True):
        cast = {name: tensors[name].detach().to(dtype=dtype).contiguous() for name in shard}
        save_tensors(cast, folder / file, {"format": "pt"})
    if shards[1:]:
        weight_map = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        index = dict(metadata=dict(total_size=total), weight_map=weight_map)
        names.append("model.safetensors.index.json")
        replace(folder / names[-1], lambda path: path.write_text(json.dumps(index, indent=2)))
    replace(folder / "config.json", lambda path: path.write_text(json.dumps(config, indent=2)))
    for old in set(folder.glob("model*.safetensors*")) - {folder / name for name in names}: old.unlink()
