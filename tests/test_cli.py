"""Commands: exit statuses, one line for bad input, examples in every help, and a run from text to a resume."""

import json
import os
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from vikhr_t5 import cli, packages
from vikhr_t5.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = [
    ["train"],
    ["eval"],
    ["infer"],
    ["plan"],
    ["cache"],
    ["preview"],
    ["decontaminate"],
    ["convert"],
    ["report"],
    ["benchmark"],
    ["translate"],
    ["vocab", "train"],
    ["vocab", "chart"],
]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Commands must work from any folder; here it is an empty one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delenv("VIKHR_T5_VOCABULARY", raising=False)


def bad_input(capfd, *argv):
    """The one line of a command that ends with 2."""
    status = cli.main(argv)
    out, err = capfd.readouterr()
    assert (status, out) == (2, "")
    assert err.startswith("vikhr-t5: ")
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example_that_parses(command, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main([*command, "--help"])
    assert caught.value.code == 0
    examples = capsys.readouterr().out.split("example:\n")[1].strip().split("\n")
    for example in examples:
        program, *arguments = shlex.split(example.split(" | ")[-1])
        assert [program, *arguments[: len(command)]] == ["vikhr-t5", *command]
        assert cli.parse(arguments).run


def test_bad_command_lines(capfd):
    assert "train" in bad_input(capfd, "trian")
    assert "--gin_file" in bad_input(capfd, "train")
    assert "nearest: --dry_run" in bad_input(capfd, "train", "--gin_file=a.gin", "--dryrun")
    assert "--gin.TRAIN_STEPS" in bad_input(capfd, "report", "run", "--gin.TRAIN_STEPS=3")
    assert "nearest: --model_type" in bad_input(
        capfd, "vocab", "train", "--input=a", "--output=b", "--size=9", "--model_typ=bpe"
    )
    assert "--size" in bad_input(capfd, "vocab", "train", "--input", "a", "--output", "b", "--size", "many")
    assert "VIKHR_T5_VOCABULARY" in bad_input(capfd, "cache", "--mixture", "demo_ul2")
    convert = ["convert", "--from", "vikhr", "a", "b"]
    assert "--to" in bad_input(capfd, *convert)
    assert "--extra_ids counts the sentinels of --vocabulary" in bad_input(capfd, *convert, "--to=hf", "--extra_ids=0")
    swap = ["vocab", "swap", "--from=hf", "--to=vikhr", "a", "b", "--vocabulary=bytes", "--old_extra_ids=0"]
    assert "--old_extra_ids counts the sentinels of --old_vocabulary" in bad_input(capfd, *swap)
    assert "--seed is not for --gin_file" in bad_input(capfd, "infer", "--gin_file=a.gin", "--seed=0")


def test_bad_launches(capfd):
    demo = ["train", "--gin_file=recipes/demo.gin"]
    assert "nearest: recipes/demo.gin" in bad_input(capfd, "train", "--gin_file=recipes/dmo.gin")
    assert "nearest: BATCH_SIZE" in bad_input(capfd, *demo, "--gin.BATCHSIZE=3")
    assert "--gin.MODEL_DIR=…" in bad_input(
        capfd, "train", "--gin_file=models/t5_1_1_tiny.gin", "--gin_file=runs/pretrain.gin"
    )
    assert "emb_dim" in bad_input(capfd, *demo, "--gin.T5Config.emb_dimm=3")
    tiny = ["train", "--gin_file=models/t5_1_1_tiny.gin", "--gin_file=runs/pretrain.gin", "--gin.MODEL_DIR=a/b"]
    given = ["--gin.MIXTURE_OR_TASK_NAME='a'", "--gin.TASK_FEATURE_LENGTHS={'inputs': 8}", "--gin.TRAIN_STEPS=1"]
    assert "no/such.model" in bad_input(capfd, *tiny, *given, "--gin.VOCABULARY_FILE=no/such.model")


def test_a_vocabulary_from_nothing(capfd, tmp_path):
    (tmp_path / "empty.txt").write_text("\n\n")
    arguments = ["vocab", "train", "--output", "v.model", "--size", "500", "--input"]
    assert "empty.txt" in bad_input(capfd, *arguments, "empty.txt") or not (tmp_path / "v.model").exists()
    assert "absent.txt" in bad_input(capfd, *arguments, "absent.txt")
    (tmp_path / "latin.txt").write_bytes(b"abc\n\xff\xfe\n")
    assert "latin.txt" in bad_input(capfd, *arguments, "latin.txt")


def test_a_vocabulary_of_json_lines(capfd, tmp_path):
    """The fields that are named, by a sample that depends on the seed alone."""
    russian, english = ((ROOT / "tasks" / "demo_data" / name).read_text().split("\n") for name in ("ru.txt", "en.txt"))
    rows = [{"text": one, "title": two, "n": 1} for one, two in zip(russian[:2000], english, strict=False)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    train = ["vocab", "train", "--input", "a.jsonl", "--fields", "text,title", "--size", "800", "--max_lines", "900"]
    models = []
    for seed in ("1", "1", "2"):
        assert cli.main([*train, "--output", "v.model", "--seed", seed]) == 0
        models.append(Path("v.model").read_bytes())
    assert models[0] == models[1] != models[2]
    assert "▁документ".encode() in models[0]
    assert b"\xe2\x96\x81the" in models[0]
    capfd.readouterr()
    assert "no field 'txt'; nearest: text" in bad_input(capfd, *train, "--output", "w.model", "--fields", "txt")
    assert "--input FILES, or --mixture TASK" in bad_input(capfd, *train[:2], *train[4:], "--output", "w.model")


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UserError("what, where, what to do\n  In call to configurable 'x'"), 2, "vikhr-t5: what, where, what to do\n"),
        (ValueError("inside"), 1, "vikhr-t5: ValueError: inside (run with --debug to see where)\n"),
        (KeyboardInterrupt(), 130, "vikhr-t5: interrupted\n"),
    ],
)
def test_exit_statuses(error, status, line, capfd, monkeypatch):
    def fail(flags):
        raise error

    monkeypatch.setattr(cli, "_report", fail)
    assert cli.main(["report", "run"]) == status
    assert capfd.readouterr().err == line
    if status != 130:
        assert cli.main(["report", "run", "--debug"]) == status
        assert "Traceback" in capfd.readouterr().err


