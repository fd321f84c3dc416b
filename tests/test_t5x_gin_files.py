"""gin files in t5x's style, without t5x: what they configure, what is refused by name, and runs to a first step."""

import json
import math
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest
from tiny_run import TinyDataset

from vikhr_t5 import cli, gin_files, launch, t5x_adapters
from vikhr_t5 import eval as eval_script
from vikhr_t5 import infer as infer_script
from vikhr_t5.data.vocabulary import ByteVocabulary, train_vocabulary
from vikhr_t5.errors import UserError
from vikhr_t5.model.network import T5Config
from vikhr_t5.train import loop, optimizers

ROOT = Path(__file__).resolve().parents[1]
T5X = gin_files.gin_folder() / "t5x"
OURS_FOR_T5X = sorted(
    str(path.relative_to(T5X.parent)) for part in ("configs", "examples") for path in (T5X / part).rglob("*.gin")
)

MODEL = """
from __gin__ import dynamic_registration
import seqio
from t5x import adafactor
from t5x import models
from t5x.examples.t5 import network

DROPOUT_RATE = %gin.REQUIRED
VOCABULARY = @seqio.SentencePieceVocabulary()
seqio.SentencePieceVocabulary:
  sentencepiece_model_file = "small.model"
  extra_ids = 100
OPTIMIZER = @adafactor.Adafactor()
adafactor.Adafactor.logical_factor_rules = @adafactor.standard_logical_factor_rules()
MODEL = @models.EncoderDecoderModel()
models.EncoderDecoderModel:
  module = @network.Transformer()
  input_vocabulary = %VOCABULARY
  output_vocabulary = %VOCABULARY
  optimizer_def = %OPTIMIZER
  z_loss = 0.0002
network.Transformer.config = @network.T5Config()
network.T5Config:
  vocab_size = 768
  emb_dim = 16
  num_heads = 2
  head_dim = 8
  mlp_dim = 32
  num_encoder_layers = 2
  num_decoder_layers = 1
  mlp_activations = ('gelu', 'linear')
  dropout_rate = %DROPOUT_RATE
"""

RUN = """
from __gin__ import dynamic_registration
import __main__ as train_script
import private_tasks
from t5x import utils

include 'lib/model.gin'
include 't5x/configs/runs/pretrain.gin'

MODEL_DIR = 'run'
MIXTURE_OR_TASK_NAME = 'private_reverse'
TASK_FEATURE_LENGTHS = {'inputs': 24, 'targets': 12}
TRAIN_STEPS = 2
BATCH_SIZE = 8
DROPOUT_RATE = 0.0

train/utils.DatasetConfig.seed = 7
train_eval/utils.DatasetConfig:
  pack = False
  batch_size = 4
utils.SaveCheckpointConfig.period = 50
train_script.train:
  eval_period = 10
  eval_steps = 1
"""


@pytest.fixture(scope="module")
def vocabulary_file(tmp_path_factory):
    text = (ROOT / "tasks/demo_data/ru.txt").read_text(encoding="utf-8")[:100_000]
    file = tmp_path_factory.mktemp("vocabulary") / "small.model"
    train_vocabulary([text], file, size=600)
    return file


