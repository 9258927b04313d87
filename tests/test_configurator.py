from configurator import check_range, configure, run, settings

import pytest

SCRIPT = '''"""What it does."""
import os
lr = 1e-3  # learning rate
half = 8 // 2  # computed
name = "x"  # a name
init = ""  # anything
flag = False  # yes or no
K = 8  # tokens ahead
LIMIT = 9  # no setting
def main(): pass
later = 3
'''


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    namespace = {"__file__": str(path)}
    exec(SCRIPT, namespace)
    return namespace


def test_the_settings_are_the_literals_at_the_top(script):
    defaults = settings(script["__file__"])
    assert list(defaults) == ["lr", "name", "init", "flag", "K"]
    assert defaults["lr"] == (1e-3, "learning rate")


def test_file_and_arguments_override_in_order(script, tmp_path):
    path = tmp_path / "x.py"
    path.write_text("K = 4\nlr = 1\n_half = K // 2")
    resolved = configure(script, [str(path), "--K=2", "--init=a/b", "--name=3", "--flag"])
    assert resolved == dict(lr=1.0, name="3", init="a/b", flag=True, K=2)
    assert script["K"] == 2


def test_a_bare_argument_gives_a_setting_where_a_program_names_one(script, tmp_path):
    path = tmp_path / "x.py"
    path.write_text("K = 4")
    resolved = configure(script, ["out/mine", str(path), "--flag"], bare="name")
    assert (resolved["name"], resolved["K"], resolved["flag"]) == ("out/mine", 4, True)


def test_a_config_file_is_utf8_whatever_it_says(script, tmp_path):
    path = tmp_path / "x.py"
    text = "# coding: latin-1\nname = 'caf\u00e9'\n"
    for encoding in ("utf-8", "utf-8-sig"):
        path.write_bytes(text.encode(encoding))
        assert configure(script, [str(path)])["name"] == "caf\u00e9"
    for wrong in (text, "K = 4  # caf\u00e9\n"):
        path.write_bytes(wrong.encode("latin-1"))
        with pytest.raises(ValueError, match=f"^{path}: UnicodeDecodeError: 'utf-8' .*$"):
            configure(script, [str(path)])


MISTAKES = {
    "--k_ahead=3": "unknown setting 'k_ahead'",
    "--nam=3": "did you mean 'name'",
    "--K=2.5": "K is of type int",
    "--flag=1": "flag is of type bool",
    "--K": "--K: a value is wanted, as in --K=..",
    "--name": "--name: a value is wanted, as in --name=..",
    "--nam": "did you mean 'name'",
    "--lr=1" + "0" * 400: "lr is of type float",
    "--K=" + "(" * 5000: "K is of type int",
    "missing.py": "no such file; a setting is given as --name=value",
}


@pytest.mark.parametrize("argument", MISTAKES)
def test_what_cannot_be_meant_is_one_line_and_exit_code_2(script, argument, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(lambda: configure(script, [argument]))
    text = capsys.readouterr().err
    assert stopped.value.code == 2
    assert MISTAKES[argument] in text
    assert text.count("\n") == 1


def test_a_config_with_a_syntax_error_names_file_and_line(script, tmp_path):
    (tmp_path / "bad.py").write_text("K = 4\nlr = = 3\n")
    with pytest.raises(ValueError, match="bad.py: SyntaxError: .*line 2"):
        configure(script, [str(tmp_path / "bad.py")])


@pytest.mark.parametrize("text", ["exit(3)", "lr = 10**400", "K = " + "(" * 500])
def test_a_config_that_cannot_be_meant_is_one_line(script, tmp_path, text):
    (tmp_path / "bad.py").write_text(text)
    with pytest.raises(ValueError, match="bad.py") as error:
        configure(script, [str(tmp_path / "bad.py")])
    assert "\n" not in str(error.value)


TOOLS = """
import time, math as m
from os.path import join
def half(x): return x // 2
class Mine(BaseException):
    def __str__(self): raise self
K = half(8)
"""


def test_modules_functions_and_classes_of_a_config_are_no_settings(script, tmp_path):
    path = tmp_path / "x.py"
    path.write_text(TOOLS)
    assert configure(script, [str(path)])["K"] == 4
    path.write_text("def K(): pass")
    with pytest.raises(ValueError, match="K is of type int"):
        configure(script, [str(path)])


@pytest.mark.parametrize(
    "text", ["globals()[5] = 1", "raise Mine", "raise Mine()", "raise OSError"]
)
def test_a_config_that_breaks_in_a_way_of_its_own_is_one_line(script, tmp_path, text):
    (tmp_path / "bad.py").write_text(TOOLS + text)
    with pytest.raises(ValueError, match="bad.py: (unknown setting 5|Mine: Mine|OSError: OSErr)"):
        configure(script, [str(tmp_path / "bad.py")])


def test_a_value_out_of_range_is_named():
    check_range(dict(K=2, lr=0.5), 0, "K lr", most=5)
    for value in (0, 9, float("nan")):
        with pytest.raises(ValueError, match=f"--K={value}: at least 1, at most 5"):
            check_range(dict(K=value), 1, "K", most=5)


def test_help_lists_every_setting_with_its_comment(script, capsys):
    with pytest.raises(SystemExit) as stopped:
        configure(script, ["--help"])
    text = capsys.readouterr().out
    assert stopped.value.code == 0
    assert "What it does." in text
    assert "--lr=0.001" in text
    assert "learning rate" in text
