"""The ids are those of the `tokenizers` library: of a small BPE trained on the spot, and of Pythia where an environment variable names it.

    PYTHIA_TOKENIZER=path/to/tokenizer.json EVERY_FILE=1 python -m pytest tests/test_tokenizer.py      all of site-packages, not a sample
"""
import json
import os
import sysconfig
import unicodedata
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from data import END, SILENCE, Tokenizer

tokenizers = pytest.importorskip("tokenizers")
SPECIAL = ["<|endoftext|>", "<|padding|>"]
SOURCES = sorted(Path(sysconfig.get_path("purelib")).rglob("*.py"))
PYTHIA = Path(os.environ.get("PYTHIA_TOKENIZER", "tokenizer.json"))


def trained(path):
    """A tokenizer.json built as Pythia's: special tokens, byte-level BPE after NFC, runs of spaces added behind the vocabulary."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.normalizer = tokenizers.normalizers.NFC()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=1500, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    texts = [p.read_text("utf-8") for p in SOURCES if "torch/nn/modules" in p.as_posix()][:20] + ["żółć Ünï 漢字 naïve ﬁ Å é"] * 20
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([tokenizers.AddedToken(" " * n, normalized=True) for n in range(24, 1, -1)])
    tokenizer.save(str(path))


@pytest.fixture(scope="module", params=["trained here", "Pythia"])
def pair(request, tmp_path_factory):
    path = PYTHIA
    if request.param == "Pythia" and not path.exists(): pytest.skip(f"{path} is not there")
    if request.param != "Pythia": trained(path := tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")
    return Tokenizer.from_file(path), tokenizers.Tokenizer.from_file(str(path))


def same_nfc(text):
    """The library normalises by an older Unicode: it does not reorder combining marks that came with Unicode 11 or later."""
    return tokenizers.normalizers.NFC().normalize_str(text) == unicodedata.normalize("NFC", text)


CHARACTERS = st.characters(exclude_categories=("Cs", "Cn"))            # Unicode versions differ on what is not assigned
PIECES = st.one_of(st.text(CHARACTERS, max_size=20), st.integers(1, 40).map(" ".__mul__), st.sampled_from(
    [*SPECIAL, "\n", "\t ", " \n ", "\u00a0", "e\u0301", "\u0338", "'ll", "'S", " 12", "don't", "漢字", "mine three logs"]))


@settings(max_examples=400, deadline=None)
@given(st.lists(PIECES, max_size=8).map("".join))
def test_ids_are_those_of_the_tokenizers_library(pair, text):
    ours, theirs = pair
    assume(same_nfc(text))
    assert ours.encode(text) == theirs.encode(text).ids


@settings(max_examples=200, deadline=None)
@given(st.text(CHARACTERS))
def test_decoding_gives_back_the_text_in_nfc(pair, text):
    assert pair[0].decode(pair[0].encode(text)) == unicodedata.normalize("NFC", text)


def test_runs_of_1_to_40_spaces(pair):
    ours, theirs = pair
    for n in range(1, 41):
        for text in (" " * n, "x" + " " * n, " " * n + "x", f"x{' ' * n}y\n{' ' * n}"):
            assert ours.encode(text) == theirs.encode(text).ids and ours.decode(ours.encode(text)) == text


def test_added_tokens_inside_text_are_cut_out_before_normalising(pair):
    ours, theirs = pair
    text = "a<|endoftext|>\u0338b<|padding|><|endoftext|"          # U+0338 would join the > before it
    assert ours.encode(text) == theirs.encode(text).ids
    assert ours.encode(text).count(END) == 1 and ours.encode(text).count(SILENCE) == 1


def test_python_files_of_the_environment(pair):
    ours, theirs = pair
    texts = [p.read_text("utf-8", errors="ignore") for p in SOURCES[::1 if "EVERY_FILE" in os.environ else 60]]
    texts = [text for text in texts if same_nfc(text)]      # one of 10,401 is not: jinja2's table of combining marks
    assert len(texts) > 20
    for text, expected in zip(texts, theirs.encode_batch(texts), strict=True): assert ours.encode(text) == expected.ids, text[:200]


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_ids_decode_and_a_cut_character_becomes_ufffd(pair, data):
    ours, _ = pair
    ids = data.draw(st.lists(st.integers(0, ours.vocab_size + 30)))
    assert isinstance(ours.decode(ids), str)
    whole = [i for i in ours.encode("漢" if ours.vocab_size < 2000 else "🜚") if i > SILENCE]
    assert len(whole) > 1 and "\ufffd" in ours.decode(whole[:1]) and ours.decode([ours.vocab_size]) == "\ufffd"


def test_saved_and_read_again(pair, tmp_path):
    ours, theirs = pair
    ours.save(tmp_path / "tokenizer.json")
    text = "a  b<|padding|>  e\u0301 漢字" + " " * 30
    assert Tokenizer.from_file(tmp_path / "tokenizer.json").encode(text) == ours.encode(text)
    assert tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(text).ids == ours.encode(text)
    words = Tokenizer.from_captions(["mine three logs"])
    words.save(tmp_path / "words.json")
    assert Tokenizer.from_file(tmp_path / "words.json").encode("three logs, é") == words.encode("three logs, é")


@pytest.mark.parametrize("change, message", [
    (dict(normalizer={"type": "Lowercase"}), "normalizer .*Lowercase"),
    (dict(pre_tokenizer={"type": "Whitespace"}), "pre-tokenizer .*Whitespace"),
    (dict(pre_tokenizer=None), "pre-tokenizer"),
    (dict(pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True}), "pre-tokenizer .*add_prefix_space"),
    (dict(model={"type": "Unigram", "vocab": {}}), "model Unigram"),
    (dict(added_tokens=[]), "no tokens 0 and 1"),
])
def test_a_tokenizer_of_another_kind_is_refused_in_one_line(tmp_path, change, message):
    path = tmp_path / "tokenizer.json"
    trained(path)
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | change))
    with pytest.raises(ValueError, match=f"tokenizer.json: {message}") as e: Tokenizer.from_file(path)
    assert "\n" not in str(e.value)


def test_unreadable_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="tokenizer.json is missing"): Tokenizer.from_file(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="tokenizer.json is not JSON"): Tokenizer.from_file(tmp_path / "tokenizer.json")
