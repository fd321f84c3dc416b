"""The recipes for t5x's own trainer (gin/t5x/recipes): read by our launcher, each is its twin in gin/recipes.

That t5x itself runs them is recorded in docs/experiments.md.
"""

import dataclasses
import re
from pathlib import Path

import pytest

from vikhr_t5 import gin_files, launch
from vikhr_t5.data.vocabulary import train_vocabulary
from vikhr_t5.train import loop

GIN = gin_files.gin_folder()
RECIPES = sorted((GIN / "t5x" / "recipes").glob("*.gin"))
TWINS = ["vikhr_t5_240m_flan", "vikhr_t5_240m_ul2", "vikhr_t5_3b_flan", "vikhr_t5_3b_ul2"]


@pytest.fixture(scope="module")
def vocabulary_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("vocabulary") / "spiece.model"
    train_vocabulary([Path(__file__).parents[1] / "tasks/demo_data/en.txt"], file, size=600, max_lines=2000)
    return str(file)


def resolve(file: str, vocabulary_file: str, *bindings: str) -> dict:
    given = [f"VOCABULARY_FILE={vocabulary_file!r}", "MODEL_DIR='never/written'", *bindings]
    given += ["MIXTURE_OR_TASK_NAME='demo_ul2'"] if "demo" not in file else []
    given += ["INITIAL_CHECKPOINT_PATH='never/read'"] if "finetune.gin" in Path(GIN / file).read_text() else []
    launch.load([file], given)
    return launch.arguments(loop.train, supplied=["config_text"])


def test_the_recipes_are_there() -> None:
    assert [file.stem for file in RECIPES] == ["demo", *TWINS]


@pytest.mark.parametrize("name", TWINS)
def test_a_recipe_for_t5x_is_ours_in_its_names(name: str, vocabulary_file: str) -> None:
    theirs = resolve(f"t5x/recipes/{name}.gin", vocabulary_file)
    restores = theirs["checkpoint_cfg"].restore is not None
    initial = ["INITIAL_CHECKPOINT_PATH='never/read'"] if restores else []
    launch.load(
        [f"recipes/{name}.gin"],
        [f"VOCABULARY_FILE={vocabulary_file!r}", "MODEL_DIR='never/written'", "MIXTURE_OR_TASK_NAME='demo_ul2'",
         "T5Config.vocab_size=58368", *initial],
    )  # fmt: skip
    ours = launch.arguments(loop.train, supplied=["config_text"])
    # t5x's vanilla network cannot recompute, and so takes smaller microbatches.
    assert theirs["model"].config == dataclasses.replace(ours["model"].config, remat_policy="everything")
    assert theirs["model"].optimizer == ours["model"].optimizer
    assert theirs["model"].loss_normalizing_factor == ours["model"].loss_normalizing_factor
    assert theirs["model"].vocabulary.fingerprint() == ours["model"].vocabulary.fingerprint()
    assert theirs["total_steps"] == ours["total_steps"]
    assert theirs["checkpoint_cfg"].save.period == ours["checkpoint_cfg"].save.period
    assert restores == (ours["checkpoint_cfg"].restore is not None)
    for data in ("train_dataset_cfg", "train_eval_dataset_cfg"):
        for field in ("mixture_or_task_name", "task_feature_lengths", "split", "batch_size", "pack", "shuffle"):
            assert getattr(theirs[data], field) == getattr(ours[data], field), field
    for step in (0, 500, 5000, 15000, 60000):
        rates = [float(a["trainer"].learning_rate_fn(step)) for a in (theirs, ours)]
        assert rates[0] == pytest.approx(rates[1], rel=1e-6)
    if "3b" not in name:
        assert theirs["trainer"].num_microbatches == ours["trainer"].num_microbatches
    assert theirs["train_dataset_cfg"].batch_size % theirs["trainer"].num_microbatches == 0


def test_the_demo_for_t5x_is_the_demo_model_and_data(vocabulary_file: str) -> None:
    theirs = resolve("t5x/recipes/demo.gin", vocabulary_file)
    launch.load(["recipes/demo.gin"], [f"VOCABULARY_FILE={vocabulary_file!r}"])
    ours = launch.arguments(loop.train, supplied=["config_text"])
    assert theirs["model"].config == dataclasses.replace(ours["model"].config, vocab_size=8192)
    assert theirs["train_dataset_cfg"].mixture_or_task_name == "demo_ul2"
    assert theirs["train_dataset_cfg"].module == "tasks.demo"
    assert theirs["total_steps"] == ours["total_steps"]


@pytest.mark.parametrize("network", ["t5", "scalable_t5"])
def test_scanned_models_have_their_kernels_factored_whatever_their_size(network: str, vocabulary_file: str) -> None:
    files = [f"t5x/examples/{network}/t5_1_1/base.gin", "t5x/configs/runs/pretrain.gin"]
    launch.load(
        files,
        ["MODEL_DIR='never/written'", "MIXTURE_OR_TASK_NAME='demo_ul2'", "TRAIN_STEPS=1", "DROPOUT_RATE=0.0",
         "TASK_FEATURE_LENGTHS={'inputs': 64, 'targets': 32}", "T5Config.emb_dim=16", "T5Config.vocab_size=2048",
         f"SentencePieceVocabulary.sentencepiece_model_file={vocabulary_file!r}"],
    )  # fmt: skip
    moments = launch.arguments(loop.train, supplied=["config_text"])["model"].abstract_state().opt_state.moments
    kernel = moments["encoder"]["layers"]["mlp"]["wo"]["kernel"]
    assert set(kernel) == ({"v_row", "v_col"} if network == "scalable_t5" else {"v"})
    assert set(moments["token_embedder"]["embedding"]) == {"v"}


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_what_t5x_would_read_is_t5x_alone(file: Path) -> None:
    """Includes are files that t5x has; imports are t5x's, seqio's, and our tasks; the head tells how to run it."""
    text = file.read_text(encoding="utf-8")
    includes = re.findall(r"^include '(.*)'", text, re.MULTILINE)
    assert {Path(name).parts[:2] for name in includes} == {("t5x", "examples"), ("t5x", "configs")}
    imports = re.findall(r"^(?:import|from) ([\w.]+)", text, re.MULTILINE)
    assert {name.split(".")[0] for name in imports} <= {"__gin__", "__main__", "seqio", "t5x", "tasks"}
    # gin refuses a binding of something that the file itself does not import.
    known = {name.split()[-1] for name in re.findall(r"^(?:import|from \S+ import) (.+)$", text, re.MULTILINE)}
    for selector in re.findall(r"^(\w+)\.\w+(?:\.\w+)? ?[=:]", text, re.MULTILINE):
        assert selector in known, selector
    head = text.split("from __gin__")[0]
    assert f"--gin_file=gin/t5x/recipes/{file.name}" in head
    assert "# Data" in head
    assert "# Hardware" in head