@pytest.fixture
def folder(tmp_path, monkeypatch, vocabulary_file):
    """A working folder with a model file in a search path of its own, and a run file that includes it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.model").symlink_to(vocabulary_file)
    write("shared/lib/model.gin", MODEL)
    write("run.gin", RUN)
    return tmp_path


def write(path, text):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(textwrap.dedent(text), encoding="utf-8")


def resolve(*bindings, files=("run.gin",), function=loop.train):
    launch.load(files, bindings, ["shared"])
    return launch.arguments(function, supplied=["config_text"])


def refused(*bindings, files=("run.gin",), function=loop.train):
    with pytest.raises(UserError) as caught:
        resolve(*bindings, files=files, function=function)
    return str(caught.value).split("\n")[0]


def run(arguments, evaluate=False):
    """A few steps on random rows, instead of those of a token store."""
    fast = {"num_samples": 0} if evaluate else {"train_eval_dataset_cfg": None}
    with mock.patch.object(loop, "open_dataset", lambda config, _: TinyDataset(config)):
        return loop.train(**{**arguments, **fast}, config_text=launch.config_text())


# ---- what the files configure ----------------------------------------------------------------------------------------


def test_a_private_file_configures_a_run(folder):
    arguments = resolve()
    model, train, evaluation = (arguments[n] for n in ("model", "train_dataset_cfg", "train_eval_dataset_cfg"))
    assert model.config == T5Config(
        768, "float32", 16, 2, 2, 1, 8, 32, ("gelu", "linear"), 0.0, False, False, "none", False
    )
    assert (model.z_loss, model.label_smoothing, model.loss_normalizing_factor) == (0.0002, 0.0, None)
    assert (model.vocabulary.extra_ids, model.optimizer) == (100, optimizers.Adafactor())
    assert (train.seed, train.pack, train.batch_size, train.split) == (7, True, 8, "train")
    assert (evaluation.seed, evaluation.pack, evaluation.batch_size) == (42, False, 4)
    save = arguments["checkpoint_cfg"].save
    assert (save.period, save.keep, arguments["checkpoint_cfg"].restore) == (50, None, None)
    assert (arguments["eval_period"], arguments["stats_period"], arguments["eval_steps"]) == (10, 10, 1)
    assert arguments["trainer"].learning_rate_fn(0) == pytest.approx(0.01)
    assert (arguments["total_steps"], arguments["model_dir"], arguments["random_seed"]) == (2, "run", None)


def test_a_module_of_tasks_is_left_to_caching(folder):
    assert resolve()["train_dataset_cfg"].module == "private_tasks"
    assert "private_tasks" not in sys.modules
    write("b.gin", RUN.replace("import private_tasks", "import private_tasks\nfrom more.of import tasks"))
    assert resolve(files=["b.gin"])["train_eval_dataset_cfg"].module == "private_tasks,more.of.tasks"
    assert resolve("MIXTURE_OR_TASK_MODULE='given'")["train_dataset_cfg"].module == "given"


def test_a_module_that_bindings_use_is_imported(folder, monkeypatch):
    monkeypatch.syspath_prepend(folder)
    code = "from vikhr_t5.train.optimizers import AdamW\n\ndef make(b1):\n    return AdamW(b1)\n"
    write("private_optimizer.py", code)
    imports = "import private_tasks\nimport private_optimizer\n"
    bindings = "OPTIMIZER = @private_optimizer.make()\nprivate_optimizer.make.b1 = 0.5\n"
    write("b.gin", RUN.replace("import private_tasks\n", imports) + bindings)
    assert resolve(files=["b.gin"])["model"].optimizer == optimizers.AdamW(b1=0.5)
    write("c.gin", RUN + "private_tasks.nothing.x = 1\n")
    assert "c.gin:4: cannot import: No module named 'private_tasks'" in refused(files=["c.gin"])


def test_a_file_without_dynamic_registration_adds_macros_and_tasks(folder):
    write("b.gin", "include 'run.gin'\nimport one.more  # registers tasks\nBATCH_SIZE = 16\n")
    train = resolve(files=["b.gin"])["train_dataset_cfg"]
    assert (train.batch_size, train.module) == (16, "one.more,private_tasks")


def test_the_configuration_in_the_run_folder_speaks_t5x(folder):
    first, text = resolve("train_script.train.eval_steps=3"), launch.config_text()
    assert "vikhr_t5" not in text
    assert "import __main__ as train_script" in text
    assert "from t5x import utils" in text
    write("config.gin", text)
    second = resolve(files=["config.gin"])
    assert launch.config_text() == text
    assert second["eval_steps"] == 3
    for name in ("train_dataset_cfg", "train_eval_dataset_cfg", "checkpoint_cfg", "partitioner", "model_dir"):
        assert second[name] == first[name]
    assert second["model"].config == first["model"].config


def test_a_checkout_is_found_before_our_files(folder):
    write("checkout/t5x/configs/runs/pretrain.gin", "include 'theirs.gin'\nBATCH_SIZE = 3\n")
    write("checkout/t5x/configs/runs/theirs.gin", (T5X / "configs/runs/pretrain.gin").read_text())
    launch.load(["run.gin"], [], ["shared", "checkout"])
    assert launch._reading.find("t5x/configs/runs/pretrain.gin").is_relative_to(folder)
    launch.load(["run.gin"], [], ["shared"])
    assert launch._reading.find("t5x/configs/runs/pretrain.gin").is_relative_to(T5X)


def test_fine_tuning_measures_generated_text(folder, capfd):
    write("b.gin", RUN.replace("pretrain.gin", "finetune.gin"))
    arguments = resolve("INITIAL_CHECKPOINT_PATH='somewhere'", files=["b.gin"])
    assert arguments["checkpoint_cfg"].restore.path == "somewhere"
    assert arguments["trainer"].learning_rate_fn(5) == pytest.approx(0.001)
    assert arguments["infer_eval_examples"] is None  # all, t5x's default
    few = ["INITIAL_CHECKPOINT_PATH='somewhere'", "EVALUATOR_NUM_EXAMPLES=8"]
    assert resolve(*few, files=["b.gin"])["infer_eval_examples"] == 8
    assert not capfd.readouterr().err
    other = resolve(*few, "infer_eval/utils.DatasetConfig.split='test'", files=["b.gin"])
    assert other["infer_eval_examples"] == 0
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("infer_eval_dataset_cfg: generated text is measured on the examples of train_eval_dataset")
    assert "vikhr-t5 eval" in line


def test_evaluation_and_inference(folder):
    head = """
        from __gin__ import dynamic_registration
        import __main__ as {0}_script
        from private import tasks
        import seqio
        from t5x import utils
        include 'lib/model.gin'
        include 't5x/configs/runs/{0}.gin'
        DROPOUT_RATE = 0.0
        MIXTURE_OR_TASK_NAME = 'private_reverse'
        CHECKPOINT_PATH = 'run/checkpoints/2'
        utils.DatasetConfig.split = 'validation'
        """
    write("e.gin", head.format("eval") + "EVAL_OUTPUT_DIR = 'out'\n        seqio.Evaluator.num_examples = 9\n")
    arguments = resolve("JSONLogger.write_n_results=2", files=["e.gin"], function=eval_script.evaluate)
    assert (arguments["output_dir"], arguments["num_examples"], arguments["write_n_results"]) == ("out", 9, 2)
    assert arguments["dataset_cfg"].task_feature_lengths is None
    assert (arguments["dataset_cfg"].module, arguments["dataset_cfg"].split) == ("private.tasks", "validation")
    assert (arguments["restore_checkpoint_cfg"].path, arguments["dtype"]) == ("run/checkpoints/2", "float32")
    every = resolve("utils.RestoreCheckpointConfig.mode='all'", files=["e.gin"], function=eval_script.evaluate)
    assert (arguments["restore_checkpoint_cfg"].mode, every["restore_checkpoint_cfg"].mode) == ("latest", "all")
    infer = head.format("infer") + "INFER_OUTPUT_DIR = 'out'\n        infer_script.infer.mode = 'score'\n"
    write("i.gin", infer + "        TASK_FEATURE_LENGTHS = {'inputs': 24, 'targets': 12}\n")
    arguments = resolve("infer_script.infer.num_shards=3", files=["i.gin"], function=infer_script.infer)
    assert (arguments["mode"], arguments["num_shards"], arguments["dtype"]) == ("score", 3, "bfloat16")
    assert "no gin file binds loop.train: include 'runs/pretrain.gin'" in refused(files=["i.gin"])


SCALABLE = MODEL.replace("t5x.examples.t5 ", "t5x.examples.scalable_t5 ")
SCALABLE += "  scan_layers = True\n  remat_policy = 'full'\n"


def test_scalable_t5_has_a_relative_bias_in_every_layer(folder):
    write("shared/lib/model.gin", SCALABLE)
    config = resolve()["model"].config
    assert (config.relative_bias_per_layer, config.remat_policy, config.emb_dim) == (True, "layer_inputs", 16)


def test_bytes(folder):
    write("shared/lib/model.gin", MODEL.replace("@seqio.SentencePieceVocabulary()", "@seqio.ByteVocabulary()"))
    vocabulary = resolve("T5Config.vocab_size=384")["model"].vocabulary
    assert isinstance(vocabulary, ByteVocabulary)
    assert vocabulary.size == 259


@pytest.mark.parametrize("file", OURS_FOR_T5X)
def test_what_stands_in_for_files_of_t5x_resolves(file, folder, vocabulary_file):
    """Each file, completed by a model or run file where it is none."""
    given = {
        "MODEL_DIR": "'never/written'",
        "MIXTURE_OR_TASK_NAME": "'a'",
        "TRAIN_EVAL_MIXTURE_OR_TASK_NAME": "'b'",
        "TASK_FEATURE_LENGTHS": "{'inputs': 64, 'targets': 32}",
        "TRAIN_STEPS": "10",
        "DROPOUT_RATE": "0.0",
        "INITIAL_CHECKPOINT_PATH": "'never/read'",
        "CHECKPOINT_PATH": "'never/read'",
        "EVAL_OUTPUT_DIR": "'never/written'",
        "INFER_OUTPUT_DIR": "'never/written'",
    }
    function = {"eval": eval_script.evaluate, "infer": infer_script.infer}.get(Path(file).stem, loop.train)
    umt5, is_run = "umt5" in file and "pretrain_" not in Path(file).name, "/runs/" in file
    files = [*(["t5x/examples/scalable_t5/mt5/small.gin", "t5x/examples/scalable_t5/umt5/vocab.gin"] if umt5 else [])]
    files += ["shared/lib/model.gin"] if is_run and not umt5 else []
    files += [file] if is_run or "umt5/pretrain" in file else [file, "t5x/configs/runs/pretrain.gin"]
    bindings = (
        []
        if "byt5" in file and "tiny" not in file
        else [f"SentencePieceVocabulary.sentencepiece_model_file={str(vocabulary_file)!r}"]
    )
    for _ in range(2):  # what is required, then what is used and never set
        try:
            launch.load(files, bindings)
        except UserError as error:
            bindings += [f"{name}={value}" for name, value in given.items() if f"--gin.{name}=" in str(error)]
    bindings += ["TASK_FEATURE_LENGTHS={'inputs': 8, 'targets': 8}"] if file.endswith("pretraining_common.gin") else []
    with mock.patch.object(jax, "device_count", return_value=8):
        arguments = resolve(*bindings, files=files, function=function)
    assert arguments["model"].config.param_count() > 0
    assert not [name for name in launch.idle() if not name.startswith(("seqio.", "utils.get_training"))]


def test_models_under_t5xs_names_are_ours(folder, vocabulary_file):
    vocabulary = str(vocabulary_file)
    run = ["MODEL_DIR='x'", "MIXTURE_OR_TASK_NAME='a'", "TASK_FEATURE_LENGTHS={}", "TRAIN_STEPS=1", "DROPOUT_RATE=0.0"]

    def config(file, run_file, *bindings):
        launch.load([file, run_file], [*run, *bindings])
        return launch.arguments(loop.train, supplied=["config_text"])["model"].config

    theirs = {"t5_1_0": "t5", "t5_1_1": "t5", "mt5": "t5", "byt5": "t5"}
    for path in sorted((gin_files.gin_folder() / "models").glob("*.gin")):
        family, _, size = path.stem.rpartition("_")
        if family not in theirs or size == "tiny":
            continue
        size = size.upper() if size in ("3b", "11b") else size
        given = [] if family == "byt5" else [f"SentencePieceVocabulary.sentencepiece_model_file={vocabulary!r}"]
        name = f"t5x/examples/{theirs[family]}/{family}/{size}.gin"
        with_t5x = config(name, "t5x/configs/runs/pretrain.gin", *given, "T5Config.vocab_size=250112")
        given = [] if family == "byt5" else [f"VOCABULARY_FILE={vocabulary!r}"]
        ours = config(f"models/{path.name}", "runs/pretrain.gin", *given, "T5Config.vocab_size=250112")
        assert with_t5x == ours, name


# ---- first steps -----------------------------------------------------------------------------------------------------


def test_first_steps_then_fine_tuning_then_a_resume(folder):
    assert run(resolve("MODEL_DIR='first'")) == 2
    config = json.loads((folder / "first/checkpoints/2/model_config.json").read_text())
    assert (config["emb_dim"], config["vocab_size"]) == (16, 768)
    write("b.gin", RUN.replace("pretrain.gin", "finetune.gin"))
    given = ["INITIAL_CHECKPOINT_PATH='first'", "MODEL_DIR='second'", "train_script.train.eval_period=1"]
    assert run(resolve(*given, "TRAIN_STEPS=3", files=["b.gin"]), evaluate=True) == 3
    lines = [json.loads(line) for line in (folder / "second/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "eval"] == [3]
    # The run's own configuration goes on with it.
    assert run(resolve("TRAIN_STEPS=4", files=["second/config.gin"])) == 4


@pytest.mark.parametrize(
    ("network", "checkpoint"), [("t5", "t511_d64/ckpt_orbax"), ("scalable_t5", "scan_d64/ckpt_legacy")]
)
def test_first_steps_from_a_checkpoint_of_t5x(network, checkpoint, folder, capfd, monkeypatch):
    """The files of t5x's model and run, and its own checkpoint, through the command."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    sizes = {"vocab_size": 1024, "emb_dim": 64, "num_heads": 4, "head_dim": 16, "mlp_dim": 128}
    sizes |= {"num_encoder_layers": 2, "num_decoder_layers": 2, "dtype": "'float32'"}
    argv = ["train", f"--gin_file=t5x/examples/{network}/t5_1_1/base.gin", "--gin_file=t5x/configs/runs/finetune.gin"]
    argv += [f"--gin.T5Config.{name}={value}" for name, value in sizes.items()]
    argv += ["--gin.SentencePieceVocabulary.sentencepiece_model_file='small.model'", "--gin.MIXTURE_OR_TASK_NAME='a'"]
    argv += ["--gin.TASK_FEATURE_LENGTHS={'inputs': 24, 'targets': 12}", "--gin.TRAIN_STEPS=202", "--gin.BATCH_SIZE=8"]
    argv += [
        f"--gin.INITIAL_CHECKPOINT_PATH={ROOT}/tests/reference/{checkpoint}/checkpoint_200",
        "--gin.MODEL_DIR='run'",
    ]
    with mock.patch.object(loop, "open_dataset", lambda config, _: TinyDataset(config)):
        assert cli.main([*argv, "--gin.MODEL_DIR='run'", "--gin.train.eval_period=0"]) == 0, capfd.readouterr().err
    assert "step 200 of 202" in capfd.readouterr().err
    config = json.loads((folder / "run/checkpoints/202/model_config.json").read_text())
    assert config["relative_bias_per_layer"] == (network == "scalable_t5")


