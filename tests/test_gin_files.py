"""Every gin file that we ship, found by glob: parsed, initialised abstractly, its figures recomputed."""

import inspect
import re
from pathlib import Path

import jax
import pytest
from rich.console import Console

from vikhr_t5 import dry_run, gin_files, launch
from vikhr_t5 import eval as eval_script
from vikhr_t5 import infer as infer_script
from vikhr_t5.data.vocabulary import train_vocabulary
from vikhr_t5.devices import KINDS as ALL_KINDS
from vikhr_t5.plan_time import utilisation
from vikhr_t5.train import checkpoint_files, loop

GIN = gin_files.gin_folder()
KINDS = {kind.name: kind for kind in ALL_KINDS}
# Those of t5x/ speak t5x's names: tests/test_t5x_gin_files.py.
FILES = sorted(str(path.relative_to(GIN)) for path in GIN.rglob("*.gin") if GIN / "t5x" not in path.parents)
TINY = "models/t5_1_1_tiny.gin"
# With their own vocabularies: the sizes of the published checkpoints.
PUBLISHED = {
    32128: {
        "t5_1_0_small": 60_506_624,
        "t5_1_0_base": 222_903_552,
        "t5_1_0_large": 737_668_096,
        "t5_1_0_3b": 2_851_598_336,
        "t5_1_0_11b": 11_307_321_344,
        "t5_1_1_small": 76_961_152,
        "t5_1_1_base": 247_577_856,
        "t5_1_1_large": 783_150_080,
        "t5_1_1_xl": 2_849_757_184,
        "t5_1_1_xxl": 11_135_332_352,
    },
    250112: {
        "mt5_small": 300_176_768,
        "mt5_base": 582_401_280,
        "mt5_large": 1_229_581_312,
        "mt5_xl": 3_742_619_648,
        "mt5_xxl": 12_921_057_280,
    },
    384: {"byt5_small": 299_637_760, "byt5_base": 581_653_248, "byt5_xl": 3_737_801_728},
    256384: {"umt5_small": 306_601_984},
}
MODELS = {name: (rows, size) for rows, models in PUBLISHED.items() for name, size in models.items()}


@pytest.fixture(scope="module")
def vocabulary_file(tmp_path_factory):
    text = (Path(__file__).parents[1] / "tasks/demo_data/ru.txt").read_text(encoding="utf-8")[:100_000]
    file = tmp_path_factory.mktemp("vocabulary") / "spiece.model"
    train_vocabulary([text], file, size=600)
    return str(file)


def resolve(files, vocabulary_file, *bindings):
    """The arguments of `train`, with whatever the files require filled in."""
    given = {
        "VOCABULARY_FILE": repr(vocabulary_file),
        "MODEL_DIR": "'never/written'",
        "MIXTURE_OR_TASK_NAME": "'demo_ul2'",
        "TASK_FEATURE_LENGTHS": "{'inputs': 64, 'targets': 32}",
        "TRAIN_STEPS": "10",
        "INITIAL_CHECKPOINT_PATH": "'never/read'",
    }
    # What a file sets itself must stay: only what is required is given.
    try:
        launch.load(files)
        missing = ""
    except Exception as error:
        missing = str(error)
    launch.load(files, [*(f"{k}={v}" for k, v in given.items() if f"--gin.{k}=" in missing), *bindings])
    return launch.arguments(loop.train, supplied=["config_text"])


def companions(file):
    if file.startswith("models/"):
        return [file, "runs/pretrain.gin"]
    return [TINY, file] if file.startswith("runs/") else [file]


def test_the_files_of_the_issue_are_there():
    recipes = [
        "demo",
        "demo_finetune",
        "vikhr_t5_240m_ul2",
        "vikhr_t5_240m_flan",
        "vikhr_t5_3b_ul2",
        "vikhr_t5_3b_flan",
    ]
    models = [*MODELS, "t5_1_0_tiny", "t5_1_1_tiny", "vikhr_t5_240m", "vikhr_t5_3b"]
    wanted = {
        *(f"recipes/{name}.gin" for name in recipes),
        *(f"models/{name}.gin" for name in models),
        "runs/pretrain.gin",
        "runs/finetune.gin",
    }
    assert wanted <= set(FILES)


