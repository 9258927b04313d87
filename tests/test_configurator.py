import pytest

from configurator import configure, require, settings

SCRIPT = '''"""What it does."""
import os
lr = 1e-3                             # learning rate
name = "x"                            # a name
init = None                           # anything
flag = True                           # yes or no
K = 8                                 # tokens ahead
def main(): pass
later = 3
'''


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    namespace = {"__file__": str(path), "__doc__": "What it does."}
    exec(SCRIPT, namespace)
    return namespace


def test_the_settings_are_the_literals_at_the_top(script):
    assert settings(script["__file__"])["lr"] == (1e-3, "learning rate")
    assert list(settings(script["__file__"])) == ["lr", "name", "init", "flag", "K"]


def test_file_and_arguments_override_in_order(script, tmp_path):
    (tmp_path / "x.py").write_text("K = 4\nlr = 1\n_half = K // 2")
    resolved = configure(script, [str(tmp_path / "x.py"), "--K=2", "--init=a/b", "--name=3"])
    assert resolved == dict(lr=1.0, name="3", init="a/b", flag=True, K=2) and script["K"] == 2


def test_a_bare_name_switches_a_flag_on(script):
    script["flag"] = False
    assert configure(script, ["--flag"])["flag"] is True


@pytest.mark.parametrize("argument, message", [
    ("--k_ahead=3", "unknown setting 'k_ahead'"), ("--nam=3", "did you mean 'name'"), ("--K=2.5", "K is a int"),
    ("--flag=1", "flag is a bool"), ("--K", "--name=value"), ("missing.py", "No such file"),
])
def test_what_cannot_be_meant_is_one_line_and_exit_code_2(script, argument, message, capsys):
    with pytest.raises(SystemExit) as stopped: configure(script, [argument])
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and message in said and said.count("\n") == 1


def test_a_misspelt_config_file_is_answered_with_the_nearest(script, tmp_path, capsys):
    (tmp_path / "crafter.py").touch()
    with pytest.raises(SystemExit): configure(script, [str(tmp_path / "crafer.py")])
    assert f"did you mean {tmp_path / 'crafter.py'}?" in capsys.readouterr().err


@pytest.mark.parametrize("settings, message", [
    (dict(mode="c"), "--mode=c: one of 'a', 'b'"), (dict(K=0), "--K=0: at least 1"), (dict(share=1.5), "--share=1.5: at most 1"),
    (dict(share=float("nan")), "--share=nan: at most 1"), (dict(lr=None), None), ({}, None),
])
def test_a_value_that_cannot_be_meant_is_one_line(settings, message, capsys):
    check = lambda: require(dict(mode="a", K=1, share=0.5, lr=1.0) | settings, dict(mode=("a", "b")), dict(K=1, lr=0), dict(share=1))
    if not message: return check()
    with pytest.raises(SystemExit) as stopped: check()
    assert stopped.value.code == 2 and capsys.readouterr().err == message + "\n"


def test_a_config_with_a_syntax_error_names_file_and_line(script, tmp_path, capsys):
    (tmp_path / "bad.py").write_text("K = 4\nlr = = 3\n")
    with pytest.raises(SystemExit): configure(script, [str(tmp_path / "bad.py")])
    assert "bad.py, line 2: SyntaxError" in capsys.readouterr().err


def test_help_lists_every_setting_with_its_comment(script, capsys):
    with pytest.raises(SystemExit) as stopped: configure(script, ["--help"])
    assert stopped.value.code == 0 and "learning rate" in capsys.readouterr().out
