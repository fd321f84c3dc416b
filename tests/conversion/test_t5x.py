"""t5x's checkpoints: what t5x wrote is read to the bit, what we write is read again, and damage is told in one line.

What real t5x makes of our files is in test_real_t5x.py; a training step from a converted optimizer state is in
tests/train/test_optimizers.py.
"""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from flax.serialization import msgpack_restore, msgpack_serialize
from flax.traverse_util import flatten_dict
from quick import quick_jit
from random_params import enlarged_params
from reference_checkpoint import REFERENCE, flat, load_arrays, stack_layers, under, unstack_scanned

from conversion import names, t5x, t5x_files, t5x_writer
from conversion.stored import MemoryModel, StoredModel, arrays, load
from vikhr_t5.errors import UserError
from vikhr_t5.model import network
from vikhr_t5.model.config import T5Config
from vikhr_t5.train.optimizers import Adafactor

FORMATS = ("ckpt_legacy", "ckpt_orbax")
MODELS = ("t511_d64", "scan_d64")


def reference(name: str, stored: str = "ckpt_legacy") -> Path:
    return REFERENCE / name / stored / "checkpoint_200"


def logits(config: T5Config, params: dict, batch: dict[str, np.ndarray]) -> np.ndarray:
    inputs = [batch[n] for n in ("encoder_input_tokens", "decoder_input_tokens", "decoder_target_tokens")]
    segments = [batch.get(f"{side}_segment_ids") for side in ("encoder", "decoder")]
    with jax.default_matmul_precision("highest"):
        return quick_jit(network.Transformer(config).apply)({"params": params}, *inputs, *segments)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("stored", FORMATS)
