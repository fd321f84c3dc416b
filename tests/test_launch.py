"""gin launches: search paths, overrides, what is refused and how; t5x's import lines."""

import importlib
import sys
import textwrap

import pytest

from vikhr_t5 import gin_files, launch, t5x_dialect
from vikhr_t5.errors import UserError

MODULE = """
import dataclasses

@dataclasses.dataclass(frozen=True)
class Config:
    width: int = 1
    name: str = "a"

    def __post_init__(self):
        if self.width < 0:
            raise ValueError("width must not be negative")

def train(model, model_dir, total_steps, data=None, text=""):
    return model, model_dir, total_steps, data
"""

DYNAMIC = "from __gin__ import dynamic_registration\n"

BASE = """
from __gin__ import dynamic_registration
import toy_launch as toy
MODEL_DIR = %gin.REQUIRED
TRAIN_STEPS = %gin.REQUIRED
WIDTH = 8
MODEL = @toy.Config()
toy.train:
  model = %MODEL
  model_dir = %MODEL_DIR
  total_steps = %TRAIN_STEPS
  data = {'train': @train/toy.Config(), 'eval': @eval/toy.Config()}
toy.Config.width = %WIDTH
train/toy.Config.name = 'train'
eval/toy.Config.name = 'eval'
"""


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    """A module to configure. One for all tests: gin remembers what it has registered."""
    folder = tmp_path_factory.mktemp("toy")
    (folder / "toy_launch.py").write_text(MODULE)
    sys.path.insert(0, str(folder))
    yield importlib.import_module("toy_launch")
    sys.path.remove(str(folder))