OPTAX = """
from __gin__ import dynamic_registration
from t5x import optimizers
import optax
include 'run.gin'
OPTIMIZER = @optimizers.chain()
optimizers.chain.transformations = [@optax.clip(), @optax.adamw()]
optax.clip.max_delta = 1.0
optax.adamw.learning_rate = @optax.warmup_cosine_decay_schedule()
optax.warmup_cosine_decay_schedule:
  init_value = 0.0
  peak_value = 0.01
  warmup_steps = 1
  decay_steps = 10
"""


@pytest.mark.parametrize("optimizer", ["optax", "momentum"])
def test_first_steps_with_another_optimizer(optimizer, folder):
    write("b.gin", OPTAX if optimizer == "optax" else "include 'run.gin'\n")
    momentum = [] if optimizer == "optax" else ["Adafactor.beta1=0.9", "Adafactor.global_norm_clip_threshold=1.0"]
    assert run(resolve(*momentum, files=["b.gin"])) == 2
    assert run(resolve(*momentum, "TRAIN_STEPS=3", files=["b.gin"])) == 3  # the state is restored


@pytest.mark.slow
def test_first_steps_of_scalable_t5_over_two_devices(folder):
    write("shared/lib/model.gin", SCALABLE)
    write("b.gin", RUN + "from t5x import partitioning\npartitioning.PjitPartitioner.num_partitions = 2\n")
    program = "import sys; sys.path[:0] = ['tests']; import test_t5x_gin_files as t; t.one_run('b.gin')"
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "NPROC": "16",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
        "JAX_PLATFORMS": "cpu",
    }
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    start = json.loads((folder / "run/metrics.jsonl").read_text().splitlines()[0])
    assert start["mesh"] == {"data": 1, "fsdp": 1, "tensor": 2}


