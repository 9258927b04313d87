from itertools import combinations, permutations, product
from unicodedata import normalize

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.arms import perfect_writer
from data import (
    END,
    SILENCE,
    Batch,
    Tokenizer,
    Windows,
    match,
    read_stream,
    score,
    word_overlap,
    write_stream,
)
from runtime.dataset import (
    Caption,
    Episode,
    Episodes,
    choose_annotated,
    read_text,
    write_shard,
    write_text,
)
from runtime.shards import write_meta
from train import text_of

WORDS = Tokenizer.from_captions(["collect wood", "eat a cow", "place table 2"])
ANY_TEXT = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12)
TEXTS = st.one_of(st.sampled_from(["collect wood", "eat a cow", "wood"]), ANY_TEXT)

# -----------------------------------------------------------------------------
# tokenizer and streams


@settings(deadline=None)
@given(ANY_TEXT)
def test_any_text_survives_the_tokenizer(text):
    ids = WORDS.encode(text)
    assert WORDS.decode(ids) == normalize("NFC", text)
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
@given(st.integers(0, 30).flatmap(lambda steps: st.tuples(
    st.just(steps), st.lists(st.tuples(st.integers(0, max(steps - 1, 0)), TEXTS), max_size=8)
)))  # fmt: skip
def test_captions_come_back_from_the_stream_as_they_went_in(drawn):
    steps, starts_and_texts = drawn
    drawn = [(t, normalize("NFC", text)) for t, text in starts_and_texts] if steps else []
    captions = [Caption(t, t + 1, text) for t, text in drawn]
    tok, step = write_stream(captions, steps, WORDS)
    assert read_stream(tok, step, WORDS) == sorted(captions, key=lambda c: c.start)
    assert len(tok) == steps + sum(len(WORDS.encode(c.text)) + 1 for c in captions)
    assert step[tok == SILENCE].tolist() == list(range(steps))  # each step ends with one
    assert (step[1:] - step[:-1] == (tok[:-1] == SILENCE)).all()


def test_the_stream_of_the_docstring():
    captions = [Caption(3, 9, "eat a cow"), Caption(1, 4, "place table"), Caption(1, 2, "a")]
    tok, step = write_stream(captions, 5, WORDS)
    words = {END: "END", SILENCE: "SILENCE"}
    said = " ".join(words.get(i) or WORDS.decode([i]).strip() for i in tok.tolist())
    expected = "SILENCE place table END a END SILENCE SILENCE eat a cow END SILENCE SILENCE"
    assert said == expected
    assert step.tolist() == [0, *[1] * 6, 2, *[3] * 5, 4]


def test_a_caption_without_tokens_is_refused():
    with pytest.raises(ValueError, match="no tokens"):
        write_stream([Caption(3, 4, "")], 10, WORDS)


def test_a_broken_stream_can_be_read():
    wood = WORDS.encode("collect wood")
    broken = [END, wood[0], SILENCE, *wood, END, END, wood[1]]
    step = [0, 0, 0, *[1] * (len(broken) - 3)]
    read = read_stream(broken, step, WORDS)
    assert read == [(0, 1, "collect"), (1, 2, "collect wood"), (1, 2, " wood")]


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
    about = dict(f1=2 / 5, f1_exact=0, word_f1=1 / 3, precision=1 / 2, recall=1 / 3)
    assert score(true, written) == about | dict(texts=texts)


SAID = st.lists(
    st.tuples(st.integers(0, 8), st.sampled_from(["a b", "b", "a c c", "d"])), max_size=4
)


@settings(max_examples=60, deadline=None)
@given(SAID, SAID)
def test_the_word_overlap_is_the_largest_of_all_pairings_in_order(true, written):
    true, written = ([Caption(t, t + 1, x) for t, x in sorted(part)] for part in (true, written))

    def overlap(a, b):
        a, b = a.text.split(), list(b.text.split())
        total, shared = len(a) + len(b), 0
        for word in a:
            if word in b:
                b.remove(word)
                shared += 1
        return 2 * shared / total

    best = 0
    for n in range(min(len(true), len(written)) + 1):
        for some, others in product(combinations(true, n), combinations(written, n)):
            pairs = list(zip(some, others, strict=True))
            if all(abs(a.start - b.start) <= 3 for a, b in pairs):
                best = max(best, sum(overlap(a, b) for a, b in pairs))
    assert word_overlap(true, written) == pytest.approx(best)