@pytest.fixture
def toy(module, tmp_path, monkeypatch):
    """The module, in a working folder of its own with a gin file for it."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "base.gin", BASE)
    return module


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(text))


def refused(files, bindings=(), search_paths=()):
    with pytest.raises(UserError) as caught:
        launch.load(files, bindings, search_paths)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_files_overrides_and_scopes_reach_the_function(toy):
    launch.load(["base.gin"], ["MODEL_DIR='x'", "TRAIN_STEPS=3", "train/toy.Config.width=5"])
    values = launch.arguments(toy.train)
    assert values["model"] == toy.Config(8, "a")
    assert (values["model_dir"], values["total_steps"]) == ("x", 3)
    assert values["data"] == {"train": toy.Config(5, "train"), "eval": toy.Config(8, "eval")}


def test_a_second_load_starts_from_nothing(toy):
    launch.load(["base.gin"], ["MODEL_DIR='x'", "TRAIN_STEPS=3", "WIDTH=2"])
    launch.load(["base.gin"], ["MODEL_DIR='y'", "TRAIN_STEPS=4"])
    assert launch.arguments(toy.train)["model"].width == 8


def test_the_configuration_text_gives_the_same_configuration(toy, tmp_path):
    launch.load(["base.gin"], ["MODEL_DIR=some/dir", "TRAIN_STEPS=3", "train/toy.Config.width=5"])
    values, text = launch.arguments(toy.train, supplied=["text"]), launch.config_text()
    (tmp_path / "config.gin").write_text(text)
    launch.load(["config.gin"])
    assert launch.arguments(toy.train, supplied=["text"]) == values
    assert launch.config_text() == text
    launch.load(["config.gin"], ["toy.Config.width=7"])
    assert launch.arguments(toy.train)["model"].width == 7


def test_the_configuration_text_records_defaults(toy):
    """So that it still says what ran when a later version has other defaults."""
    launch.load(["base.gin"], ["MODEL_DIR='x'", "TRAIN_STEPS=3"])
    launch.arguments(toy.train, supplied=["text"])
    text = launch.config_text()
    assert "toy.Config.name = 'a'" in text
    assert "toy.train.text" not in text


@pytest.mark.parametrize("value", ["/a/b", "runs/demo", "./a", "../a", "gs://bucket/a-b", "a_1/b.c"])
def test_a_path_needs_no_inner_quotes(toy, value):
    launch.load(["base.gin"], [f"MODEL_DIR={value}", "TRAIN_STEPS=3"])
    assert launch.arguments(toy.train)["model_dir"] == value


def test_home_is_expanded_in_a_bare_path(toy, monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    launch.load(["base.gin"], ["MODEL_DIR=~/runs", "TRAIN_STEPS=3"])
    assert launch.arguments(toy.train)["model_dir"] == "/home/somebody/runs"


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        ("demo", "write --gin.MODEL_DIR=\"'demo'\""),
        ("false", "write --gin.MODEL_DIR=False"),
        ("None2", "'None2'"),
        ("1/10", "not a gin (Python) value"),
        ("{'inputs': 3", "not a gin (Python) value"),
        ("", "write --gin.NAME=VALUE"),
    ],
)
def test_other_values_must_be_python(toy, value, hint):
    """`--gin.USE_CACHED_TASKS=false` must never become the true string 'false'."""
    message = refused(["base.gin"], [f"MODEL_DIR={value}", "TRAIN_STEPS=3"])
    assert hint in message
    assert f"--gin.MODEL_DIR={value}" in message


def test_a_value_that_its_class_refuses(toy):
    launch.load(["base.gin"], ["MODEL_DIR='x'", "TRAIN_STEPS=3", "toy.Config.width=-1"])
    with pytest.raises(UserError, match=r"the bindings of Config do not suit it: width must not be negative$"):
        launch.arguments(toy.train)


def test_missing_required_macros_are_named_with_their_flags(toy):
    message = refused(["base.gin"])
    assert "--gin.MODEL_DIR=…" in message
    assert "--gin.TRAIN_STEPS=…" in message
    assert "WIDTH" not in message


def test_a_required_parameter_is_named(toy, tmp_path):
    write(tmp_path / "a.gin", "include 'base.gin'\nfrom __gin__ import dynamic_registration\n")
    write(tmp_path / "b.gin", BASE + "toy.Config.name = %gin.REQUIRED\n")
    assert "toy.Config.name" in refused(["b.gin"], ["MODEL_DIR='x'", "TRAIN_STEPS=1"])


def test_a_macro_that_is_used_but_never_set(toy, tmp_path):
    write(tmp_path / "a.gin", BASE + "toy.train.data = %OTHER\n")
    message = refused(["a.gin"], ["MODEL_DIR='x'", "TRAIN_STEPS=1"])
    assert "macro OTHER is used and never set: add --gin.OTHER=…" in message


def test_unknown_names_come_with_the_nearest(toy, tmp_path):
    given = ["MODEL_DIR='x'", "TRAIN_STEPS=1"]
    assert "nearest: TRAIN_STEPS" in refused(["base.gin"], [*given, "TRAIN_STEP=1"])
    assert "nearest: width" in refused(["base.gin"], [*given, "toy.Config.widht=1"])
    assert "nearest: toy.Config" in refused(["base.gin"], [*given, "toy.Confg.width=1"])
    write(tmp_path / "a.gin", BASE + "toy.Config.widht = 1\n")
    assert "a.gin:16: toy.Config has no parameter widht (nearest: width)" in refused(["a.gin"])
    write(tmp_path / "a.gin", BASE + "toy.Confg.width = 1\n")
    assert "a.gin:16: toy.Confg: the module toy_launch has no Confg (nearest: Config)" in refused(["a.gin"])
    write(tmp_path / "a.gin", BASE + "toys.Config.width = 1\n")
    assert "a.gin:16: 'toys' is not imported by this file" in refused(["a.gin"])
    write(tmp_path / "a.gin", DYNAMIC + "import no_such_module\nno_such_module.f.x = 1\n")
    assert "a.gin:2: cannot import: No module named 'no_such_module'" in refused(["a.gin"])


def test_a_syntax_error_names_file_and_line(toy, tmp_path):
    write(tmp_path / "a.gin", "A = 1\nB = = 2\n")
    assert "a.gin:2: gin syntax error" in refused(["a.gin"])
    write(tmp_path / "b.gin", "A = 1\nC = [1,\n  2\n")
    assert "b.gin:" in refused(["b.gin"])
    assert "syntax error" in refused(["b.gin"])
    write(tmp_path / "c.gin", "include 'a.gin'\n")
    assert "a.gin:2: " in refused(["c.gin"])


def test_a_file_that_is_not_text(toy, tmp_path):
    (tmp_path / "a.gin").write_bytes(b"A = '\xff'\n")
    assert "a.gin cannot be read as UTF-8" in refused(["a.gin"])


def test_a_missing_file_names_where_it_was_sought_and_what_is_near(toy, tmp_path):
    message = refused(["models/t5_1_1_smal.gin"], search_paths=[str(tmp_path / "elsewhere")])
    assert str(tmp_path) in message
    assert str(tmp_path / "elsewhere") in message
    assert str(gin_files.gin_folder()) in message
    assert "models/t5_1_1_small.gin" in message
    write(tmp_path / "a.gin", "\ninclude 'nowhere.gin'\n")
    assert "a.gin:2: gin file 'nowhere.gin' was not found" in refused(["a.gin"])


def test_a_file_that_includes_itself(toy, tmp_path):
    write(tmp_path / "a.gin", "include 'b.gin'\n")
    write(tmp_path / "b.gin", "include 'a.gin'\n")
    assert "a.gin includes itself, through b.gin" in refused(["a.gin"])


def test_search_order(toy, tmp_path):
    """Working folder, the including file's folder, --gin_search_paths, our own gin/ folder."""
    given = ["MODEL_DIR='x'", "TRAIN_STEPS=1"]

    def width():
        launch.load(["deep/top.gin"], given, ["given"])
        return launch.arguments(toy.train)["model"].width

    write(tmp_path / "given/deep/top.gin", BASE + "include 'w.gin'\n")
    write(tmp_path / "given/w.gin", "WIDTH = 3\n")
    assert width() == 3
    write(tmp_path / "given/deep/w.gin", "WIDTH = 2\n")
    assert width() == 2
    write(tmp_path / "w.gin", "WIDTH = 1\n")
    assert width() == 1
    assert launch._reading.find("models/t5_1_1_base.gin") == gin_files.gin_folder() / "models/t5_1_1_base.gin"