def one_run(file):
    assert run(resolve(files=[file])) == 2


# ---- what is refused, and what is accepted ---------------------------------------------------------------------------

REFUSED = [
    ("utils.DatasetConfig.trim_output_features = False", "features are always trimmed"),
    ("utils.SaveCheckpointConfig.checkpoint_steps = [5, 10]", "use SaveCheckpointConfig.period"),
    ("utils.RestoreCheckpointConfig.mode = 'all'", "give one checkpoint, with mode = 'specific'"),
    ("utils.RestoreCheckpointConfig.path = ['a', 'b']", "give one checkpoint"),
    ("utils.RestoreCheckpointConfig.fallback_to_scratch = True", "vikhr-t5 convert"),
    ("utils.RestoreCheckpointConfig.assignment_map = [('a', 'b')]", "vikhr-t5 convert"),
    ("train_script.train.run_eval_before_training = True", "vikhr-t5 eval"),
    ("trainer.Trainer.weight_metrics_computer = 1", "there are no metrics of weights"),
    ("partitioning.PjitPartitioner.num_partitions = 3", "3 does not divide the 1 device(s) here"),
    ("partitioning.PjitPartitioner.model_parallel_submesh = (1, 1, 8, 1)", "8 does not divide the 1 device(s) here"),
    ("partitioning.PjitPartitioner.logical_axis_rules = [('batch', 'data')]", "num_fsdp and num_tensor"),
    ("partitioning.standard_logical_axis_rules.activation_partitioning_dims = 2", "activations are split by rows"),
    ("adafactor.Adafactor.learning_rate = 0.1", "the rate is Trainer.learning_rate_fn"),
    ("adafactor.Adafactor.skip_nan_updates = True", "on_non_finite = 'skip'"),
    ("models.EncoderDecoderModel.decode_fn = 1", "decoding is greedy"),
    ("seqio.SentencePieceVocabulary.reverse_extra_ids = False", "sentinels count down"),
]
IMPORTS = """
import __main__ as train_script
import seqio
from t5x import adafactor
from t5x import models
from t5x import partitioning
from t5x import trainer
from t5x import utils
"""


