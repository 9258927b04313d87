import json

import pytest

from bench import labels

ROW = dict(arm="ours", N=8, seed=0, f1=0.5, f1_exact=0.4, word_f1=0.6)
BROKEN = ["{", "[]", "5", "{}", json.dumps(ROW)[:-9], json.dumps(ROW | dict(N="8"))]
BROKEN += [json.dumps(ROW | dict(f1=None)), json.dumps(ROW | dict(new="x")), "\ud800", "[" * 10**5]


@pytest.mark.parametrize("line", BROKEN)
def test_a_broken_line_of_scores_is_named(tmp_path, monkeypatch, line, capsys):
    monkeypatch.setattr(labels, "out", str(tmp_path))
    content = json.dumps(ROW).encode() + b"\n"
    (tmp_path / "scores.jsonl").write_bytes(content)
    labels.table()
    assert "0.500" in capsys.readouterr().out
    (tmp_path / "scores.jsonl").write_bytes(content + line.encode(errors="surrogatepass"))
    with pytest.raises(ValueError, match="scores.jsonl, line 2: .*; remove the line") as error:
        labels.table()
    assert "\n" not in str(error.value)
