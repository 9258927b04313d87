"""
Published checkpoints on disk: where the folder is, the tensors of its safetensors, and the pieces
of its tokenizer.json.
"""

import os
import re
from pathlib import Path

import torch.nn as nn
from safetensors import SafetensorError
from safetensors.torch import load_file

from runtime.files import read_json, regular_file
from runtime.program import expand, one_line

# the characters by which a byte-level vocabulary names bytes: printable ones stand for themselves
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
OTHERS = sorted(set(range(256)) - set(PRINTABLE))
BYTE = {chr(b): b for b in PRINTABLE} | {chr(256 + i): b for i, b in enumerate(OTHERS)}
BYTE_LEVEL = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True)
BUFFERS = r"attention\.(bias|masked_bias)$|rotary_emb\.inv_freq$"  # of old checkpoints


def convert_line(folder):
    """The command that makes safetensors of the .bin files in a folder."""
    return (
        f"cd '{folder}' && python -c \"import glob, torch; from safetensors.torch import save_file "
        "as save; [save({k: x.clone() for k, x in torch.load(p, weights_only=True).items()}, "
        "p[8:-3] + 'safetensors') for p in glob.glob('pytorch_model*.bin')]\""
    )


def without_index(folder):
    """The shards of a folder that has no index. Raises ValueError where they are of two savings."""
    paths = sorted(folder.glob("model-*.safetensors"))
    savings = sorted({path.stem.rpartition("-of-")[2] for path in paths if "-of-" in path.stem})
    if len(savings) > 1:
        raise ValueError(
            f"{folder}: shards of several savings (of {', of '.join(savings)}) and no "
            "model.safetensors.index.json that says which: keep those of one"
        )
    return paths


def weight_files(folder):
    """[(file, the names of the tensors that are read from it, None: all), ..]: model.safetensors,
    or the shards that stand for it, as transformers reads them. Raises FileNotFoundError."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file():
        return [(whole, None)]
    if index.is_file():
        names = {}
        stored = read_json(index).get("weight_map")
        for tensor, name in stored.items() if isinstance(stored, dict) else [("", None)]:
            if not isinstance(name, str) or Path(name).name != name:
                raise ValueError(f"{index}: weight_map is not {{tensor: file beside it}}")
            names.setdefault(name, set()).add(tensor)
        return [(folder / name, names[name]) for name in sorted(names)]
    paths = without_index(folder)
    if not paths:
        there = [*folder.glob("pytorch_model*.bin")]
        remedy = f"convert the .bin: {convert_line(folder)}" if there else "fetch the model again"
        raise FileNotFoundError(f"{whole} is missing: {remedy}")
    return [(path, None) for path in paths]


def read_weights(folder, dtype):
    """{name: parameter} of a published model, cast to dtype. Raises ValueError."""
    weights = {}
    for path, names in weight_files(folder):
        try:
            stored = load_file(regular_file(path))
        except (OSError, SafetensorError) as error:
            why = one_line(error)
            raise ValueError(f"{path}: truncated or garbled ({why}); fetch it again") from None
        for name, x in stored.items():
            if re.search(BUFFERS, name) or name not in (names or stored):
                continue
            if name in weights:
                raise ValueError(f"{path}: another shard has {name} too; keep those of one saving")
            if not x.is_floating_point():
                raise ValueError(f"{path}: tensor {name} is stored as {x.dtype}")
            weights[name] = nn.Parameter(x.to(dtype, copy=True))  # x is a view of the file
    return weights


def find_checkpoint(name_or_dir, part=""):
    """The folder of a checkpoint: a directory, or a name such as EleutherAI/pythia-160m@step3000;
    or of the part of it, such as "encoder", where it has parts.

    A name is looked up in the Hugging Face cache, else downloaded where huggingface_hub is
    installed. Raises FileNotFoundError with the command that fetches it.
    """
    folder = Path(expand(name_or_dir, name_or_dir))
    if folder.is_dir():
        return folder / part if (folder / part).is_dir() else folder
    name, _, revision = str(name_or_dir).partition("@")
    revision = revision or "main"
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name):
        raise FileNotFoundError(f"{name_or_dir}: no such directory")
    home = os.environ.get("HF_HOME", "~/.cache/huggingface")
    hub = os.environ.get("HF_HUB_CACHE", f"{home}/hub")
    hub = Path(expand(hub, "HF_HOME is not set, and neither is HOME"))
    cached = hub / f"models--{name.replace('/', '--')}"
    ref = cached / "refs" / revision
    snapshot = cached / "snapshots" / (ref.read_text().strip() if ref.is_file() else revision)
    if (snapshot / "config.json").exists() and [*snapshot.glob("**/model*.safetensors")]:
        return find_checkpoint(snapshot, part)
    files = "*.json", "*.safetensors"
    try:
        from huggingface_hub import snapshot_download

        fetched = snapshot_download(name, revision=revision, allow_patterns=files)
        return find_checkpoint(fetched, part)
    except Exception as error:  # not installed, or whatever the network says
        reason = (str(error).splitlines() or [""])[0]
        raise FileNotFoundError(
            f"{name}@{revision} is neither a directory nor in {hub}; fetch it: "
            f"pip install huggingface_hub && hf download {name} --revision {revision} "
            f"--include '{files[0]}' --include '{files[1]}'  ({reason})"
        ) from None


def read_bpe(stored, special):
    """The bytes of each token of a byte-level BPE but the special ones, and the tokens that are
    runs of spaces, {text: id}. stored: a tokenizer.json; special {text: id}. Raises ValueError, or
    KeyError and the like where keys are missing."""
    model = dict(stored["model"])
    vocabulary, merges = model.pop("vocab"), model.pop("merges")
    added = {token["content"]: token["id"] for token in stored["added_tokens"]}
    spaces = {text: i for text, i in added.items() if set(text) == {" "}}
    pieces = {i: bytes(BYTE[c] for c in text) for text, i in vocabulary.items()}
    pieces |= {i: text.encode() for text, i in spaces.items()}
    known = special | spaces
    unknown = [f"{text!r:.80}" for text, i in added.items() if known.get(text) != i]
    added_tokens = ", as ".join(["added tokens", *unknown[:1]])
    merged = [vocabulary["".join(merge).replace(" ", "")] for merge in merges]
    for what, right in {
        "normalizer": stored["normalizer"] == dict(type="NFC"),
        "pre-tokenizer": dict(use_regex=True) | stored["pre_tokenizer"] == BYTE_LEVEL,
        "model": {k: v for k, v in model.items() if v} == dict(type="BPE"),
        "order of merges": merged == sorted(merged),  # tiktoken's is that of the ids
        added_tokens: bool(spaces) and added == known,
        "ids": sorted(pieces) == list(range(len(pieces))),
    }.items():
        if not right:
            raise ValueError(f"another {what}")
    return [pieces[i] for i in range(len(special), len(pieces))], spaces