@pytest.mark.parametrize(("line", "reason"), REFUSED)
def test_a_binding_that_would_change_the_result_is_refused_by_name(line, reason, folder):
    text = f"from __gin__ import dynamic_registration\n{IMPORTS}include 'run.gin'\n{line}\n"
    write("b.gin", text)
    message = refused(files=["b.gin"])
    name, _, value = line.partition(" = ")
    binding = name.partition(".")[2]
    assert message.startswith(f"b.gin:{text.count(chr(10))}: {binding} = {value} is not for vikhr-t5: ")
    assert reason in message


def test_a_refusal_names_the_flag_or_the_line_that_counts(folder):
    write("b.gin", "include 'run.gin'\n")
    flag = "utils.RestoreCheckpointConfig.mode='all'"
    assert refused(flag).startswith(f"--gin.{flag}: RestoreCheckpointConfig.mode = 'all' is not for vikhr-t5")
    write("shared/lib/model.gin", MODEL + "adafactor.Adafactor.learning_rate = 1.0\n")
    assert refused().startswith("shared/lib/model.gin:")
    # What the file binds after its include counts, although the included file was read later.
    outer = "from __gin__ import dynamic_registration\nfrom t5x import adafactor\ninclude 'run.gin'\n"
    write("c.gin", outer + "adafactor.Adafactor:\n  decay_rate = 0.7\n  learning_rate = 2.0\n")
    assert refused(files=["c.gin"]).startswith("c.gin:6: Adafactor.learning_rate = 2.0 is not for vikhr-t5")


