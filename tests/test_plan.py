"""`vikhr-t5 plan`: its parts against the compiler, real arrays and closed forms; its answers; its refusals."""

import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from tiny_run import dataset_config, tiny_model

from vikhr_t5 import cli, launch
from vikhr_t5.data.rows import empty_batch
from vikhr_t5.devices import KINDS, device_kind, parse_devices
from vikhr_t5.errors import UserError
from vikhr_t5.plan import REMAT_POLICIES, Choice, Fit, Plan, Planner, Settings, settings_of
from vikhr_t5.plan_compile import Compiled
from vikhr_t5.plan_flops import matmul_flops
from vikhr_t5.plan_memory import Memory, activations, state_bytes, with_config
from vikhr_t5.plan_report import GIB, Command, Report, Usable, usable
from vikhr_t5.plan_time import schedule, utilisation
from vikhr_t5.train import loop, optimizers
from vikhr_t5.train.adamw import AdamW
from vikhr_t5.train.partitioning import Partitioner
from vikhr_t5.train.step import Trainer

ROOT = Path(__file__).resolve().parents[1]
KIND = {kind.name: kind for kind in KINDS}
TINY = ["plan", "--gin_file=models/t5_1_1_tiny.gin", "--gin_file=runs/pretrain.gin", "--gin.TRAIN_STEPS=1000"]
TINY += ["--gin.TASK_FEATURE_LENGTHS={'inputs': 64, 'targets': 32}", "--gin.BATCH_SIZE=8", "--vocab_size=1024"]


def arguments(model=None, batch_size=8, **mesh):
    return {
        "model": model or tiny_model(),
        "partitioner": Partitioner(**mesh),
        "trainer": Trainer(optimizers.create_learning_rate_scheduler("constant", 0.05)),
        "train_dataset_cfg": dataset_config(batch_size),
    }


def zero_params(model):
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), model.abstract_state().params)


@pytest.mark.parametrize(
    ("text", "name", "count"),
    [("4xV100-32GB", "V100-32GB", 4), ("h100-80gb", "H100-80GB", 1), ("v4-8", "v4", 4), ("v5litepod-8", "v5e", 8)],
)
def test_devices_by_name(text, name, count):
    assert parse_devices(text) == (KIND[name], count)


@pytest.mark.parametrize("text", ["4xV10032GB", "v4-7", "0xH100-80GB", "8xv4", "", "4x"])
def test_unknown_devices(text):
    with pytest.raises(UserError, match="no such devices"):
        parse_devices(text)


@pytest.mark.parametrize(
    ("shown", "name"),
    [("NVIDIA L4", "L4-24GB"), ("NVIDIA L40S", "L40S-48GB"), ("NVIDIA L40", None), ("NVIDIA A10", "A10-24GB"),
     ("NVIDIA A100-SXM4-40GB", "A100-40GB"), ("NVIDIA A100-SXM4-80GB", "A100-80GB"), ("NVIDIA A40", None),
     ("NVIDIA H100 80GB HBM3", "H100-80GB"), ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
     ("Tesla V100-SXM2-32GB", "V100-32GB"), ("Tesla V100-SXM2-16GB", "V100-16GB"),
     ("TPU v5 lite", "v5e"), ("TPU v5", "v5p"), ("TPU v6 lite", "v6e"), ("NVIDIA RTX A6000", None), ("cpu", None)],
)  # fmt: skip
def test_a_device_is_of_the_kind_whose_words_its_name_has(shown, name):
    assert device_kind(shown) == (KIND[name] if name else None)


def test_a_card_that_is_not_in_the_table_has_its_own_memory(monkeypatch):
    """Not this machine's, as a CPU has; one that does not say how much it has is refused."""
    stats = {"bytes_limit": 36 * GIB}
    card = SimpleNamespace(device_kind="NVIDIA RTX A6000", memory_stats=lambda: stats)
    monkeypatch.setattr(jax, "devices", lambda: [card])
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert usable(None).bytes == 35 * GIB
    assert "assumed" in utilisation(None, "bfloat16", 10**9, None)[1]
    stats.clear()
    with pytest.raises(UserError, match="NVIDIA RTX A6000 is not in the table"):
        usable(None)


