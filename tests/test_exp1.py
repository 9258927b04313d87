import pytest
from conftest import ROOT, program

pytest.importorskip("av", reason="pip install -r requirements-vpt.txt")
import vpt_made  # noqa: E402

from data import Tokenizer  # noqa: E402
from domains.vpt.episodes import split_of  # noqa: E402
from model import Config, GPTNeoX  # noqa: E402

SMALL = [
    "--T=8",
    "--K=2",
    "--batch_size=4",
    "--max_iters=20",
    "--eval_interval=20",
    "--warmup_iters=2",
    "--learning_rate=1e-3",
]


def well(ended):
    """What a program printed, whose exit code must be 0."""
    code, out, err = ended
    assert code == 0, err
    return out


def stem_of(split):
    """A recording's name that the hash sends to this split."""
    stems = (f"player{n}-0123456789ab-20260101-120000" for n in range(1000))
    return next(stem for stem in stems if split_of(stem) == split)


@pytest.fixture
def recordings(tmp_path):
    for split in ("train", "val", "test"):
        ticks = [vpt_made.tick({"mine_block:oak_log": 1 + i // 12}) for i in range(60)]
        vpt_made.make_recording(tmp_path / "recordings", stem_of(split), ticks)
    return tmp_path / "recordings"


def test_experiment_1_runs_end_to_end_in_miniature(recordings, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    weights, data, pythia, out = (
        tmp_path / name for name in ("vpt.weights", "data", "pythia", "out")
    )
    vpt_made.save_weights(weights)
    places = f"--weights={weights}", f"--recordings={recordings}"
    well(vpt_made.vpt("embed", *places, f"--out={data}", "--workers=1", "--lag=0.2"))
    tokenizer = Tokenizer.from_captions(["mine an oak log", "mine two oak logs"])
    GPTNeoX(Config(tokenizer.vocab_size + 10, 32, 2, 2)).save_pretrained(pythia)
    tokenizer.save(pythia / "tokenizer.json")
    places = f"--data={data}", f"--init_from={pythia}", f"--out_dir={out}"
    said = well(program("train.py", "config/exp1.py", *places, *SMALL))
    assert "1 of 1 training episodes annotated" in said
    assert "perfect writer" in well(program("bench/report.py", out))
    places = f"--weights={weights}", f"--recordings={recordings}"
    shown = well(
        vpt_made.vpt("sample", *places, f"--out_dir={out}", f"--recording={stem_of('test')}")
    )
    assert ".mp4: 3 seconds" in shown and " seconds  sure  written" in shown
    assert "oak log" in well(program("sample.py", f"--out_dir={out}"))
