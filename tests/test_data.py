from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data import (
    END,
    SILENCE,
    Caption,
    Episode,
    Episodes,
    Tokenizer,
    Windows,
    choose_annotated,
    match,
    read_stream,
    score,
    write_shard,
    write_stream,
)
from runtime.shards import write_meta

WORDS = Tokenizer.from_captions(["collect wood", "eat a cow", "place table 2"])
ANY_TEXT = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12)
TEXTS = st.one_of(st.sampled_from(["collect wood", "eat a cow", "wood"]), ANY_TEXT)

# -----------------------------------------------------------------------------
# tokenizer and streams


@settings(deadline=None)
@given(ANY_TEXT)
def test_any_text_survives_the_tokenizer(text):
    ids = WORDS.encode(text)
    assert WORDS.decode(ids) == text
    assert min(ids) > SILENCE


def test_words_of_the_captions_are_single_tokens():
    assert len(WORDS.encode("collect wood")) == 2
    assert len(WORDS.encode("collect a cow")) == 3
    assert len(WORDS.encode("<|padding|>")) > 1


def test_a_saved_tokenizer_is_the_same(tmp_path):
    WORDS.save(tmp_path / "tokenizer.json")
    again = Tokenizer.from_file(tmp_path / "tokenizer.json")
    assert again.encode("collect a café") == WORDS.encode("collect a café")
    assert again.vocab_size == WORDS.vocab_size


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 60), TEXTS), max_size=8))
def test_captions_survive_the_stream_and_wait_for_one_another(starts_and_texts):
    captions = sorted(Caption(start, start + 1, text) for start, text in starts_and_texts)
    lengths = [len(WORDS.encode(caption.text)) + 1 for caption in captions]
    written = read_stream(write_stream(captions, 61 + sum(lengths), WORDS), WORDS)
    free = 0
    for caption, length, copy in zip(captions, lengths, written, strict=True):
        start = max(caption.start, free)
        free = start + length
        assert copy == Caption(start, free, caption.text)


def test_a_caption_without_tokens_is_refused():
    with pytest.raises(ValueError, match="no tokens"):
        write_stream([Caption(3, 4, "")], 10, WORDS)


def test_a_broken_stream_can_be_read():
    wood = WORDS.encode("collect wood")
    broken = [END, wood[0], SILENCE, *wood, END, END, wood[1]]
    texts = [caption.text for caption in read_stream(broken, WORDS)]
    assert texts == ["collect", "collect wood", " wood"]


# -----------------------------------------------------------------------------
# scores

CAPTIONS = st.lists(st.tuples(st.integers(0, 12), st.sampled_from("ab")), max_size=4)


def fits(true, written):
    return written is not None and true[1] == written[1] and abs(true[0] - written[0]) <= 3


def largest(true, written):
    """The size of the largest one-to-one matching, by trying all."""
    orders = set(permutations([*written, *[None] * len(true)], len(true)))
    return max(sum(map(fits, true, order)) for order in orders)


@settings(max_examples=60, deadline=None)
@given(CAPTIONS, CAPTIONS)
def test_the_matching_is_the_largest(true, written):
    captions = [[Caption(start, start + 1, text) for start, text in x] for x in (true, written)]
    assert len(match(*captions)) == largest(true, written)


def test_scores_of_a_known_case():
    true = [[Caption(0, 1, "a"), Caption(10, 11, "b")], [Caption(5, 6, "a")]]
    written = [[Caption(2, 5, "a"), Caption(14, 15, "b")], []]
    texts = dict(a=(2 / 3, 2), b=(0.0, 1))
    assert score(true, written) == dict(f1=2 / 5, precision=1 / 2, recall=1 / 3, texts=texts)


# -----------------------------------------------------------------------------
# episodes


def test_episodes_come_back_from_disk(toy):
    episodes = Episodes(toy, "train")
    assert len(episodes) == 12
    assert torch.equal(episodes.obs(3)[5:9], episodes.obs(3, 5, 9))
    for caption in episodes.captions(11):
        assert episodes.obs(11)[caption.start].max() == 1


@pytest.mark.parametrize("dtype", ["uint8", "float16", "bfloat16"])
def test_observations_and_pictures_keep_their_dtype(tmp_path, dtype):
    obs = (torch.rand(7, 3) * 200).to(getattr(torch, dtype))
    pictures = np.arange(7 * 12, dtype=np.uint8).reshape(7, 2, 2, 3)
    write_shard(tmp_path, "train", 0, [Episode("one", obs, [], "all", pictures)])
    write_meta(tmp_path, obs_dim=3, dtype=dtype, steps_per_second=None, splits=["train"])
    episodes = Episodes(tmp_path, "train")
    assert episodes.obs(0).dtype == obs.dtype
    assert torch.equal(episodes.obs(0), obs)
    assert np.array_equal(episodes.pictures(0), pictures)