@pytest.mark.parametrize("file", [file for file in FILES if file not in ("runs/eval.gin", "runs/infer.gin")])
def test_resolves_and_initialises(file, vocabulary_file):
    given = [] if file.startswith("models/byt5") else [f"VOCABULARY_FILE={vocabulary_file!r}"]
    arguments = resolve(companions(file), vocabulary_file, *given)
    model = arguments["model"]
    state = model.abstract_state()
    assert sum(leaf.size for leaf in jax.tree.leaves(state.params)) == model.config.param_count()
    assert model.config.vocab_size == model.vocabulary.padded_size
    arguments["partitioner"].shardings(model.state_axes(), state)
    assert arguments["trainer"].learning_rate_fn(0) >= 0
    assert arguments["train_dataset_cfg"].split == "train"
    assert arguments["train_eval_dataset_cfg"].split == "validation"


@pytest.mark.parametrize(("name", "function"), [("eval", eval_script.evaluate), ("infer", infer_script.infer)])
def test_run_files_without_training_resolve(name, function, vocabulary_file):
    given = [
        "MIXTURE_OR_TASK_NAME='demo_complete'",
        "CHECKPOINT_PATH='never/read'",
        f"VOCABULARY_FILE={vocabulary_file!r}",
    ]
    given += [f"{name.upper()}_OUTPUT_DIR='never/written'"]
    given += ["TASK_FEATURE_LENGTHS={'inputs': 64, 'targets': 32}"] if name == "infer" else []
    launch.load([TINY, f"runs/{name}.gin"], given)
    arguments = launch.arguments(function, supplied=["config_text"])
    inspect.signature(function).bind(**arguments)
    assert (arguments["dataset_cfg"].split, arguments["output_dir"]) == ("validation", "never/written")
    assert arguments["restore_checkpoint_cfg"].path == "never/read"