def test_the_exact_score_wants_the_very_step():
    true = [[Caption(0, 1, "a"), Caption(10, 11, "b")]]
    result = score(true, [[Caption(1, 2, "a"), Caption(10, 11, "b")]])
    assert (result["f1"], result["f1_exact"]) == (1, 1 / 2)


# -----------------------------------------------------------------------------
# episodes


def test_episodes_come_back_from_disk(toy):
    episodes = Episodes(toy, "train")
    assert len(episodes) == 12
    assert torch.equal(episodes[3].obs[5:9], episodes[3].window(5, 9))
    for caption in episodes[11].captions:
        assert episodes[11].obs[caption.start].max() == 1


@pytest.mark.parametrize("dtype", ["uint8", "float16", "bfloat16"])
def test_observations_and_pictures_keep_their_dtype(tmp_path, dtype):
    obs = (torch.rand(7, 3) * 200).to(getattr(torch, dtype))
    pictures = np.arange(7 * 12, dtype=np.uint8).reshape(7, 2, 2, 3)
    write_shard(tmp_path, "train", 0, [Episode("one", obs, [], "all", pictures)])
    write_meta(tmp_path, obs_dim=3, dtype=dtype, steps_per_second=None, splits=["train"])
    episodes = Episodes(tmp_path, "train")
    assert episodes[0].obs.dtype == obs.dtype
    assert torch.equal(episodes[0].obs, obs)
    assert np.array_equal(episodes[0].pictures, pictures)


@pytest.mark.parametrize("text", ["cafe\u0301", "\u2126", "\u095c"])  # no text in NFC
def test_texts_compare_as_they_come_back_from_the_tokenizer(tmp_path, text):
    captions = [Caption(3, 4, f"see {text}")]
    for split in ("train", "test"):
        write_shard(tmp_path, split, 0, [Episode("a", np.ones((9, 2), np.float32), captions)])
    write_text(tmp_path, [captions])
    about = dict(source="", licence="", splits=["train", "test"])
    write_meta(tmp_path, obs_dim=2, dtype="float32", steps_per_second=None, **about)
    test = Episodes(tmp_path, "test")
    tokenizer = Tokenizer.from_captions([f"see {text}"])  # as runs have it that are of old
    assert read_text(tmp_path) == [test[0].captions] == [test[0].known_captions]
    for own in (tokenizer, Tokenizer.from_captions(c.text for c in test[0].captions)):
        [written] = perfect_writer(test, own)
        assert score([test[0].captions], [written])["f1"] == 1
        assert own.decode(own.encode(text)) == normalize("NFC", text) != text


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


def test_annotated_episodes_are_nested(toy):
    episodes = Episodes(toy, "train")
    assert choose_annotated(episodes, 8, 3)[:4] == choose_annotated(episodes, 4, 3)
    episodes[5].annotated = []
    assert 5 not in choose_annotated(episodes, 12, 3)


# -----------------------------------------------------------------------------
# windows


@pytest.fixture
def windows(toy, tokenizer):
    """Windows of four annotated episodes, the others as they are asked for."""
    episodes = Episodes(toy, "train")
    annotated = choose_annotated(episodes, 4, 0)

    def make(T=16, seed=0, reader=None, annotated=annotated, micro_batch=999):
        text = text_of(episodes, annotated, reader)
        return Windows(episodes, text, tokenizer, T, seed, micro_batch)

    return make


class OneCaption:
    """A reader that says one thing."""

    train_text = ()

    def captions(self, obs):
        assert obs.shape == (40, 6)
        return [Caption(2, 3, "walk")]


def test_a_window_depends_on_seed_step_and_number_alone(windows):
    eight, one = windows(micro_batch=3).batch(7, range(8)), windows().batch(7, [5])[0]
    assert [len(batch.tok) for batch in eight] == [3, 3, 2]
    lengths = [batch.tok.shape[1] for batch in eight]
    assert lengths == sorted(lengths)
    alike = [(b, row) for b in eight for row in range(len(b.obs)) if b.obs[row].equal(one.obs[0])]
    [(batch, row)] = alike
    for name, a, b in zip(Batch._fields, batch, one, strict=True):
        a, b = a[row], b[0]
        if name not in ("obs", "noise"):  # slots are padded to the longest of the batch
            padding = dict(tok=SILENCE, step=15).get(name, False)
            assert (a[len(b) :] == padding).all()
            a = a[: len(b)]
        assert torch.equal(a, b)
    other = windows(seed=1).batch(7, range(8))[0]
    assert not any(other.obs[n].equal(one.obs[0]) for n in range(8))