def test_what_a_function_needs_and_nothing_binds(toy, tmp_path):
    write(tmp_path / "a.gin", DYNAMIC + "import toy_launch as toy\ntoy.train.model = 1\n")
    launch.load(["a.gin"])
    with pytest.raises(UserError, match=r"needs model_dir, total_steps: bind toy.train.model_dir"):
        launch.arguments(toy.train)
    with pytest.raises(UserError, match="no gin file binds"):
        launch.arguments(write)


@pytest.mark.parametrize(
    ("line", "rewritten"),
    [
        ("from t5x import utils\n", "from vikhr_t5.t5x_dialect.t5x import utils\n"),
        (
            "from t5x.examples.t5 import network as n  # x",
            "from vikhr_t5.t5x_dialect.t5x.examples.t5 import network as n  # x",
        ),
        ("import seqio", "import vikhr_t5.t5x_dialect.seqio as seqio"),
        ("import t5x.utils", "import vikhr_t5.t5x_dialect.t5x as t5x"),
        ("import __main__ as train_script\n", "import vikhr_t5.t5x_dialect.__main__ as train_script\n"),
        ("import my_tasks\n", "import my_tasks\n"),
        ("from __gin__ import dynamic_registration\n", "from __gin__ import dynamic_registration\n"),
        ("# from t5x import utils\n", "# from t5x import utils\n"),
        ("important = 3\n", "important = 3\n"),
    ],
)
def test_import_lines_of_t5x(line, rewritten):
    assert t5x_dialect.rewrite_import(line) == rewritten


def test_t5x_modules_resolve_to_ours(toy, tmp_path):
    """The head of a t5x model file, unchanged, configures our classes; nothing of t5x or seqio is installed for it."""
    from vikhr_t5.data import vocabulary
    from vikhr_t5.model import network

    write(
        tmp_path / "a.gin",
        """
        from __gin__ import dynamic_registration
        import seqio
        import t5x.utils
        from t5x.examples.t5 import network
        import toy_launch as toy
        DROPOUT_RATE = 0.0
        VOCABULARY = @seqio.SentencePieceVocabulary()
        seqio.SentencePieceVocabulary.sentencepiece_model_file = "x.model"
        network.T5Config:
          emb_dim = 24
          mlp_activations = ('gelu', 'linear')
          dropout_rate = %DROPOUT_RATE
        toy.train:
          model = @network.T5Config()
          model_dir = %VOCABULARY
          total_steps = 1
        """,
    )
    launch.load(["a.gin"], ["network.T5Config.head_dim=8"])
    values = launch.arguments(toy.train)
    assert isinstance(values["model"], network.T5Config)
    assert (values["model"].emb_dim, values["model"].head_dim) == (24, 8)
    assert isinstance(values["model_dir"], vocabulary.Vocabulary)
    (tmp_path / "config.gin").write_text(launch.config_text())
    launch.load(["config.gin"])
    assert launch.arguments(toy.train)["model"] == values["model"]


def test_what_the_dialect_lacks_is_refused_by_name(toy, tmp_path):
    write(tmp_path / "a.gin", DYNAMIC + "from t5x import decoding\n")
    assert "a.gin:2: vikhr-t5 has no counterpart of t5x's module t5x.decoding" in refused(["a.gin"])
    write(tmp_path / "a.gin", DYNAMIC + "from t5x import utils\nutils.DatasetCfg.seed = 1\n")
    message = refused(["a.gin"])
    assert message.startswith("a.gin:3: t5x.utils.DatasetCfg is t5x's")
    assert "DatasetConfig" in message


def test_every_entry_of_the_dialect_exists():
    for names in t5x_dialect.TABLE.values():
        for target in names.values():
            module, name = target.split(":")
            assert hasattr(importlib.import_module(module), name), target