@pytest.mark.parametrize("file", [f for f in FILES if f.startswith("recipes/")])
def test_configuration_text_resolves_to_the_same(file, vocabulary_file, tmp_path):
    first = resolve([file], vocabulary_file, f"VOCABULARY_FILE={vocabulary_file!r}")
    text = launch.config_text()
    (tmp_path / "config.gin").write_text(text)
    launch.load([str(tmp_path / "config.gin")])
    second = launch.arguments(loop.train, supplied=["config_text"])
    assert launch.config_text() == text
    assert second["model"].config == first["model"].config
    assert second["model"].optimizer == first["model"].optimizer
    for name in (
        "train_dataset_cfg",
        "train_eval_dataset_cfg",
        "checkpoint_cfg",
        "partitioner",
        "total_steps",
        "model_dir",
    ):
        assert second[name] == first[name]
    steps = range(0, first["total_steps"], max(1, first["total_steps"] // 7))
    rates = [[float(a["trainer"].learning_rate_fn(step)) for step in steps] for a in (first, second)]
    assert rates[0] == rates[1]


@pytest.mark.parametrize("name", MODELS)
def test_model_sizes_are_the_published_ones(name, vocabulary_file):
    rows, size = MODELS[name]
    arguments = resolve([f"models/{name}.gin", "runs/pretrain.gin"], vocabulary_file, f"T5Config.vocab_size={rows}")
    assert arguments["model"].config.param_count() == size


@pytest.mark.parametrize(("recipe", "millions"), [("vikhr_t5_240m_ul2", 288), ("vikhr_t5_3b_ul2", 2957)])
def test_the_models_of_the_recipes(recipe, millions, vocabulary_file):
    """58,000 pieces and 300 sentinels, padded to a multiple of 128."""
    arguments = resolve([f"recipes/{recipe}.gin"], vocabulary_file, "T5Config.vocab_size=58368")
    assert round(arguments["model"].config.param_count() / 1e6) == millions


@pytest.mark.parametrize("file", [f for f in FILES if f.startswith("recipes/")])
def test_a_recipe_says_what_it_expects(file, vocabulary_file):
    """Data, hardware, time; and where time is an estimate, its arithmetic is right and it says so."""
    head = (GIN / file).read_text(encoding="utf-8").split("from __gin__")[0]
    assert "# Data" in head
    assert "hardware" in head.lower()
    assert re.search("# (Time|Hours)", head)
    if "# Hours" not in head:
        return
    assert "estimate, not measured" in head
    row, batch, steps, total = (
        float(number.replace(",", ""))
        for number in re.search(r"([\d.]+) TFLOP a row[^=]*? x (\d+) x ([\d,]+) =\n?#?\s*([\d.]+) EFLOP", head).groups()
    )
    arguments = resolve([file], vocabulary_file, "T5Config.vocab_size=58368")
    data = arguments["train_dataset_cfg"]
    flops = arguments["model"].config.flops_per_step(1, *data.task_feature_lengths.values())
    assert row == pytest.approx(flops / 1e12, rel=0.01)
    assert batch == data.batch_size
    restore = arguments["checkpoint_cfg"].restore
    assert steps == arguments["total_steps"] or restore is not None
    assert total == pytest.approx(flops * batch * steps / 1e18, rel=0.02)
    hours = float(re.search(r"TFLOP/s, ([\d.]+) hours", head.replace("\n#", "").replace("           ", " ")).group(1))
    share = float(re.search(r"at (\d+)% of an H100's 989", head)[1]) / 100
    assert hours == pytest.approx(total * 1e18 / (share * 989e12) / 3600, rel=0.04)
    assert share == utilisation(KINDS["H100-80GB"], "bfloat16", arguments["model"].config.param_count(), None)[0]


@pytest.mark.parametrize("file", FILES)
def test_bindings_name_real_modules(file):
    text = (GIN / file).read_text(encoding="utf-8")
    assert "__main__" not in text
    assert text.startswith("#")
    assert "from __gin__ import dynamic_registration" in text


def test_dry_run_shows_model_data_mesh_memory(vocabulary_file):
    arguments = resolve([TINY, "runs/pretrain.gin"], vocabulary_file, "BATCH_SIZE=8", "CACHE_DIR='never/made'")
    console = Console(record=True, width=120, file=open("/dev/null", "w"))  # noqa: SIM115
    dry_run.show(arguments, console)
    text = " ".join(console.export_text().split())
    model = arguments["model"]
    assert f"({model.config.param_count():,})" in text
    assert "data 1, fsdp 1, tensor 1" in text
    assert "optimizer Adafactor data" in text  # nothing differs from its defaults
    assert "demo_ul2/train" in text
    assert "not cached" in text
    assert "8 rows" in text


def test_dry_run_counts_from_the_checkpoint(vocabulary_file, tmp_path):
    """TRAIN_STEPS includes the steps of the initial checkpoint; TRAIN_STEPS_RELATIVE counts from there."""
    (tmp_path / "stage1").mkdir()
    (tmp_path / "stage1" / "progress.json").write_text('{"step": 20, "first_step": 0}')
    checkpoint_files.seal(tmp_path / "stage1")
    given = ["CACHE_DIR='never/made'", f"INITIAL_CHECKPOINT_PATH='{tmp_path}/stage1'", f"MODEL_DIR='{tmp_path}/run'"]
    for steps in ("TRAIN_STEPS=30", "TRAIN_STEPS_RELATIVE=10"):
        arguments = resolve([TINY, "runs/finetune.gin"], vocabulary_file, *given, steps)
        rows = dict(dry_run._run(arguments))
        assert rows["steps"] == "10, from 20 to 30"


def test_dry_run_memory_is_that_of_the_arrays(vocabulary_file):
    """float32 parameters and gradients; the tiny model is too small to factor, so Adafactor's moments are as many."""
    arguments = resolve([TINY, "runs/pretrain.gin"], vocabulary_file)
    count = arguments["model"].config.param_count()
    parts = dry_run.memory(arguments["model"], arguments["partitioner"])
    assert parts == {"parameters": 4 * count, "gradients": 4 * count, "optimizer": 4 * count + 4}