def test_training_needs_lengths(folder):
    assert "set TASK_FEATURE_LENGTHS" in refused("TASK_FEATURE_LENGTHS=None")


@pytest.mark.parametrize(
    "line",
    [
        "train_script.train.use_hardware_rng = True",
        "train_script.train.use_orbax = False",
        "train_script.train.gc_period = 100",
        "train_script.train.actions = {'TRAIN_EVAL': [@trainer.TerminateOnNanAction()]}\n"
        "trainer.TerminateOnNanAction.task = 'private_reverse'",
        "train_script.train.train_eval_get_dataset_fn = @utils.get_training_eval_datasets\n"
        "utils.get_training_eval_datasets.deterministic = True",
        "utils.SaveCheckpointConfig.save_dataset = True",
        "utils.DatasetConfig.use_custom_packing_ops = False",
        "partitioning.PjitPartitioner.model_parallel_submesh = (1, 1, 1, 1)",
        "trainer.Trainer.num_microbatches = 0",
        "models.EncoderDecoderModel.predict_batch_with_aux.num_decodes = 4",
    ],
)
def test_what_happens_anyway_or_plays_no_part_is_accepted(line, folder):
    expected = resolve()
    write("b.gin", f"from __gin__ import dynamic_registration\n{IMPORTS}include 'run.gin'\n{line}\n")
    arguments = resolve(files=["b.gin"])
    for name in ("train_dataset_cfg", "train_eval_dataset_cfg", "checkpoint_cfg", "partitioner", "eval_period"):
        assert arguments[name] == expected[name]
    assert arguments["trainer"].num_microbatches is None


