"""What a checkpoint holds, how a damaged one is found, what a full disk does; without running the loop."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import CONFIG, TinyVocabulary, tiny_model

from conversion.stored import load
from conversion.vikhr import Checkpoint
from vikhr_t5.errors import UserError
from vikhr_t5.model.network import T5Config
from vikhr_t5.train import checkpoint_files, checkpoints, optimizers
from vikhr_t5.train.checkpoint_files import defect, find_checkpoint
from vikhr_t5.train.checkpoints import Checkpoints, SaveCheckpointConfig
from vikhr_t5.train.state import TrainState

MODEL = tiny_model()
TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def state() -> TrainState:
    return jax.jit(MODEL.init_state)(jax.random.key(0))


def save(checkpoints: Checkpoints, state: TrainState, step: int, **fields):
    files = checkpoints_files(step)
    checkpoints.save(step, state._replace(step=jnp.int32(step)), files, **fields)
    checkpoints.wait()


def checkpoints_files(step: int) -> dict[str, bytes]:
    return {**checkpoints.described(MODEL, "X = 1\n"), "progress.json": json.dumps({"step": step}).encode()}


def like(model=MODEL, sharding=None) -> TrainState:
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), model.abstract_state())


def steps_in(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_restore_is_bit_equal_and_typed(tmp_path, state):
    save(Checkpoints(tmp_path, SaveCheckpointConfig()), state, 7)
    restored, progress = checkpoints.restore(tmp_path / "7", like())
    assert progress == {"step": 7}
    assert int(restored.step) == 7
    assert isinstance(restored.opt_state, optimizers.AdafactorState)
    assert jax.tree.all(jax.tree.map(np.array_equal, restored._replace(step=0), state._replace(step=0)))


def test_the_state_may_change_while_it_is_saved(tmp_path, state):
    """Saving is asynchronous and the step donates its buffers: what is stored must be the state that was given."""
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    saver = Checkpoints(tmp_path, SaveCheckpointConfig(keep=None))
    moving = jax.tree.map(lambda x: jnp.tile(x, (50,) + (1,) * max(x.ndim - 1, 0)), state)
    expected = {}
    for number in range(1, 6):
        expected[number] = jax.tree.map(np.array, moving.params)
        saver.save(number, moving, checkpoints_files(number))
        for _ in range(5):
            moving = step(moving)
    saver.wait()
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), moving)
    for number, params in expected.items():
        restored, _ = checkpoints.restore(tmp_path / str(number), shapes)
        assert jax.tree.all(jax.tree.map(np.array_equal, restored.params, params))


def test_a_conversion_needs_only_the_folder(tmp_path, state):
    save(Checkpoints(tmp_path / "run" / "checkpoints", SaveCheckpointConfig()), state, 3)
    shutil.copytree(tmp_path / "run" / "checkpoints" / "3", tmp_path / "copied" / "anything")
    for path in (tmp_path / "run", tmp_path / "run" / "checkpoints" / "3", tmp_path / "copied" / "anything"):
        saved = Checkpoint(path)
        assert saved.config == MODEL.config
        assert saved.config.vocab_size == 128
        assert saved.step == 3
        assert saved.vocabulary.fingerprint() == TinyVocabulary().fingerprint()
        assert saved.vocabulary.model_bytes == TinyVocabulary.model_bytes
        assert jax.tree.all(jax.tree.map(np.array_equal, load(saved), jax.device_get(state.params)))
    assert (tmp_path / "copied" / "anything" / "config.gin").read_text() == "X = 1\n"


def test_bfloat16_parameters(tmp_path, state):
    for dtype in ("float32", "bfloat16"):
        save(Checkpoints(tmp_path / dtype, SaveCheckpointConfig(dtype=dtype)), state, 1)
    params = load(Checkpoint(tmp_path / "bfloat16" / "1"))
    rounded = jax.tree.map(lambda p: np.asarray(p.astype(jnp.bfloat16).astype(jnp.float32)), state.params)
    assert jax.tree.all(jax.tree.map(np.array_equal, params, rounded))
    restored, _ = checkpoints.restore(tmp_path / "bfloat16" / "1", like())
    assert {p.dtype for p in jax.tree.leaves(restored.params)} == {np.dtype("float32")}


def test_keeps_the_newest_and_the_best(tmp_path, state):
    saver = Checkpoints(tmp_path, SaveCheckpointConfig(keep=2, best_metric="loss"))
    for step, loss in ((1, 3.0), (2, 1.5), (3, 2.0), (4, 1.9), (5, None)):
        save(saver, state, step, metrics=None if loss is None else {"loss": loss, "accuracy": 0.1})
    assert steps_in(tmp_path) == ["2", "4", "5"]
    save(Checkpoints(tmp_path, SaveCheckpointConfig(keep=2, best_metric="loss")), state, 6, metrics={"loss": 1.0})
    assert steps_in(tmp_path) == ["5", "6"]  # what was best is remembered by another process


@pytest.mark.parametrize("best_mode", ["min", "max"])
def test_another_best_metric_in_a_resumed_run(tmp_path, state, best_mode):
    """What was saved by the first one is worse than anything by the second."""
    save(Checkpoints(tmp_path, SaveCheckpointConfig(keep=1, best_metric="loss")), state, 1, metrics={"loss": 1.0})
    saver = Checkpoints(tmp_path, SaveCheckpointConfig(keep=1, best_metric="chrf", best_mode=best_mode))
    for step in (2, 3):
        save(saver, state, step, metrics={"chrf": 10.0 if (step == 2) == (best_mode == "max") else 5.0})
    assert steps_in(tmp_path) == ["2", "3"]


def test_an_unknown_best_metric_names_the_nearest(tmp_path, state):
    saver = Checkpoints(tmp_path, SaveCheckpointConfig(best_metric="los"))
    with pytest.raises(UserError, match=r"'los' is no metric \(nearest: loss"):
        save(saver, state, 1, metrics={"loss": 1.0, "accuracy": 0.5})


@pytest.mark.parametrize("damage", ["truncate", "remove", "manifest", "tree"])
def test_a_checkpoint_that_lost_something_is_passed_over(tmp_path, state, damage, capfd):
    saver = Checkpoints(tmp_path / "checkpoints", SaveCheckpointConfig())
    save(saver, state, 1)
    save(saver, state, 2)
    newest = tmp_path / "checkpoints" / "2"
    biggest = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    if damage == "truncate":
        os.truncate(biggest, biggest.stat().st_size // 2)
    elif damage == "remove":
        biggest.unlink()
    elif damage == "manifest":
        (newest / "manifest.json").unlink()
    else:
        shutil.rmtree(newest / "opt_state")
    assert defect(newest) is not None
    assert defect(tmp_path / "checkpoints" / "1") is None

    assert find_checkpoint(tmp_path).name == "1"  # for reading: said, nothing touched
    assert "not whole" in capfd.readouterr().err
    assert newest.exists()
    with pytest.raises(UserError, match="not whole"):
        find_checkpoint(newest)

    resumed = Checkpoints(tmp_path / "checkpoints", SaveCheckpointConfig())  # for training: set aside
    assert resumed.newest().name == "1"
    assert "2 is not whole" in capfd.readouterr().err
    save(resumed, state, 2)
    assert resumed.newest().name == "2"


def test_leftovers_of_an_interrupted_save_are_no_checkpoint(tmp_path, state):
    saver = Checkpoints(tmp_path, SaveCheckpointConfig())
    save(saver, state, 1)
    shutil.copytree(tmp_path / "1", tmp_path / "2.orbax-checkpoint-tmp")
    assert Checkpoints(tmp_path, SaveCheckpointConfig()).newest().name == "1"


def test_another_shape_names_the_parameter_and_both_shapes(tmp_path, state):
    save(Checkpoints(tmp_path, SaveCheckpointConfig()), state, 1)
    wider = tiny_model(T5Config(**{**CONFIG.__dict__, "mlp_dim": 48}))
    with pytest.raises(
        UserError, match=r"params/decoder/layers/mlp/wi_0/kernel is \[1, 16, 32\], this model's is \[1, 16, 48\]"
    ):
        checkpoints.restore(tmp_path / "1", like(wider))
    tied = tiny_model(T5Config(**{**CONFIG.__dict__, "logits_via_embedding": True}))
    with pytest.raises(UserError, match=r"params/decoder/logits_dense/kernel is \[16, 128\], this model's is absent"):
        checkpoints.restore(tmp_path / "1", like(tied))


def test_another_optimizer_is_refused_or_reset(tmp_path, state):
    save(Checkpoints(tmp_path, SaveCheckpointConfig()), state, 1)
    adamw = like(tiny_model(optimizer=optimizers.AdamW()))
    with pytest.raises(UserError, match=r"opt_state/.*reset_optimizer"):
        checkpoints.restore(tmp_path / "1", adamw)
    restored, _ = checkpoints.restore(tmp_path / "1", adamw, reset_optimizer=True)
    assert restored.opt_state is None
    shutil.rmtree(tmp_path / "1" / "opt_state")  # as a conversion leaves it
    assert checkpoints.restore(tmp_path / "1", adamw)[0].opt_state is None


def test_another_vocabulary_is_refused(tmp_path, state):
    save(Checkpoints(tmp_path, SaveCheckpointConfig()), state, 1)
    other = TinyVocabulary()
    other.fingerprint = lambda: "other"
    checkpoints.check_vocabulary(tmp_path / "1", MODEL.vocabulary)
    with pytest.raises(UserError, match="another vocabulary"):
        checkpoints.check_vocabulary(tmp_path / "1", other)


def test_a_run_folder_may_be_named_with_digits(tmp_path, state):
    run = tmp_path / "20260512"
    save(Checkpoints(run / "checkpoints", SaveCheckpointConfig()), state, 3)
    assert find_checkpoint(run) == run / "checkpoints" / "3"


@pytest.mark.parametrize("file", ["manifest.json", "progress.json"])
def test_a_checkpoint_that_cannot_be_read_is_not_set_aside(tmp_path, state, file, monkeypatch):
    """A stale mount or a missing permission says nothing about what is there."""
    save(Checkpoints(tmp_path, SaveCheckpointConfig()), state, 1)

    def unreadable(real):
        def call(path, *arguments, **options):
            if path == tmp_path / "1" / file:
                raise OSError(116, "Stale file handle")
            return real(path, *arguments, **options)

        return call

    for name in ("read_text", "stat"):
        monkeypatch.setattr(Path, name, unreadable(getattr(Path, name)))
    with pytest.raises(UserError, match=r"/1 cannot be read: Stale file handle$"):
        Checkpoints(tmp_path, SaveCheckpointConfig())
    monkeypatch.undo()
    assert steps_in(tmp_path) == ["1"]


def test_nothing_to_restore_says_so(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        find_checkpoint(tmp_path / "absent")
    with pytest.raises(UserError, match="holds no checkpoint"):
        find_checkpoint(tmp_path)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("mounting a tmpfs needs root")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize("foreseen", [True, False])
def test_a_full_disk_leaves_the_previous_checkpoint(small_disk, state, foreseen, monkeypatch, capfd):
    """Whether the lack of room is seen before or while writing: one line, and the next process goes on."""
    saver = Checkpoints(small_disk, SaveCheckpointConfig())
    save(saver, state, 1)
    room = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_bsize
    (small_disk / "filler").write_bytes(bytes(room - 50_000))
    if not foreseen:
        plenty = SimpleNamespace(free=10**9)
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: plenty)
    reason = "1 MiB are needed and 0 MiB are free" if foreseen else "No space left on device"
    with pytest.raises(UserError, match=rf"cannot save step 2 .*{reason}; the last good checkpoint is .*/1"):
        save(saver, state, 2)
    assert defect(small_disk / "1") is None
    assert not list(small_disk.glob("2*"))
    restored, _ = checkpoints.restore(small_disk / "1", like())
    assert np.array_equal(restored.params["token_embedder"]["embedding"], state.params["token_embedder"]["embedding"])
    assert capfd.readouterr().err == ""

    (small_disk / "filler").unlink()
    save(Checkpoints(small_disk, SaveCheckpointConfig()), state, 2)
    assert defect(small_disk / "2") is None


def test_a_write_error_leaves_the_previous_checkpoint(tmp_path, state, monkeypatch):
    """The same without root: the last file of a checkpoint cannot be written."""
    saver = Checkpoints(tmp_path, SaveCheckpointConfig())
    save(saver, state, 1)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_files, "write_text_atomic", full)
    with pytest.raises(UserError, match=r"cannot save step 2 .*No space left.* last good checkpoint is .*/1"):
        save(saver, state, 2)
    assert steps_in(tmp_path) == ["1"]


@pytest.mark.parametrize("bad", [{"period": 0}, {"keep": 0}, {"dtype": "float16"}, {"best_mode": "least"}])
def test_bad_configuration_is_refused(bad):
    with pytest.raises(UserError, match=next(iter(bad))):
        SaveCheckpointConfig(**bad)


RESTORED_ON_MESHES = """
import json, sys
from pathlib import Path
import jax, numpy as np
from tiny_run import tiny_model
from vikhr_t5.model.network import T5Config
from vikhr_t5.train import checkpoints
from vikhr_t5.train.checkpoints import Checkpoints, SaveCheckpointConfig
from vikhr_t5.train.partitioning import Partitioner