def test_matmul_flops_of_loops_are_those_of_the_unrolled_program():
    """XLA counts the unrolled one; of a loop it counts the body once."""
    weights, x = jnp.ones((5, 16, 16)), jnp.ones((8, 16))

    def looped(x):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, weights)[0].sum()

    def unrolled(x):
        for w in weights:
            x = x @ w
        return x.sum()

    for function in (looped, jax.checkpoint(looped)):
        counted = matmul_flops(jax.make_jaxpr(jax.grad(function))(x).jaxpr)
        assert counted == matmul_flops(jax.make_jaxpr(jax.grad(unrolled))(x).jaxpr)
    assert matmul_flops(jax.make_jaxpr(unrolled)(x).jaxpr) == 5 * 2 * 8 * 16 * 16


def test_executed_flops_are_the_models_and_what_remat_adds():
    """Without remat only attention's logits are computed twice, as in FlashAttention; layer_inputs: a forward pass."""
    model = with_config(tiny_model(), dropout_rate=0.0, num_decoder_layers=2)
    one = model.config.flops_per_step(1, 24, 12)
    flops = [activations(with_config(model, remat_policy=name), 24, 12).flops / one for name in REMAT_POLICIES]
    assert 1 <= flops[0] < 1.15
    assert flops[0] < flops[1] <= flops[2] < flops[0] + 1 / 3


def test_the_kernels_flops_are_those_of_plain_attention():
    model = with_config(tiny_model(), dropout_rate=0.0, head_dim=16)
    plain, fused = (activations(with_config(model, attention=name), 200, 130).flops for name in ("plain", "fused"))
    assert fused == plain


def test_state_is_that_of_the_arrays():
    for optimizer in (optimizers.Adafactor(), AdamW(moment_dtype="bfloat16")):
        model = tiny_model(optimizer=optimizer)
        params = zero_params(model)
        held = state_bytes(model, Partitioner())
        assert held.parameters == sum(x.nbytes for x in jax.tree.leaves(params))
        assert held.optimizer == sum(x.nbytes for x in jax.tree.leaves(jax.jit(model.optimizer.init)(params)))


def test_what_is_kept_for_the_backward_pass_is_what_jax_keeps():
    """Of a real call on real arrays, its residuals; and remat keeps less of them."""
    model = with_config(tiny_model(), dropout_rate=0.0)
    params, quick, kept = zero_params(model), {"xla_backend_optimization_level": 0}, []
    for rows in (2, 4):
        batch = {name: jnp.ones(x.shape, x.dtype) for name, x in empty_batch(rows, 24, 12).items()}
        weights = jnp.ones(batch["decoder_target_tokens"].shape)
        backward = jax.jit(
            lambda p, b, w: jax.vjp(lambda p: model.loss_sums(p, b, w, 1)[0], p)[1], compiler_options=quick
        )
        kept.append(sum(x.nbytes for x in jax.tree.leaves(backward(params, batch, weights))))
    traced = [activations(with_config(model, remat_policy=name), 24, 12) for name in REMAT_POLICIES]
    assert traced[0].kept == pytest.approx((kept[1] - kept[0]) / 2, rel=0.01)
    assert traced[0].kept > traced[1].kept > traced[2].kept


@pytest.fixture(scope="module")
def planner():
    """It keeps what it has traced."""
    config = with_config(tiny_model(), emb_dim=64, mlp_dim=256, num_encoder_layers=4, num_decoder_layers=4).config
    return Planner(arguments(tiny_model(config), batch_size=64), KIND["A100-80GB"], 4, 1e9, None)