def test_a_foreign_package_of_our_name_is_refused(tmp_path):
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/__init__.py").write_text("raise SystemExit('imported')")
    command = [sys.executable, "-m", "vikhr_t5.cli", "train", "--gin_file=recipes/demo.gin", "--dry_run"]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    (tmp_path / "tasks/__init__.py").write_text("")
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert f"'tasks' is hidden: Python finds {tmp_path}/tasks/__init__.py" in done.stderr
    assert done.stderr.count("\n") == 1


def test_own_packages_are_known_without_importing_them(monkeypatch, tmp_path):
    for name in (*packages.OWN, "tasks.demo", "some_module", None):
        packages.require_own(name)
    (tmp_path / "conversion.py").write_text("raise RuntimeError('imported')")
    monkeypatch.delitem(sys.modules, "conversion", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match=r"'conversion' is hidden: Python finds .*conversion.py"):
        packages.require_own("conversion.huggingface")


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
@pytest.mark.parametrize(
    ("given", "seen"),
    [
        ("", "glibc.malloc.hugetlb=1"),
        ("glibc.malloc.arena_max=2", "glibc.malloc.arena_max=2:glibc.malloc.hugetlb=1"),
        ("glibc.malloc.hugetlb=0", "glibc.malloc.hugetlb=0"),
    ],
)
def test_train_starts_again_once_with_huge_pages(given, seen, tmp_path):
    (tmp_path / "seen.py").write_text("import os; print(os.environ['GLIBC_TUNABLES'], os.getpid(), flush=True)")
    (tmp_path / "a.gin").write_text("import seen\nimport nothing_of_this_name\nseen.f.x = 1\n")
    command = [sys.executable, "-m", "vikhr_t5.cli", "train", "--gin_file=a.gin"]
    environment = {**os.environ, "GLIBC_TUNABLES": given, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out = process.communicate()[0].decode()
    assert out == f"{seen} {process.pid}\n"
    assert process.returncode == 2


@pytest.mark.slow
def test_from_text_to_a_resumed_run_without_tensorflow(tmp_path):
    """vocab train, train (which caches first), then train again where importing TensorFlow, seqio or torch is fatal."""
    forbidden = tmp_path / "forbidden"
    for name in ("tensorflow", "seqio", "torch", "transformers"):
        (forbidden / name).mkdir(parents=True)
        (forbidden / name / "__init__.py").write_text(f"import os; print('{name} imported', flush=True); os._exit(7)")
    (tmp_path / "tiny.gin").write_text(
        textwrap.dedent("""
        from __gin__ import dynamic_registration
        from vikhr_t5.train import loop
        include 'models/t5_1_1_tiny.gin'
        include 'runs/pretrain.gin'
        MIXTURE_OR_TASK_NAME = 'demo_ul2'
        MIXTURE_OR_TASK_MODULE = 'tasks.demo'
        TASK_FEATURE_LENGTHS = {'inputs': 64, 'targets': 32}
        BATCH_SIZE = 4
        EVAL_STEPS = 1
        loop.train.num_samples = 0
        """)
    )

    def run(*argv, path=()):
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*map(str, path), str(ROOT)])}
        command = [sys.executable, "-m", "vikhr_t5.cli", *argv]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    text = str(ROOT / "tasks/demo_data/ru.txt")
    assert "700 pieces" in run("vocab", "train", "--input", text, "--output", "v/spiece.model", "--size", "700")
    given = ["--gin_file=tiny.gin", "--gin.MODEL_DIR=runs/a", "--gin.VOCABULARY_FILE=v/spiece.model"]
    assert "caching" in run("train", *given, "--gin.TRAIN_STEPS=2")
    assert "step 2 of 4" in run("train", *given, "--gin.TRAIN_STEPS=4", path=[forbidden])
    dry = run("train", *given, "--gin.TRAIN_STEPS=6", "--dry_run", path=[forbidden])
    assert "runs/a/checkpoints/4" in dry
    assert "rows in an epoch" in dry
    # The run's own configuration starts it again, from another folder's worth of flags: none.
    assert "step 4 of 5" in run("train", "--gin_file=runs/a/config.gin", "--gin.TRAIN_STEPS=5", path=[forbidden])