def test_several_beams_are_refused_where_something_is_decoded(folder):
    text = """
        from __gin__ import dynamic_registration
        from t5x import models
        include 'lib/model.gin'
        include 't5x/configs/runs/eval.gin'
        DROPOUT_RATE = 0.0
        MIXTURE_OR_TASK_NAME = 'a'
        CHECKPOINT_PATH = 'b'
        EVAL_OUTPUT_DIR = 'c'
        models.EncoderDecoderModel.predict_batch_with_aux.num_decodes = 4
        """
    write("e.gin", text)
    message = refused(files=["e.gin"], function=eval_script.evaluate)
    assert message.startswith("e.gin:10: predict_batch_with_aux.num_decodes = 4 is not for vikhr-t5")
    flag = message.rpartition("--gin.")[2]
    assert resolve(flag, files=["e.gin"], function=eval_script.evaluate)["output_dir"] == "c"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("from t5x import decoding", "b.gin:2: vikhr-t5 has no counterpart of t5x's module t5x.decoding"),
        ("from t5x import checkpoints", "best_metric"),
        ("from t5x import models\nMODEL = @models.DecoderOnlyModel()", "only encoder-decoders are trained"),
        ("import optax\nOPTIMIZER = @optax.lamb()", "optax.lamb is optax's and has no counterpart"),
        (
            "from t5x import trainer\ntrainer.EarlyStoppingAction.mode = 'min'",
            "t5x.trainer.EarlyStoppingAction is t5x's",
        ),
    ],
)
def test_what_has_no_counterpart_is_refused_where_it_is_named(lines, message, folder):
    write("b.gin", f"from __gin__ import dynamic_registration\n{lines}\n")
    found = refused(files=["b.gin"])
    assert message in found
    assert found.startswith("b.gin:")


def test_names_of_one_kind_do_not_silently_miss_the_other(folder):
    ours = "from __gin__ import dynamic_registration\nfrom vikhr_t5.train import checkpoints\ninclude 'run.gin'\n"
    write("b.gin", ours + "checkpoints.SaveCheckpointConfig.period = 5\n")
    message = refused(files=["b.gin"])
    assert message.startswith("checkpoints.SaveCheckpointConfig is bound and has no effect")
    assert "utils.SaveCheckpointConfig" in message
    theirs = RUN.replace("t5x/configs/runs/pretrain.gin", "runs/pretrain.gin")
    write("c.gin", theirs.replace("train_script.train:\n  eval_period = 10\n  eval_steps = 1\n", ""))
    assert "utils.DatasetConfig is bound and has no effect" in refused(files=["c.gin"])
    # The configuration of the run that is evaluated is no mistake.
    write("e.gin", "include 'runs/eval.gin'\ninclude 'run.gin'\nCHECKPOINT_PATH = 'run'\nEVAL_OUTPUT_DIR = 'out'\n")
    arguments = resolve(files=["e.gin"], function=eval_script.evaluate)
    assert launch.idle() == []
    assert arguments["restore_checkpoint_cfg"].path == "run"
    write("d.gin", theirs)
    assert "bind both loop.train and train_script.train" in refused(files=["d.gin"])