model = tiny_model(T5Config(emb_dim=16, num_heads=8, head_dim=8, mlp_dim=32, num_encoder_layers=2,
                            num_decoder_layers=1, mlp_activations=("gelu", "linear")))
shapes = model.abstract_state()
axes = model.state_axes()
first = Partitioner(2, 2, 2).shardings(axes, shapes)
state = jax.jit(model.init_state, out_shardings=first)(jax.random.key(0))
saver = Checkpoints(sys.argv[1], SaveCheckpointConfig())
saver.save(1, state, {**checkpoints.described(model, ""), "progress.json": json.dumps({"step": 1}).encode()})
saver.wait()
for mesh in ((8, 1, 1), (1, 8, 1), (1, 1, 8), (4, 1, 2), (2, 2, 2)):
    shardings = Partitioner(*mesh).shardings(axes, shapes)
    like = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
    restored, _ = checkpoints.restore(Path(sys.argv[1]) / "1", like)
    same = jax.tree.map(np.array_equal, (state.params, state.opt_state), (restored.params, restored.opt_state))
    placed = jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), restored, shardings)
    print(mesh, jax.tree.all(same), jax.tree.all(placed))
"""


@pytest.mark.slow
def test_a_checkpoint_of_one_mesh_of_eight_devices_is_exact_on_every_other(tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])}
    environment |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"}
    command = [sys.executable, "-c", RESTORED_ON_MESHES, str(tmp_path / "saved")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 5
    assert all(line.endswith("True True") for line in lines), lines
