"""The ids are those of the `tokenizers` library: of a small BPE trained here, and of Pythia's.

PYTHIA_TOKENIZER=path/to/tokenizer.json python -m pytest tests/test_tokenizer.py
"""

import json
import os
import sysconfig
import unicodedata
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from data import END, SILENCE, Tokenizer, read_stream, write_stream
from runtime.dataset import captions_in

tokenizers = pytest.importorskip("tokenizers")
SPECIAL = ["<|endoftext|>", "<|padding|>"]
SOURCES = sorted(Path(sysconfig.get_path("purelib")).rglob("*.py"))
PYTHIA = os.environ.get("PYTHIA_TOKENIZER")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tokenizer.json as Pythia's: byte-level BPE after NFC, runs of spaces added behind it."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.normalizer = tokenizers.normalizers.NFC()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=1500, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    texts = [path.read_text("utf-8") for path in SOURCES if "torch/nn/modules" in path.as_posix()]
    texts = texts[:20] + ["żółć Ünï 漢字 naïve ﬁ Å é"] * 20
    tokenizer.train_from_iterator(texts, trainer)
    spaces = [tokenizers.AddedToken(" " * n, normalized=True) for n in range(24, 1, -1)]
    tokenizer.add_tokens(spaces)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="module", params=["trained here"] + ["Pythia"] * bool(PYTHIA))
def pair(request, trained):
    path = PYTHIA if request.param == "Pythia" else trained
    theirs = tokenizers.Tokenizer.from_file(str(path))
    theirs.encode_special_tokens = True  # they are ordinary text
    return Tokenizer.from_file(path), theirs


def same_nfc(text):
    """The library normalises by an older Unicode: newer combining marks stay where they are."""
    return tokenizers.normalizers.NFC().normalize_str(text) == unicodedata.normalize("NFC", text)


# Unicode versions differ on what is not assigned
CHARACTERS = st.characters(exclude_categories=("Cs", "Cn"))
SAMPLES = ["\n", "\t ", " \n ", "\u00a0", "e\u0301", "\u0338", "'ll", "'S", " 12", "don't", "漢字"]
PIECES = st.one_of(
    st.text(CHARACTERS, max_size=20),
    st.integers(1, 40).map(" ".__mul__),
    st.sampled_from(SPECIAL + SAMPLES),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(PIECES, max_size=8).map("".join))
def test_ids_are_those_of_the_tokenizers_library(pair, text):
    ours, theirs = pair
    assume(same_nfc(text))
    assert ours.encode(text) == theirs.encode(text).ids


@settings(max_examples=100, deadline=None)
@given(st.text(CHARACTERS))
def test_decoding_gives_back_the_text_in_nfc(pair, text):
    ours, _ = pair
    assert ours.decode(ours.encode(text)) == unicodedata.normalize("NFC", text)


@pytest.mark.parametrize("text", ["cafe\u0301", "\u2126", "\u095c", "\u0340"])
def test_captions_of_a_data_set_are_the_texts_that_come_back(pair, text):
    ours, theirs = pair
    record = dict(id="a", annotated="all", captions=[dict(start=3, end=4, text=f"see {text}")])
    [caption] = captions_in(record)
    assert caption.text == theirs.decode(theirs.encode(f"see {text}").ids) != f"see {text}"
    assert read_stream(*write_stream([caption], 9, ours), ours) == [caption]


def test_runs_of_1_to_40_spaces(pair):
    ours, theirs = pair
    for n in range(1, 41):
        spaces = " " * n
        for text in (spaces, "x" + spaces, spaces + "x", f"x{spaces}y\n{spaces}"):
            assert ours.encode(text) == theirs.encode(text).ids
            assert ours.decode(ours.encode(text)) == text


def test_special_tokens_inside_text_are_ordinary_text(pair):
    ours, theirs = pair
    text = "a<|endoftext|>\u0338b<|padding|><|endoftext|"  # U+0338 joins the > before it
    assert ours.encode(text) == theirs.encode(text).ids
    assert min(ours.encode(text)) > SILENCE
    assert ours.decode([END, SILENCE, *ours.encode("<|padding|>")]) == "<|padding|>"