def test_both_formats_of_both_models_give_the_logits_of_t5x(name: str, stored: str) -> None:
    model = t5x.open(reference(name, stored))
    batches, expected = load_arrays(name, "inputs.npz"), load_arrays(name, "outputs.npz")
    assert (model.step, model.updates, model.dtype) == (200, 200, "float32")
    for kind in ("plain", "packed"):
        batch = under(batches, f"{kind}/")
        found = logits(model.config, load(model), batch)
        real = batch["decoder_target_tokens"] > 0  # padding has another softmax there
        np.testing.assert_allclose(found[real], expected[f"{kind}/logits"][real], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("stored", FORMATS)
def test_what_t5x_wrote_comes_back_to_the_bit(name: str, stored: str, tmp_path: Path) -> None:
    """Parameters in our tree against an independent rearrangement; all, and the optimizer's state, written again."""
    written = raw(reference(name))
    model = t5x.open(reference(name, stored))
    rearranged = (stack_layers if name == "t511_d64" else unstack_scanned)(under(written, "target/"))
    assert_same(flat(load(model)), flat(rearranged))
    t5x.write(model, tmp_path / "checkpoint_200", scanned=name == "scan_d64")
    assert_same(raw(tmp_path / "checkpoint_200"), written)


def test_second_moments_are_rearranged_as_their_parameters() -> None:
    saved, model = under(raw(reference("scan_d64")), "state/param_states/"), t5x.open(reference("scan_d64"))
    out = model.read_moments("decoder/layers/self_attention/out/kernel", 1)  # [4, 2, 16, 64] in t5x: [J, D] here
    np.testing.assert_array_equal(out["v_col"], saved["decoder/decoder/self_attention/out/kernel/v_row"][1])
    np.testing.assert_array_equal(
        out["v_row"], saved["decoder/decoder/self_attention/out/kernel/v_col"][:, 1].reshape(64)
    )
    wi = model.read_moments("encoder/layers/mlp/wi_0/kernel", 0)  # 64 x 128: the larger is the column, as in t5x
    np.testing.assert_array_equal(wi["v_row"], saved["encoder/encoder/mlp/wi_0/kernel/v_row"][:, 0])
    bias = model.read_moments("encoder/layers/relpos_bias/rel_embedding", 1)
    np.testing.assert_array_equal(bias["v"], saved["encoder/encoder/relpos_bias/rel_embedding/v"][:, 1])


def raw(checkpoint: Path) -> dict[str, np.ndarray]:
    return {name: array.read() for name, array in t5x_files.arrays(checkpoint).items()}


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
        np.testing.assert_array_equal(found[name], array, err_msg=name)


SMALL = T5Config(
    vocab_size=96, emb_dim=24, num_heads=5, head_dim=7, mlp_dim=40, num_encoder_layers=3, num_decoder_layers=2,
    mlp_activations=("gelu", "linear"),
)  # fmt: skip
LARGE = dataclasses.replace(SMALL, vocab_size=384, emb_dim=160, num_heads=3, head_dim=64, mlp_dim=136)  # factored
VARIANTS = {
    "v1.1": (SMALL, False),
    "v1.1, factored": (LARGE, False),
    "v1.0": (dataclasses.replace(SMALL, mlp_activations=("relu",), logits_via_embedding=True), False),
    "umT5 without scan": (dataclasses.replace(LARGE, relative_bias_per_layer=True), False),
    "umT5": (dataclasses.replace(LARGE, relative_bias_per_layer=True), True),
    "umT5, tied": (dataclasses.replace(LARGE, relative_bias_per_layer=True, logits_via_embedding=True), True),
}


ADAFACTOR = Adafactor()


class TrainedModel(MemoryModel):
    """Random parameters with random moments, kept as `optimizer` keeps them."""

    def __init__(self, config: T5Config, optimizer: Adafactor = ADAFACTOR, stored: str = "float32"):
        params = enlarged_params(config, 0)
        state = jax.eval_shape(optimizer.init, params)
        super().__init__(jax.tree.map(lambda p: p.astype(stored), params), config, step=1234)
        rng = np.random.default_rng(1)
        self.moments = {
            name: rng.random(leaf.shape).astype(np.float32)
            for name, leaf in flatten_dict(state.moments, sep="/").items()
        }
        self.updates = 1234  # type: ignore[assignment]

    def read_moments(self, name: str, layer: int | None = None) -> dict[str, np.ndarray]:
        found = {slot: value for slot, value in self.moments.items() if slot.rsplit("/", 1)[0] == name}
        return {slot.rsplit("/", 1)[1]: value if layer is None else value[layer] for slot, value in found.items()}


def assert_same_model(found: StoredModel, expected: StoredModel) -> None:
    assert (found.config, found.step, found.updates) == (expected.config, expected.step, expected.updates)
    for name, layer in arrays(expected.config):
        ours, theirs = expected.read(name, layer), found.read(name, layer)
        assert theirs.dtype == ours.dtype
        np.testing.assert_array_equal(theirs, ours, err_msg=name)
        if expected.updates is not None:
            assert_same(found.read_moments(name, layer), expected.read_moments(name, layer))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_a_round_trip_changes_no_bit(variant: str, stored: str, tmp_path: Path) -> None:
    config, scanned = VARIANTS[variant]
    model, done = TrainedModel(config, stored=stored), []
    first, second = tmp_path / "a" / "checkpoint_1234", tmp_path / "b" / "checkpoint_1234"
    t5x.write(model, first, dtype=stored, scanned=scanned, advance=done.append)
    assert_same_model(t5x.open(tmp_path / "a"), model)
    assert sum(done) == sum(array.nbytes for array in raw(first).values())
    t5x.write(t5x.open(first), second, dtype=stored, scanned=scanned)
    assert_same(raw(second), raw(first))


def test_momentum_and_unfactored_moments_come_back(tmp_path: Path) -> None:
    """umT5's own optimizer."""
    model = TrainedModel(VARIANTS["umT5"][0], Adafactor(factored=False, beta1=0.9))
    t5x.write(model, tmp_path / "checkpoint_1234", scanned=True)
    assert raw(tmp_path / "checkpoint_1234")["state/param_states/encoder/encoder/mlp/wo/kernel/m"].shape == (
        136,
        3,
        160,
    )
    assert_same_model(t5x.open(tmp_path), model)


def test_scanned_kernels_too_small_for_us_to_factor_are_factored_for_t5x(tmp_path: Path) -> None:
    """t5x factors those by the names of their axes: the mean of our moments is the moment of t5x's means."""
    model = TrainedModel(dataclasses.replace(SMALL, relative_bias_per_layer=True))
    t5x.write(model, tmp_path / "checkpoint_1234", scanned=True)
    v = model.moments["encoder/layers/attention/out/kernel/v"]  # [L, J, D]
    saved = under(raw(tmp_path / "checkpoint_1234"), "state/param_states/encoder/encoder/attention/out/kernel/")
    assert saved["v"].shape == (1,)
    np.testing.assert_allclose(saved["v_row"], v.mean(axis=1), rtol=1e-6)
    np.testing.assert_allclose(saved["v_col"], v.mean(axis=2).reshape(3, 5, 7).transpose(1, 0, 2), rtol=1e-6)


def test_large_stacks_are_written_and_read_by_the_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(t5x_writer, "_WHOLE_BYTES", 1000)
    monkeypatch.setattr(t5x_writer, "_CHUNK_BYTES", 30000)
    model = TrainedModel(VARIANTS["umT5"][0])
    t5x.write(model, tmp_path / "checkpoint_1234", scanned=True)
    stored = t5x_files.arrays(tmp_path / "checkpoint_1234")["target/encoder/encoder/mlp/wi_0/kernel"]
    assert (stored.shape, stored.chunks) == ((160, 3, 136), (55, 1, 136))
    assert_same_model(t5x.open(tmp_path), model)


def test_a_stack_in_one_part_is_read_once_for_all_its_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[str] = []
    read = t5x_files.StoredArray.read
    monkeypatch.setattr(t5x_files.StoredArray, "read", lambda a, *index: (reads.append(a.name), read(a, *index))[1])
    model = t5x.open(reference("scan_d64"))
    for layer in range(2):
        model.read("encoder/layers/mlp/wo/kernel", layer)
    assert reads.count("target/encoder/encoder/mlp/wo/kernel") == 1


def test_without_moments_t5x_finds_zeros_of_the_right_shapes_and_we_none(tmp_path: Path) -> None:
    model = TrainedModel(LARGE)
    t5x.write(model, tmp_path / "a", scanned=False)
    bare = MemoryModel(enlarged_params(LARGE, 0), LARGE, step=7)
    t5x.write(bare, tmp_path / "b")
    with_state, zeros = raw(tmp_path / "a"), raw(tmp_path / "b")
    assert {n: a.shape for n, a in zeros.items()} == {n: a.shape for n, a in with_state.items()}
    assert not any(array.any() for name, array in zeros.items() if name.startswith("state/param_states"))
    assert zeros["state/step"] == 7
    assert (t5x.open(tmp_path / "b").step, t5x.open(tmp_path / "b").updates) == (7, None)  # zeros are no state


def test_a_failing_disk_is_the_systems_error_and_leaves_no_index(tmp_path: Path) -> None:
    (tmp_path / "target.encoder.layers_0.mlp.wo.kernel").write_text("a file where a folder should be")
    with pytest.raises(NotADirectoryError):
        t5x.write(TrainedModel(SMALL), tmp_path)
    assert not (tmp_path / "checkpoint").exists()


def test_updates_other_than_the_step_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = TrainedModel(SMALL)
    model.updates = 34  # type: ignore[assignment]
    t5x.write(model, tmp_path / "checkpoint_1234")
    assert "adafactor.Adafactor.step_offset = 1200" in capsys.readouterr().err


def test_a_shared_bias_has_no_scanned_form(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"relative_bias_per_layer=False.*write it without scan"):
        t5x.write(TrainedModel(SMALL), tmp_path / "checkpoint_1234", scanned=True)
    assert not list(tmp_path.iterdir())


# --- configuration and choice of the checkpoint


def test_the_configuration_is_believed_in_what_shapes_cannot_say() -> None:
    found = t5x.open(reference("t511_d64")).config
    given = dataclasses.replace(found, vocab_size=None, mlp_activations=("silu", "linear"), dropout_rate=0.3)
    assert t5x.open(reference("t511_d64"), given).config == dataclasses.replace(given, vocab_size=1024)


@pytest.mark.parametrize(
    "fields", [{"emb_dim": 512}, {"mlp_activations": ("relu",)}, {"logits_via_embedding": True}, {"vocab_size": 1152}]
)
def test_another_configuration_is_refused_by_field(fields: dict) -> None:
    given = dataclasses.replace(t5x.open(reference("t511_d64")).config, **fields)
    with pytest.raises(UserError, match=rf"holds another model than T5Config says: {next(iter(fields))} .* instead of"):
        t5x.open(reference("t511_d64"), given)


def test_a_model_dir_means_its_newest_checkpoint(tmp_path: Path) -> None:
    for step in (9, 100):
        t5x.write(MemoryModel(enlarged_params(SMALL, 0), SMALL, step=step), t5x.folder_for(tmp_path, step))
    (tmp_path / "checkpoint_200.tmp-17").mkdir()
    assert t5x.open(tmp_path).step == 100
    assert t5x.is_checkpoint(tmp_path)
    assert t5x.is_checkpoint(tmp_path / "checkpoint_9")
    assert t5x.folder_for(tmp_path / "checkpoint_9", 9) == tmp_path / "checkpoint_9"
    assert not t5x.is_checkpoint(tmp_path / "checkpoint_200.tmp-17")


def test_an_index_that_was_written_in_a_bucket_means_the_folders_beside_it(legacy: Path) -> None:
    """As in the public checkpoints: another driver, and the path where TensorStore had it before 0.1.14."""

    def to_bucket(root: dict) -> None:
        leaves = flatten_dict(root["optimizer"], is_leaf=lambda _, node: "driver" in node).values()
        for leaf in (leaf for leaf in leaves if isinstance(leaf, dict)):
            leaf["path"] = leaf["kvstore"]["path"].rstrip("/")
            leaf["kvstore"] = {"driver": "gcs", "bucket": "t5x-dummy-bucket"}
            description = legacy / leaf["path"] / ".zarray"
            description.write_text(description.read_text().replace('"dimension_separator":".",', ""))

    edit_index(legacy, to_bucket)
    assert_same(raw(legacy), raw(reference("t511_d64")))


@pytest.mark.parametrize(
    ("path", "told"), [("nowhere", "no such folder"), (".", "no t5x checkpoint"), ("gs://t5/x", "not on this machine")]
)
def test_what_is_no_checkpoint_is_told(path: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=told):
        t5x.open(path)


# --- damage: each change below is told in one line that names the checkpoint

KERNEL = "target.encoder.layers_1.mlp.wo.kernel"


@pytest.fixture
def legacy(tmp_path: Path) -> Path:
    shutil.copytree(reference("t511_d64"), tmp_path / "checkpoint_200")
    return tmp_path / "checkpoint_200"


def edit_index(checkpoint: Path, change: Callable[[dict], object]) -> None:
    root = msgpack_restore((checkpoint / "checkpoint").read_bytes())
    change(root)
    (checkpoint / "checkpoint").write_bytes(msgpack_serialize(root))


def edit_zarr(checkpoint: Path, **fields: object) -> None:
    file = checkpoint / KERNEL / ".zarray"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def cut(file: Path, size: int) -> None:
    file.write_bytes(file.read_bytes()[:size])


def flip(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 16
    file.write_bytes(content)


def index_of(root: dict, *path: str) -> dict:
    node = root["optimizer"]
    for key in path:
        node = node[key]
    return node


WO = ("target", "encoder", "layers_1", "mlp", "wo")
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a truncated index": (lambda c: cut(c / "checkpoint", -100), "`checkpoint` is not whole msgpack"),
    "an index with more behind it": (
        lambda c: (c / "checkpoint").write_bytes((c / "checkpoint").read_bytes() + b"\0\0"),
        "`checkpoint` is not whole msgpack",
    ),
    "an empty index": (lambda c: cut(c / "checkpoint", 0), "`checkpoint` is not whole msgpack"),
    "a flipped bit in the index": (lambda c: flip(c / "checkpoint", 3), "version|not whole msgpack"),
    "another format version": (lambda c: edit_index(c, lambda r: r.update(version=2)), "version 2 of t5x's format"),
    "a TensorFlow checkpoint": (
        lambda c: (c / "checkpoint").write_bytes(b'model_checkpoint_path: "model.ckpt-1"'),
        "convert_tf_checkpoint.py",
    ),
    "a missing array folder": (lambda c: shutil.rmtree(c / KERNEL), "layers_1/mlp/wo/kernel is missing"),
    "a missing optimizer folder": (
        lambda c: shutil.rmtree(c / "state.param_states.decoder.logits_dense.kernel.v"),
        "state/param_states/decoder/logits_dense/kernel/v is missing",
    ),
    "a missing part": (lambda c: (c / KERNEL / "0.0").unlink(), "wo/kernel has 0 of its 1 parts"),
    "a renamed part": (lambda c: (c / KERNEL / "0.0").rename(c / KERNEL / "0.1"), "part 0.0 is missing"),
    "a part cut by its last bytes": (lambda c: cut(c / KERNEL / "0.0", -4), "0.0 does not hold the 32768 bytes"),
    "a part cut in half": (lambda c: cut(c / KERNEL / "0.0", 9000), "0.0 does not hold the 32768 bytes"),
    "an empty part": (lambda c: cut(c / KERNEL / "0.0", 0), "0.0 does not hold the 32768 bytes"),
    "a flipped bit in a part": (lambda c: flip(c / KERNEL / "0.0", 9000), "wo/kernel cannot be read"),
    "a flipped bit in a description": (lambda c: flip(c / KERNEL / ".zarray", 3), "in a way that t5x does not write"),
    "absurd sizes": (
        lambda c: (edit_zarr(c, shape=[10**9, 10**9], chunks=[10**9, 10**9]),
                   edit_index(c, lambda r: index_of(r, *WO)["kernel"]["metadata"].update(shape=[10**9, 10**9]))),
        "does not hold the 4000000000000000000 bytes",
    ),
    "absurdly many parts": (
        lambda c: (edit_zarr(c, shape=[10**9, 10**9], chunks=[1, 1]),
                   edit_index(c, lambda r: index_of(r, *WO)["kernel"]["metadata"].update(shape=[10**9, 10**9]))),
        "has 1 of its 1000000000000000000 parts",
    ),
    "another shape than the index says": (lambda c: edit_zarr(c, shape=[64, 64]), r"is \[64, 64\], and \[128, 64\] by"),
    "a negative size": (lambda c: edit_zarr(c, shape=[-128, 64]), "in a way that t5x does not write"),
    "a type that is no number": (lambda c: edit_zarr(c, dtype="|O"), "in a way that t5x does not write"),
    "a path that leaves the folder": (
        lambda c: edit_index(c, lambda r: index_of(r, *WO)["kernel"]["kvstore"].update(path="../../..")),
        "in a way that t5x does not write",
    ),
    "a shape that is of another model": (
        lambda c: edit_index(c, lambda r: index_of(r, *WO).update(kernel=np.zeros((4, 64), np.float32))),
        r"1 of another shape: encoder/layers_1/mlp/wo/kernel \[4, 64\] instead of \[128, 64\]",
    ),
    "a missing parameter": (
        lambda c: edit_index(c, lambda r: index_of(r, *WO[:-2]).pop("mlp")),
        "3 missing: encoder/layers_1/mlp/wi_0/kernel",
    ),
    "a parameter of the root that is missing": (
        lambda c: edit_index(c, lambda r: index_of(r, "target").pop("token_embedder")),
        "token_embedder/embedding is absent",
    ),
    "an unknown parameter": (
        lambda c: edit_index(c, lambda r: index_of(r, *WO).update(bias=np.zeros((64,), np.float32))),
        r"1 unknown: encoder/layers_1/mlp/wo/bias \[64\]",
    ),
    "something that is no array": (
        lambda c: edit_index(c, lambda r: index_of(r, *WO).update(kernel="here")), "kernel is a str, not an array"
    ),
    "parameters of whole numbers": (
        lambda c: edit_index(c, lambda r: index_of(r, *WO).update(kernel=np.zeros((128, 64), np.int32))),
        "wo/kernel is int32; only float32 and bfloat16",
    ),
    "an unknown tree": (
        lambda c: edit_index(c, lambda r: r["optimizer"].update(flax_mutables={"x": np.zeros(1, np.float32)})),
        "neither parameters nor optimizer state: flax_mutables/x",
    ),
    "half an optimizer state": (
        lambda c: edit_index(c, lambda r: index_of(r, "state", "param_states", "encoder").pop("encoder_norm")),
        "4 missing: state/param_states/encoder/encoder_norm/scale/m",
    ),
    "an unknown array of the optimizer": (
        lambda c: edit_index(c, lambda r: index_of(r, "state", "param_states", "encoder").update(x=np.zeros(9))),
        r"1 unknown: state/param_states/encoder/x \[9\]",
    ),
    "an optimizer state of another shape": (
        lambda c: edit_index(
            c, lambda r: index_of(r, "state", "param_states", *WO[1:], "kernel").update(v=np.zeros(9, np.float32))
        ),
        "1 of another shape: state/param_states/encoder/layers_1/mlp/wo/kernel/v",
    ),
    "a step that is no count": (
        lambda c: edit_index(c, lambda r: index_of(r, "state").update(step=np.float32(2.5))), "state/step is no count"
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_told_in_one_line(what: str, legacy: Path) -> None:
    harm, told = DAMAGE[what]
    harm(legacy)
    with pytest.raises(UserError, match=told) as error:
        load(t5x.open(legacy))
    assert_one_line(str(error.value), legacy)


def assert_one_line(message: str, checkpoint: Path) -> None:
    assert "\n" not in message
    assert str(checkpoint) in message


ORBAX_DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a truncated description": (lambda s: cut(s / "_METADATA", 5000), "state/_METADATA is not Orbax's"),
    "no description": (lambda s: (s / "_METADATA").unlink(), "state/_METADATA is missing"),
    "a flipped bit in the manifest": (lambda s: flip(s / "manifest.ocdbt", 60), "cannot be opened"),
    "a truncated manifest": (lambda s: cut(s / "manifest.ocdbt", 60), "cannot be opened"),
    "data that are cut": (
        lambda s: [cut(f, f.stat().st_size // 2) for f in (s / "ocdbt.process_0" / "d").iterdir()],
        "cannot be",
    ),
    "data that are missing": (lambda s: shutil.rmtree(s / "ocdbt.process_0"), "cannot be opened|cannot be read"),
}


@pytest.mark.parametrize("what", ORBAX_DAMAGE)
def test_damage_of_orbax_files_is_told_in_one_line(what: str, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint_200"
    shutil.copytree(reference("t511_d64", "ckpt_orbax"), folder)
    harm, told = ORBAX_DAMAGE[what]
    harm(folder / "state")
    with pytest.raises(UserError, match=told) as error:
        load(t5x.open(folder))
    assert_one_line(str(error.value), folder)


# --- optimizers


def test_parameters_alone_are_a_model(legacy: Path) -> None:
    edit_index(legacy, lambda root: root["optimizer"].pop("state"))
    model = t5x.open(legacy)
    assert (model.step, model.updates) == (200, None)
    assert_same(flat(load(model)), flat(load(t5x.open(reference("t511_d64")))))


def test_another_optimizers_state_is_left_out_and_told(legacy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adam = {"0": {"count": np.int32(200), "mu": {"x": np.zeros(3, np.float32)}, "nu": {"x": np.zeros(3, np.float32)}}}
    edit_index(legacy, lambda root: root["optimizer"]["state"].update(param_states=adam))
    model = t5x.open(legacy)
    assert (model.step, model.updates) == (200, None)
    (line,) = capsys.readouterr().err.splitlines()
    assert "not Adafactor's and is left out (state/param_states/0/count" in line


def test_the_table_gives_t5x_scanned_paths_and_axes() -> None:
    config = t5x.open(reference("scan_d64")).config
    sizes = {"D": 64, "V": 1024, "H": 4, "K": 16, "F": 128, "L": 2, "B": 32}
    found = {
        row.t5x_scanned: tuple(sizes[axis] for axis in row.t5x_axes(scanned=True, split_heads=True))
        for row in names.table(config)
    }
    assert found == {name: array.shape for name, array in under(raw(reference("scan_d64")), "target/").items()}