def test_settings_from_the_fastest_to_the_smallest(planner):
    """Room for all: as it is. Less and less: then fsdp, microbatches and remat, and at last nothing."""
    planner.usable, planner.compile_flags = 1e9, None
    roomy = planner.plan()
    assert roomy.best == roomy.given
    assert roomy.best.mesh == {"data": 4, "fsdp": 1, "tensor": 1}
    needs, plans = roomy.best.memory.total, []
    for share in (0.6, 0.3):
        planner.usable = needs * share
        plans.append(planner.plan())
        assert plans[-1].best is not None
        assert plans[-1].best.memory.total <= needs * share
        assert plans[-1].best != roomy.given
    assert plans[0].best.flops <= plans[1].best.flops
    planner.usable = 1e4
    nothing = planner.plan()
    assert nothing.best is None
    assert not any(choice.fits for choice in nothing.choices)

    of = {fsdp: planner.evaluate(dataclasses.replace(planner.given, num_fsdp=fsdp)).memory for fsdp in (1, 4)}
    assert of[4].gradients == pytest.approx(of[1].gradients / 4, rel=0.1)


def test_the_compiler_has_the_last_word(planner):
    """It asks for half as much again: the plan goes on to what fits by its figure, and says so if nothing does."""
    asked = []

    def compiler(factor):
        def compile_flags(flags):
            asked.append(list(flags))
            return Compiled("XLA", True, 0, 0, int(factor * needs), 0, False)

        return compile_flags

    planner.usable, planner.compile_flags = 1e9, None
    needs = planner.plan().best.memory.total
    planner.usable, planner.compile_flags = needs * 1.2, compiler(1.0)
    assert planner.plan().best.compiled.peak == needs
    assert asked == [[]]
    planner.compile_flags = compiler(1.5)
    nothing = planner.plan()
    assert nothing.best is None
    assert any("num_microbatches" in " ".join(flags) or "num_fsdp" in " ".join(flags) for flags in asked)
    assert not any(choice.fits for choice in nothing.choices)
    assert all(choice.fit.needs > planner.usable for choice in nothing.choices)


def test_the_shortfall_is_by_the_compiler(planner):
    """By the plan's own figures, 19 GiB, it fits."""
    peak = Compiled("XLA", True, 0, 0, int(20.9 * GIB), 0, False)
    held = Memory(5 * GIB, 10 * GIB, GIB, 3 * GIB, 0)
    fit = Fit(planner.given, {"data": 4, "fsdp": 1, "tensor": 1}, held, 1e12, peak)
    plan = Plan(None, "", None, [Choice(planner.given.optimizer, "float32", fit, False)])
    given = {"model": planner.model, "train_dataset_cfg": planner.config}
    room, command = Usable(20 * GIB, ""), Command((), (), ())
    text = Report(plan, given, planner.kind, 4, room, command, planner.given, 1, "", None).as_text()
    assert "smallest: 20.9 GiB, 0.9 too much" in text
    assert "8 such devices with fsdp would do" in text
    assert "   20.9  does not fit, says the compiler" in text


def test_given_settings_that_fit_by_the_compiler_are_kept(planner):
    """Whether by the plan's own figures nothing does, or what is better does and the compiler refuses it."""
    compiled = Compiled("XLA", True, 0, 0, 0, 0, False)
    usual = planner.given
    planner.usable = 1e4
    planner.compile_flags = lambda flags: dataclasses.replace(compiled, peak=int(2e4 if flags else 5e3))
    plan = planner.plan()
    assert not plan.choices[0].fits
    assert plan.best is plan.given
    planner.usable, planner.given = 1e9, dataclasses.replace(usual, remat_policy="layer_inputs")
    planner.compile_flags = lambda flags: dataclasses.replace(compiled, peak=int(2e9 if flags else 5e8))
    plan = planner.plan()
    assert plan.best is plan.given
    planner.given = usual


def test_a_mesh_that_does_not_use_the_devices_is_refused_and_reset(planner):
    fixed = Planner(arguments(planner.model, 64, num_data=1), planner.kind, 4, 1e9, None)
    plan = fixed.plan()
    assert plan.given is None
    assert "1 x 1 x 1 does not use 4 device(s)" in plan.refused
    assert plan.best.settings.flags(fixed.given) == ["--gin.partitioning.Partitioner.num_data=-1"]
    assert Planner(arguments(planner.model, 64, num_data=4), planner.kind, 4, 1e9, None).plan().given is not None