def test_where_nobody_reads_the_rest_windows_are_of_annotated_steps_alone(windows):
    loader = windows()
    loader.episodes[loader.pool[0]].annotated = [[0, 20]]
    loader = windows()
    [batch] = loader.batch(0, range(50))
    assert not batch.pseudo.any() and batch.told.equal(batch.known)
    assert batch.known.any(1).sum() > 25 and not batch.known[batch.step >= 8].all()
    firsts = {tuple(obs) for i in loader.pool for obs in loader.episodes[i].obs.tolist()}
    assert all(tuple(obs) in firsts for obs in batch.obs[:, 0].tolist())


def test_where_nothing_is_annotated_windows_are_of_all_and_show_no_caption(windows):
    [batch] = windows(annotated=[]).batch(0, range(50))
    assert batch.told[:, 8:].all() and not batch.known.any()
    assert (batch.tok == SILENCE).all() and batch.step.equal(torch.arange(16).expand(50, 16))


def test_a_window_has_the_slots_of_its_steps(windows):
    loader = windows()
    for n in range(20):
        [batch] = loader.batch(n, [0])
        found = []
        for i in loader.pool:
            tok, step, *_ = map(torch.from_numpy, loader.slots(i))
            obs = loader.episodes[i].obs.float()
            start = (obs == batch.obs[0, 0]).all(1).nonzero()
            if len(start):
                inside = (step >= start[0]) & (step < start[0] + 16)
                found.append((tok[inside], step[inside] - start[0]))
        [(tok, step)] = found
        assert torch.equal(batch.tok[0, : len(tok)], tok) and len(tok) >= 16
        assert torch.equal(batch.step[0, : len(tok)], step)
        assert (batch.tok[0, len(tok) :] == SILENCE).all()
        assert not batch.told[0, len(tok) :].any()


def test_an_episode_shorter_than_the_window_is_padded(windows):
    [batch] = windows(T=64).batch(0, range(4))
    assert batch.known[batch.step < 40].all()
    assert not batch.told[batch.step >= 40].any()
    assert not batch.obs[:, 40:].any()


def test_a_reader_fills_what_nobody_annotated(windows, tokenizer):
    loader = windows()
    i = loader.pool[0]
    j = min({*range(12)} - {*loader.pool})
    loader.episodes[i].annotated = [[20, 40]]
    later = [caption for caption in loader.episodes[i].captions if caption.start >= 20]
    loader = windows(reader=OneCaption())
    for episode, captions, first in (i, [Caption(2, 3, "walk"), *later], 20), (j, [], 40):
        tok, step, known, told = map(torch.from_numpy, loader.slots(episode))
        captions = captions or [Caption(2, 3, "walk")]
        assert read_stream(tok, step, tokenizer) == [(t, t + 1, text) for t, _, text in captions]
        assert known.equal(step >= first) and told.all()
    [batch] = loader.batch(0, range(8))
    assert batch.told.equal(batch.known ^ batch.pseudo) and batch.pseudo.any()


def test_half_a_window_without_its_past_is_no_target(windows):
    loader = windows()
    starts = {tuple(loader.episodes[i].obs[0].tolist()) for i in loader.pool}
    [batch] = loader.batch(0, range(200))
    at_start = torch.tensor([tuple(obs.tolist()) in starts for obs in batch.obs[:, 0]])
    assert 0 < at_start.sum() < 200
    assert batch.known[at_start][:, :16].all()
    assert not batch.known[~at_start][batch.step[~at_start] < 8].any()
    assert batch.known[~at_start].any(1).all()


def test_every_step_of_an_episode_is_taught_as_often(windows):
    loader = windows(annotated=[0])
    rows = {tuple(row.tolist()): t for t, row in enumerate(loader.episodes[0].obs)}
    taught = torch.zeros(40)
    for batch in loader.batch(0, range(2000)):
        for obs, step, known in zip(batch.obs, batch.step, batch.known, strict=True):
            taught[rows[tuple(obs[0].tolist())] + step[known].unique()] += 1
    # in the middle 8 of 40 draws; up to twice that where windows were shifted
    assert taught.min() > 0.8 * 2000 * 8 / 40 and taught.max() < 2.2 * 2000 * 8 / 40