def test_a_mesh_of_t5x(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    rules = t5x_adapters.standard_logical_axis_rules
    mesh = t5x_adapters.PjitPartitioner(num_partitions=2, logical_axis_rules=rules())
    assert (mesh.num_data, mesh.num_fsdp, mesh.num_tensor) == (-1, 1, 2)
    mesh = t5x_adapters.PjitPartitioner(1, (1, 2, 1, 2), logical_axis_rules=rules(1, 2))
    assert (mesh.num_data, mesh.num_fsdp, mesh.num_tensor) == (1, 2, 4)
    with pytest.raises(UserError, match=r"add --gin\.PjitPartitioner\.num_partitions=1 or 2 or 4 or 8$"):
        t5x_adapters.PjitPartitioner(num_partitions=3)


# ---- the command line ------------------------------------------------------------------------------------------------


def test_flags_of_t5x(folder, capfd, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("TFDS_DATA_DIR", "")
    flags = ["train", "--gin_file=run.gin", "--gin_search_paths=shared", "--dry_run", "--alsologtostderr"]
    other = ["--gin_bindings=BATCH_SIZE = 24", "--gin_bindings", "MODEL_DIR='there'", "--tfds_data_dir=/some/where"]
    assert cli.main([*flags, *other, "--gin.train_script.train.eval_steps=5"]) == 0
    out = capfd.readouterr().out
    assert "24 rows" in out
    assert "there" in out
    assert os.environ["TFDS_DATA_DIR"] == "/some/where"
    assert cli.main([*flags, "--seqio_additional_cache_dirs=/a"]) == 2
    assert "token stores" in capfd.readouterr().err


def test_a_vocabulary_in_a_bucket_names_the_local_override(folder, monkeypatch):
    monkeypatch.setenv("VIKHR_T5_DOWNLOADS", str(folder / "downloads"))
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    write("shared/lib/model.gin", MODEL.replace("small.model", "gs://bucket/sentencepiece.model"))
    message = refused()
    assert message.startswith("gs://bucket/sentencepiece.model needs the packages fsspec and gcsfs")
    flag = message.rpartition("--gin.")[2].removesuffix("\"'/path/to/sentencepiece.model'\"") + "'small.model'"
    assert resolve(flag)["model"].vocabulary.size == 700


TASKS = """
import os
import seqio
import tensorflow as tf

vocabulary = seqio.SentencePieceVocabulary(os.environ["PRIVATE_VOCABULARY"], extra_ids=100)

def exact(targets, predictions):
    return {"exact": sum(t == p for t, p in zip(targets, predictions)) / len(targets)}

def mean_score(targets, scores):
    return {"mean_score": sum(scores) / len(scores)}

def dataset(split, shuffle_files, seed=None):
    words = ["привет", "мир", "окно", "таблица", "файл", "страница", "цвет"]
    pairs = [(f"{a} {b}", f"{b} {a}") for a in words for b in words]
    kept = pairs[:40] if split == "train" else pairs[40:]
    inputs, targets = zip(*kept)
    return tf.data.Dataset.from_tensor_slices({"inputs": list(inputs), "targets": list(targets)})

seqio.TaskRegistry.add(
    "private_reverse",
    source=seqio.FunctionDataSource(dataset, splits=["train", "validation"]),
    preprocessors=[seqio.preprocessors.tokenize, seqio.CacheDatasetPlaceholder(), seqio.preprocessors.append_eos],
    output_features={name: seqio.Feature(vocabulary) for name in ("inputs", "targets")},
    metric_fns=[exact, mean_score],
)
"""


@pytest.mark.slow
def test_from_private_tasks_to_metrics_and_predictions(folder):
    """train, eval and infer as commands, on tasks of a module that the gin files import, with seqio's metrics."""
    write("private_tasks.py", TASKS)
    head = RUN.partition("MODEL_DIR")[0].replace("train_script", "{0}_script").replace("pretrain", "{0}")
    for name in ("eval", "infer"):
        text = head.format(name) + "DROPOUT_RATE = 0.0\nMIXTURE_OR_TASK_NAME = 'private_reverse'\n"
        write(f"{name}.gin", text + "CHECKPOINT_PATH = 'run'\nutils.DatasetConfig.split = 'validation'\n")

    def commands(*argvs):
        """In one process, since importing TensorFlow takes most of the time."""
        argvs = [[*argv, "--gin_search_paths=shared"] for argv in argvs]
        program = f"import sys; from vikhr_t5 import cli; sys.exit(sum(cli.main(argv) for argv in {argvs!r}))"
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PRIVATE_VOCABULARY": str(folder / "small.model")}
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=folder, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr

    lengths = "--gin.TASK_FEATURE_LENGTHS={'inputs': 16, 'targets': 16}"
    commands(["train", "--gin_file=run.gin", "--gin.train.eval_period=0", "--gin.RANDOM_SEED=0"])
    commands(
        ["eval", "--gin_file=eval.gin", "--gin.EVAL_OUTPUT_DIR='evaluated'"],
        ["infer", "--gin_file=infer.gin", lengths, "--gin.INFER_OUTPUT_DIR='inferred'", "--gin.infer.mode='score'"],
    )
    (line,) = (folder / "evaluated/inference_eval/metrics.jsonl").read_text().splitlines()
    metrics = json.loads(line)
    assert (metrics["task"], metrics["step"], metrics["examples"], metrics["exact"]) == ("private_reverse", 2, 9, 0.0)
    predictions = (folder / "evaluated/inference_eval/private_reverse-000002.jsonl").read_text(encoding="utf-8")
    first = json.loads(predictions.splitlines()[0])
    assert len(predictions.splitlines()) == 9
    assert (first["inputs"]["inputs_pretokenized"], first["target"]) == ("страница страница", "страница страница")
    assert "страница" in predictions  # not \\u0441

    lines = (folder / "inferred/private_reverse-score.jsonl-00000-of-00001").read_text(encoding="utf-8").splitlines()
    scores = [json.loads(line)["score"] for line in lines]
    assert len(scores) == 9
    assert np.mean(scores) == pytest.approx(metrics["mean_score"], rel=1e-2)  # t5x infers with parameters in bfloat16
    assert math.isfinite(metrics["loss"])