def test_time_and_cost_are_arithmetic():
    h100 = KIND["H100-80GB"]
    given = {"parameters": 10**6, "count": 2, "rows": 8, "positions": 800, "steps": 3600, "mfu": 0.5, "price": 2.0}
    s = schedule(h100, 100.0, "bfloat16", step_flops=1e14, executed_flops=2e14, **given)
    assert s.step_seconds == pytest.approx(2.0)  # 2e14 / (2 x 1e14 x 0.5)
    assert (s.hours, s.dollars) == (pytest.approx(2.0), pytest.approx(8.0))
    assert s.mfu == pytest.approx(0.25)
    assert s.positions_per_second == pytest.approx(400)


def run(capfd, *argv):
    status = cli.main([*TINY, *argv])
    out, err = capfd.readouterr()
    assert status == 0, err
    return out


def test_v100_is_planned_in_float32_and_the_command_is_that_plan(capfd):
    flags = ["--devices=2xV100-32GB", "--no-compile", "--gin.network.T5Config.dtype='bfloat16'", "--gin.BATCH_SIZE=64"]
    out = run(capfd, *flags)
    assert "V100-32GB has no bfloat16" in out
    assert "(and MODEL_DIR, MIXTURE_OR_TASK_NAME, VOCABULARY_FILE)" in out
    words = shlex.split(out.splitlines()[-1])
    assert words[:3] == ["XLA_PYTHON_CLIENT_MEM_FRACTION=0.95", "vikhr-t5", "train"]
    parsed = cli.parse([*words[2:], "--gin.MODEL_DIR='r'", "--gin.MIXTURE_OR_TASK_NAME='m'"])
    vocabulary = ROOT / "tests/reference/vocabulary/ru924.model"
    launch.load(parsed.gin_file, [*parsed.bindings, f"VOCABULARY_FILE='{vocabulary}'"])
    resolved = launch.arguments(loop.train, supplied=["config_text"])
    assert resolved["model"].config.dtype == "float32"
    assert f"remat {resolved['model'].config.remat_policy}, float32" in re.search("best .*", out)[0]


@pytest.mark.parametrize(
    "optimizer", [optimizers.Adafactor(), AdamW(), AdamW(moment_dtype="8bit")], ids=["adafactor", "adamw", "8bit"]
)
def test_flags_of_any_settings_are_flags_of_train(optimizer):
    wanted = Settings(2, 2, 4, "layer_inputs", "bfloat16", "bfloat16", optimizer)
    given = Settings(1, 1, 1, "everything", "float32", "float32", AdamW(rms_scaled=True), num_data=1)
    vocabulary = ROOT / "tests/reference/vocabulary/ru924.model"
    bindings = [flag.removeprefix("--gin.") for flag in wanted.flags(given)]
    launch.load(TINY[1:3][0].split("=")[1:] + TINY[2].split("=")[1:], [
        "MODEL_DIR='r'", "MIXTURE_OR_TASK_NAME='m'", "TRAIN_STEPS=1", f"VOCABULARY_FILE='{vocabulary}'",
        "TASK_FEATURE_LENGTHS={'inputs': 64, 'targets': 32}", *bindings])  # fmt: skip
    resolved = launch.arguments(loop.train, supplied=["config_text"])
    got = settings_of(resolved)
    assert dataclasses.replace(got, optimizer=None) == dataclasses.replace(wanted, optimizer=None)
    assert type(got.optimizer) is type(optimizer)
    assert getattr(got.optimizer, "moment_dtype", "") == getattr(optimizer, "moment_dtype", "")