def test_an_unfinished_data_set_is_refused(toy):
    (toy / "meta.json").unlink()
    with pytest.raises(ValueError, match="meta.json is missing"):
        Episodes(toy, "train")


def test_a_shard_half_written_is_never_read(toy, monkeypatch):
    def full_disk(*_):
        raise OSError("disk full")

    monkeypatch.setattr("runtime.files.save_file", full_disk)
    with pytest.raises(OSError):
        write_shard(toy, "train", 1, [Episode("late", np.zeros((4, 6), np.float32), [])])
    assert len(Episodes(toy, "train")) == 12


def test_only_annotated_spans_are_known(toy, tokenizer):
    episodes = Episodes(toy, "train")
    episodes.records[0]["annotated"] = [[2, 5]]
    tok, known = episodes.stream(0, tokenizer)
    first = episodes.captions(0)[0]
    end = first.start + len(tokenizer.encode(first.text)) + 1  # it spills past step 5
    assert known.nonzero()[0].tolist() == list(range(2, end))
    assert (tok[end:] == SILENCE).all()


def test_annotated_episodes_are_nested(toy):
    episodes = Episodes(toy, "train")
    assert choose_annotated(episodes, 8, 3)[:4] == choose_annotated(episodes, 4, 3)
    episodes.records[5]["annotated"] = []
    assert 5 not in choose_annotated(episodes, 12, 3)


# -----------------------------------------------------------------------------
# windows


@pytest.fixture
def windows(toy, tokenizer):
    episodes = Episodes(toy, "train")
    annotated = choose_annotated(episodes, 4, 0)

    def make(T=16, seed=0, reader=None):
        return Windows(episodes, annotated, tokenizer, T, seed, reader)

    return make


def test_a_window_depends_on_seed_step_and_number_alone(windows):
    eight, one = windows().batch(7, range(8)), windows().batch(7, [5])
    for a, b in zip(eight.rows(slice(5, 6)), one, strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(eight.obs, windows(seed=1).batch(7, range(8)).obs)


def test_where_nobody_reads_the_rest_windows_are_of_annotated_steps_alone(windows):
    loader = windows()
    loader.episodes.records[loader.annotated[0]]["annotated"] = [[0, 20]]
    batch = loader.batch(0, range(50))
    assert not batch.unknown.any()
    assert batch.known.any(1).sum() > 25 and not batch.known[:, 8:].all()
    firsts = {tuple(obs) for i in loader.annotated for obs in loader.episodes.obs(i).tolist()}
    assert all(tuple(obs) in firsts for obs in batch.obs[:, 0].tolist())


def test_where_nothing_is_annotated_windows_are_of_all_and_show_no_caption(windows):
    loader = windows()
    loader = Windows(loader.episodes, [], loader.tokenizer, 16, 0)
    batch = loader.batch(0, range(50))
    assert batch.unknown[:, 8:].all() and not batch.known.any()
    assert (batch.tok == SILENCE).all()


def test_a_window_begins_with_the_true_token_before_it(windows):
    loader = windows()
    streams = [[END, *loader.stream(i)[0]] for i in loader.annotated]
    pieces = [stream[a : a + 17] for stream in streams for a in range(40 - 15)]
    for step in range(20):
        batch = loader.batch(step, [0])
        assert [*batch.prev_token.tolist(), *batch.tok[0].tolist()] in pieces


def test_an_episode_shorter_than_the_window_is_padded(windows):
    batch = windows(T=64).batch(0, range(4))
    assert batch.known[:, :40].all()
    assert not (batch.known | batch.unknown)[:, 40:].any()
    assert not batch.obs[:, 40:].any()


def test_a_reader_fills_what_nobody_annotated(windows, tokenizer):
    class OneCaption:
        def captions(self, obs):
            assert obs.shape == (40, 6)
            return [Caption(2, 3, "walk")]

    loader = windows(reader=OneCaption())
    read = write_stream([Caption(2, 3, "walk")], 40, tokenizer)
    i, j = loader.annotated[0], min(set(loader.pool) - set(loader.annotated))
    loader.episodes.records[i]["annotated"] = [[20, 40]]
    true, _ = loader.episodes.stream(i, tokenizer)
    for episode, text, known in (i, [*read[:20], *true[20:]], 20), (j, read, 0):
        tok, is_known = loader.stream(episode)
        assert np.array_equal(tok, text) and is_known.sum() == known
    batch = loader.batch(0, range(8))
    assert (batch.known ^ batch.unknown)[:, 8:].all()


def test_half_a_window_without_its_past_is_no_target(windows):
    loader = windows()
    starts = {tuple(loader.episodes.obs(i)[0].tolist()) for i in loader.annotated}
    batch = loader.batch(0, range(200))
    at_start = torch.tensor([tuple(obs.tolist()) in starts for obs in batch.obs[:, 0]])
    assert 0 < at_start.sum() < 200
    assert batch.known[at_start].all() and not batch.known[~at_start, :8].any()
