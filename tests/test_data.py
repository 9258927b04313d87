import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from configurator import Fault
from data import END, SILENCE, Caption, Episode, Episodes, Tokenizer, Windows, choose_annotated, read_stream, write_shard, write_stream

WORDS = Tokenizer.from_captions(["collect wood", "eat a cow", "place table 2"])
texts = st.one_of(st.sampled_from(["collect wood", "eat a cow", "wood"]), st.text(st.characters(codec="utf-8"), min_size=1, max_size=12))


@given(st.text(st.characters(codec="utf-8")))
def test_any_text_survives_the_tokenizer(text):
    ids = WORDS.encode(text)
    assert WORDS.decode(ids) == text and all(i > SILENCE for i in ids)


def test_words_of_the_captions_are_single_tokens():
    assert len(WORDS.encode("collect wood")) == 2 and len(WORDS.encode("collect a cow")) == 3
    assert len(WORDS.encode("<|padding|>")) > 1


def test_a_saved_tokenizer_is_the_same(tmp_path):
    WORDS.save(tmp_path / "tokenizer.json")
    again = Tokenizer.from_file(tmp_path / "tokenizer.json")
    assert again.encode("collect a café") == WORDS.encode("collect a café") and again.vocab_size == WORDS.vocab_size


@given(st.lists(st.tuples(st.integers(0, 60), texts), max_size=8))
def test_captions_survive_the_stream(starts_and_texts):
    captions = sorted(Caption(start, start + 1, text) for start, text in starts_and_texts)
    room = 61 + sum(len(WORDS.encode(c.text)) + 1 for c in captions)
    again = read_stream(write_stream(captions, room, WORDS), WORDS)
    assert [c.text for c in again] == [c.text for c in captions]
    free = 0
    for ours, theirs in zip(captions, again, strict=True):
        assert theirs.start == max(ours.start, free)
        free = theirs.end
        assert theirs.end - theirs.start == len(WORDS.encode(ours.text)) + 1


def test_a_caption_without_tokens_is_refused():
    with pytest.raises(ValueError, match="no tokens"): write_stream([Caption(3, 4, "")], 10, WORDS)


def test_a_broken_stream_can_be_read():
    wood = WORDS.encode("collect wood")
    assert [c.text for c in read_stream([END, wood[0], SILENCE, *wood, END, END, wood[1]], WORDS)] == ["collect", "collect wood", " wood"]


def test_episodes_come_back_from_disk(toy):
    episodes = Episodes(toy, "train")
    assert len(episodes) == 12 and episodes.obs(3, 5, 9).shape == (4, 6)
    assert torch.equal(episodes.obs(3)[5:9], episodes.obs(3, 5, 9))
    assert all(episodes.obs(11)[c.start].max() == 1 for c in episodes.captions(11))


def test_an_unfinished_data_set_is_refused(toy):
    (toy / "meta.json").unlink()
    with pytest.raises(Fault, match="meta.json is missing"): Episodes(toy, "train")


def test_a_shard_half_written_is_never_read(toy, monkeypatch):
    def full_disk(*_): raise OSError("disk full")

    monkeypatch.setattr("files.save_file", full_disk)
    with pytest.raises(OSError): write_shard(toy, "train", 1, [Episode("late", np.zeros((4, 6), np.float32), [])])
    assert len(Episodes(toy, "train")) == 12


def test_only_annotated_spans_are_known(toy, tokenizer):
    episodes = Episodes(toy, "train")
    episodes.records[0]["annotated"] = [[2, 5]]
    tok, known = episodes.stream(0, tokenizer)
    first = episodes.captions(0)[0]
    end = first.start + len(tokenizer.encode(first.text)) + 1                           # it spills past step 5
    assert known.nonzero()[0].tolist() == list(range(2, end))
    assert (tok[end:] == SILENCE).all()


def windows(toy, tokenizer, **changes):
    episodes = Episodes(toy, "train")
    settings = dict(annotated=choose_annotated(12, 4, 0), tokenizer=tokenizer, T=16, fraction=0.5, drop=0.2, seed=0) | changes
    return Windows(episodes, **settings)


def test_a_window_depends_on_seed_step_and_number_alone(toy, tokenizer):
    one, two = windows(toy, tokenizer).batch(7, range(8)), windows(toy, tokenizer).batch(7, [5])
    for a, b in zip(one, two, strict=True): assert torch.equal(a[5:6], b)
    other = windows(toy, tokenizer, seed=1).batch(7, range(8))
    assert not torch.equal(one.obs, other.obs)


def test_a_fixed_share_of_windows_is_annotated_and_the_rest_shows_no_caption(toy, tokenizer):
    for step in range(10):
        batch = windows(toy, tokenizer).batch(step, range(8))
        assert batch.known.all(1).sum() == 4
        assert (batch.tok[~batch.known] == SILENCE).all()


def test_a_window_begins_with_the_true_token_before_it(toy, tokenizer):
    loader = windows(toy, tokenizer, fraction=1.0)
    inside = {tuple(stream[a:a + 17]) for stream, _ in loader.streams.values() for a in range(40 - 16)}
    first = {(END, *stream[:16]) for stream, _ in loader.streams.values()}
    for step in range(20):
        batch = loader.batch(step, [0])
        assert (batch.prev.item(), *batch.tok[0].tolist()) in inside | first


def test_an_episode_shorter_than_the_window_is_padded_outside(toy, tokenizer):
    batch = windows(toy, tokenizer, T=64).batch(0, range(4))
    assert (batch.inside.sum(1) == 40).all() and not batch.known[:, 40:].any()


def test_annotated_episodes_are_nested():
    assert choose_annotated(500, 64, 3)[:8] == choose_annotated(500, 8, 3)


def test_text_on_disk_is_one_json_line_an_episode(toy):
    lines = (toy / "val-00000.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == ["val-0", "val-1", "val-2"]