@pytest.mark.slow
def test_compiled_for_four_devices_in_a_process_of_its_own(capfd, tmp_path):
    plan = json.loads(run(capfd, "--devices=4xT4-16GB", "--json", f"--chart={tmp_path / 'memory.svg'}"))
    best = plan["best"]
    assert plan["fits"]
    assert best["mesh"] == {"data": 4, "fsdp": 1, "tensor": 1}
    assert best["compiled"]["compiler"] == "XLA:CPU for 4 devices"
    assert not best["compiled"]["exact"]
    assert best["needs_bytes"] == max(best["compiled"]["peak"], best["memory_bytes"]["total"])
    # The compiler's arguments are the state and a quarter of the batch, to the byte. Row positions are in the batch and
    # not in the program: T5 has no use for them. The rest: the metrics' sums, the step and the key.
    batch = sum(x.nbytes for name, x in empty_batch(2, 64, 32).items() if "positions" not in name)
    state = 4 * plan["parameters"] + best["memory_bytes"]["optimizer"]
    assert 0 < best["compiled"]["arguments"] - state - batch < 1024
    assert plan["schedule"]["dollars"] > 0
    assert "parameters" in (tmp_path / "memory.svg").read_text()


def test_what_does_not_fit_is_an_answer(capfd):
    xxl = [f"--gin.network.T5Config.{name}" for name in ("emb_dim=8192", "mlp_dim=16384", "num_encoder_layers=48")]
    out = run(capfd, "--devices=1xT4-16GB", "--no-compile", *xxl)
    assert "nothing that was tried fits" in out
    assert re.search(r"smallest: [\d.]+ GiB, [\d.]+ too much", out)
    assert "would do" in out
    assert "Train it with" not in out


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--devices=4xV10032GB"], "nearest: 4xV100-32GB"),
        (["--devices=3xT4-16GB", "--no-compile"], "does not divide over any mesh of 3 devices"),
        (["--mfu=40"], "in (0, 1]"),
        (["--price_per_hour=-1"], "at least 0"),
        (["--chart=memory.pdf"], ".png or a .svg"),
        (["--vocab_size=3"], "at least 1024"),
    ],
)
def test_refusals(flags, says, capfd):
    assert cli.main([*TINY, *flags]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert says in err
    assert err.count("\n") == 1


def test_a_vocabulary_or_its_size_is_needed(capfd):
    assert cli.main([flag for flag in TINY if "vocab_size" not in flag]) == 2
    assert "--vocab_size 58368" in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(("model", "rows"), [("small", 8), ("base", 4)])
def test_what_a_process_takes_is_within_a_tenth_of_the_plan(model, rows, tmp_path):
    """A real run on this machine's CPU: the operating system's figure of its largest memory, after its first steps.

    A tiny model's would be Python's and XLA's, which differs by 30% from run to run."""
    text = (ROOT / "tasks/demo_data/ru.txt").read_text(encoding="utf-8")
    (tmp_path / "text.txt").write_text(text[:100_000], encoding="utf-8")
    flags = [f"--gin_file=models/t5_1_1_{model}.gin", "--gin_file=runs/pretrain.gin", "--gin.MODEL_DIR='run'"]
    flags += ["--gin.VOCABULARY_FILE='v.model'", "--gin.MIXTURE_OR_TASK_NAME='demo_span_corruption'"]
    flags += ["--gin.MIXTURE_OR_TASK_MODULE='tasks.demo'", "--gin.TASK_FEATURE_LENGTHS={'inputs': 512, 'targets': 114}"]
    flags += [f"--gin.BATCH_SIZE={rows}", "--gin.TRAIN_STEPS=2", "--gin.loop.train.stats_period=1"]
    flags += ["--gin.EVAL_STEPS=1", "--gin.loop.train.num_samples=0"]
    flags += ["--gin.network.T5Config.dtype='float32'", "--gin.network.T5Config.vocab_size=32128"]

    def run(*argv):
        command = [sys.executable, "-m", "vikhr_t5.cli", *argv]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run("vocab", "train", "--input", "text.txt", "--output", "v.model", "--size", "700")
    run("train", *flags)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    shown = next(line["memory_gib"] for line in lines if line["kind"] == "train" and line["step"] == 1) * 2**30
    plan = json.loads(run("plan", *flags, "--json"))
    assert plan["as_given"]["needs_bytes"] == pytest.approx(shown, rel=0.1)
