"""`vikhr-mistral`: an example in every help, exit statuses, one line for bad input; light until a command runs."""

import subprocess
import sys

import pytest

from vikhr_mistral import cli
from vikhr_t5 import packages
from vikhr_t5.errors import UserError

COMMANDS = ["tokenizer", "init", "pretrain", "instruct", "merge", "chat"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))


def bad_input(capfd, *argv):
    """The one line of a command that ends with 2."""
    assert cli.main(argv) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("vikhr-mistral: ")
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example_that_parses(command, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main([command, "--help"])
    assert caught.value.code == 0
    example = capsys.readouterr().out.split("example:\n")[1].strip()
    assert example.startswith(f"vikhr-mistral {command} ")
    assert cli.parse(example.split()[1:]).run


def test_bad_command_lines(capfd):
    assert "pretrain" in bad_input(capfd, "pretrian")
    assert "--config" in bad_input(capfd, "pretrain")
    assert "nearest: --temperature" in bad_input(capfd, "chat", "folder", "--temprature", "1")
    assert "--size" in bad_input(capfd, "tokenizer", "--corpus", "a", "--output", "b", "--size", "many")
    assert "--corpus" in bad_input(capfd, "tokenizer", "--output", "b")


def test_bad_input_of_every_command(capfd, tmp_path):
    assert "absent.txt" in bad_input(capfd, "tokenizer", "--corpus", "absent.txt", "--output", "out")
    assert "absent" in bad_input(capfd, "init", "--base", "absent", "--tokenizer", "t", "--output", "out")
    assert "nearest: demo_pretrain" in bad_input(capfd, "pretrain", "--config", "demo_pretrian")
    assert "nearest: vikhr_7b_instruct" in bad_input(capfd, "instruct", "--config", "vikhr_7b_instuct.yml")
    line = bad_input(capfd, "pretrain", "--config", "demo_pretrain", "--set", "train.max_step=3")
    assert "unknown setting 'max_step'; nearest: max_steps" in line
    assert "learning_rate is 'high'" in bad_input(
        capfd, "instruct", "--config", "demo_instruct", "--set", "train.learning_rate=high"
    )
    assert "unknown setting 'chats'" in bad_input(capfd, "pretrain", "--config", "demo_instruct")
    (tmp_path / "list.yaml").write_text("- a\n- b\n")
    assert "list.yaml" in bad_input(capfd, "instruct", "--config", "list.yaml")
    (tmp_path / "broken.yaml").write_text("train: {max_steps: 3\n")
    assert "broken.yaml is no YAML" in bad_input(capfd, "instruct", "--config", "broken.yaml")
    assert "is no adapter" in bad_input(capfd, "merge", "absent", "out")
    assert "absent: no such folder" in bad_input(capfd, "chat", "absent")
    assert "--top_k -1 is out of range" in bad_input(capfd, "chat", "absent", "--top_k", "-1")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UserError("what, where"), 2, "vikhr-mistral: what, where\n"),
        (ValueError("inside"), 1, "vikhr-mistral: ValueError: inside (run with --debug to see where)\n"),
        (KeyboardInterrupt(), 130, "vikhr-mistral: interrupted\n"),
    ],
)
def test_exit_statuses(error, status, line, capfd, monkeypatch):
    def fail(flags):
        raise error

    monkeypatch.setattr(cli, "_merge", fail)
    assert cli.main(["merge", "a", "b"]) == status
    assert capfd.readouterr().err == line
    if status != 130:
        assert cli.main(["merge", "a", "b", "--debug"]) == status
        assert "Traceback" in capfd.readouterr().err


def test_without_the_extra_it_is_named(capfd, monkeypatch):
    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda name: None if name == "peft" else object())
    assert "peft not installed: pip install 'vikhr-t5[mistral]'" in bad_input(capfd, "merge", "a", "b")


def test_the_command_line_is_light():
    code = "import vikhr_mistral.cli as c; c.build_parser(); import sys; print(*{n.split('.')[0] for n in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "transformers", "numpy", "jax", "tensorflow"} & set(loaded)