def test_python_files_of_the_environment(pair):
    ours, theirs = pair
    texts = [path.read_text("utf-8", errors="ignore")[:5000] for path in SOURCES[::100]]
    texts = [text for text in texts if same_nfc(text)]
    assert len(texts) > 20
    for text, expected in zip(texts, theirs.encode_batch(texts), strict=True):
        assert ours.encode(text) == expected.ids


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_any_ids_decode_and_a_cut_character_becomes_ufffd(pair, data):
    ours, _ = pair
    ids = data.draw(st.lists(st.integers(0, ours.vocab_size + 30)))
    assert isinstance(ours.decode(ids), str)
    assert ours.decode([ours.vocab_size]) == "\ufffd"
    ids = ours.encode("🜚")
    assert len(ids) > 1
    assert "\ufffd" in ours.decode(ids[:1])


def test_saved_and_read_again(pair, tmp_path):
    ours, _ = pair
    path = tmp_path / "tokenizer.json"
    ours.save(path)
    text = "a  b  e\u0301 漢字" + " " * 30
    assert Tokenizer.from_file(path).encode(text) == ours.encode(text)
    assert tokenizers.Tokenizer.from_file(str(path)).encode(text).ids == ours.encode(text)


OTHERS = {
    "normalizer": dict(normalizer={"type": "Lowercase"}),
    "pre-tokenizer": dict(pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True}),
    "added tokens": dict(added_tokens=[]),
}


@pytest.mark.parametrize("message", OTHERS)
def test_a_tokenizer_of_another_kind_is_refused_in_one_line(trained, tmp_path, message):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(json.loads(trained.read_text("utf-8")) | OTHERS[message]))
    with pytest.raises(ValueError, match=f"json is not byte-level BPE .*{message}") as error:
        Tokenizer.from_file(path)
    assert "\n" not in str(error.value)


def test_an_added_token_is_named(trained, tmp_path):
    theirs = tokenizers.Tokenizer.from_file(str(trained))
    theirs.add_tokens(["<|image|>"])
    theirs.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"another added tokens, as '<\|image\|>'"):
        Tokenizer.from_file(tmp_path / "tokenizer.json")


def lower_priority(stored):
    stored["model"]["merges"].reverse()


def leave_a_hole(stored):
    stored["model"]["vocab"].pop("a")


def switch_on(stored):
    stored["model"]["byte_fallback"] = True


def add_a_word(stored):
    stored["added_tokens"][2]["content"] = "walk"


def add_nothing(stored):
    stored["added_tokens"][2]["content"] = ""


CHANGES = {
    lower_priority: "order of merges",
    leave_a_hole: "ids",
    switch_on: "model",
    add_a_word: "added tokens",
    add_nothing: "added tokens",
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_tokenizer_that_would_give_other_ids_is_refused(trained, tmp_path, change):
    stored = json.loads(trained.read_text("utf-8"))
    change(stored)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(stored))
    with pytest.raises(ValueError, match=f"another {CHANGES[change]}"):
        Tokenizer.from_file(path)


def test_pieces_that_lack_a_byte_or_come_twice_are_refused(tmp_path):
    path = tmp_path / "tokenizer.json"
    Tokenizer.from_captions(["walk"]).save(path)
    pieces = json.loads(path.read_text())["pieces"]
    for wrong in (pieces[1:], [*pieces, "walk"], [*pieces, ""], "ab", dict(a=1)):
        path.write_text(json.dumps(dict(pieces=wrong)))
        with pytest.raises(ValueError, match="pieces are not every byte"):
            Tokenizer.from_file(path)


def test_unreadable_files_are_named(tmp_path):
    path = tmp_path / "tokenizer.json"
    with pytest.raises(ValueError, match="tokenizer.json is missing"):
        Tokenizer.from_file(path)
    path.write_text("{")
    with pytest.raises(ValueError, match="tokenizer.json is not JSON"):
        Tokenizer.from_file(path)
