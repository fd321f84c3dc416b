"""What we write, restored by real t5x: needs t5x on the path, and is skipped without (docs/experiments.md says how).

t5x's own Checkpointer restores each checkpoint; its network computes from what it restored; its Adafactor takes a step,
and t5x saves that, for us to read.
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from random_params import enlarged_params
from reference_checkpoint import flat

from conversion import t5x as ours
from conversion import t5x_files
from conversion.stored import MemoryModel, arrays, load
from vikhr_t5.model import network
from vikhr_t5.model.config import T5Config
from vikhr_t5.train.optimizers import Adafactor, AdafactorState

pytest.importorskip("t5x", reason="real t5x is not installed")
pytestmark = pytest.mark.slow

LARGE = T5Config(
    vocab_size=384, emb_dim=160, num_heads=3, head_dim=64, mlp_dim=256, num_encoder_layers=3, num_decoder_layers=2,
    mlp_activations=("gelu", "linear"), dropout_rate=0.0,
)  # fmt: skip
PER_LAYER = dataclasses.replace(LARGE, relative_bias_per_layer=True)
CASES = {
    "examples/t5, v1.1": (LARGE, False),
    "examples/t5, v1.0": (dataclasses.replace(LARGE, mlp_activations=("relu",), logits_via_embedding=True), False),
    "examples/t5, small and odd": (dataclasses.replace(LARGE, num_heads=5, head_dim=7, emb_dim=24, mlp_dim=40), False),
    "scalable_t5": (PER_LAYER, True),
    "scalable_t5, tied": (dataclasses.replace(PER_LAYER, logits_via_embedding=True, emb_dim=256, num_heads=2), True),
    "scalable_t5 without scan": (PER_LAYER, False),
}


class Trained(MemoryModel):
    """Random parameters, and moments as Adafactor could have kept them: the factors are means of one array."""

    def __init__(self, config: T5Config):
        params = enlarged_params(config, 0)
        super().__init__(params, config, step=1234)
        self.updates = 1234  # type: ignore[assignment]
        self.moments: dict[str, np.ndarray] = {}
        rng, optimizer = np.random.default_rng(1), Adafactor()
        for name, array in flat(params).items():
            stacked = "/layers/" in name
            v = rng.random(array.shape).astype(np.float32) ** 4 + 1e-3
            dims = optimizer._factored_dims(array.shape[stacked:], ())
            if dims is None:
                self.moments[f"{name}/v"] = v
            else:
                self.moments[f"{name}/v_row"] = v.mean(dims[1] + stacked)
                self.moments[f"{name}/v_col"] = v.mean(dims[0] + stacked)

    def read_moments(self, name: str, layer: int | None = None) -> dict[str, np.ndarray]:
        found = {path.removeprefix(f"{name}/"): a for path, a in self.moments.items() if path.startswith(f"{name}/")}
        return {slot: array if layer is None else array[layer] for slot, array in found.items()}


class RealT5x:
    """t5x's model of a configuration, its optimizer as in base.gin, and its Checkpointer."""

    def __init__(self, config: T5Config, scanned: bool):
        import seqio
        from t5x import adafactor, models, partitioning, utils

        if config.relative_bias_per_layer:
            from t5x.examples.scalable_t5 import network as their_network
        else:
            from t5x.examples.t5 import network as their_network
        shared = {f.name for f in dataclasses.fields(their_network.T5Config)} & set(vars(config))
        fields = {name: getattr(config, name) for name in shared - {"dtype"}}
        extra = {"scan_layers": scanned} if config.relative_bias_per_layer else {}
        module = their_network.Transformer(their_network.T5Config(**fields, dtype="float32", **extra))
        rules = adafactor.standard_logical_factor_rules()
        optimizer = adafactor.Adafactor(decay_rate=0.8, step_offset=0, logical_factor_rules=rules)
        vocabulary = seqio.PassThroughVocabulary(size=config.vocab_size)
        self.model = models.EncoderDecoderModel(module, vocabulary, vocabulary, optimizer)
        self.partitioner = partitioning.PjitPartitioner(
            1, logical_axis_rules=partitioning.standard_logical_axis_rules()
        )
        inputs = ("encoder_input_tokens", "decoder_input_tokens", "decoder_target_tokens")
        self.shapes = utils.TrainStateInitializer(
            optimizer, self.model.get_initial_variables, dict.fromkeys(inputs, (2, 8)), self.partitioner
        ).global_train_state_shape

    def checkpointer(self, model_dir: Path):
        from t5x import checkpoints

        return checkpoints.Checkpointer(self.shapes, self.partitioner, str(model_dir))


@pytest.fixture(autouse=True)
def _full_precision():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("with_moments", [True, False])
def test_t5x_restores_every_array_that_we_wrote(case: str, dtype: str, with_moments: bool, tmp_path: Path) -> None:
    config, scanned = CASES[case]
    model = Trained(config) if with_moments else MemoryModel(enlarged_params(config, 0), config, step=1234)
    ours.write(model, tmp_path / "checkpoint_1234", dtype=dtype, scanned=scanned)
    real = RealT5x(config, scanned)
    restored = real.checkpointer(tmp_path).restore(path=str(tmp_path / "checkpoint_1234"))
    found = flatten_dict(restored.state_dict(), sep="/")
    written = {name: array.read() for name, array in t5x_files.arrays(tmp_path / "checkpoint_1234").items()}
    wanted = flatten_dict(real.shapes.state_dict(), sep="/")
    assert found.keys() == written.keys() == wanted.keys()
    for name, array in written.items():
        assert np.shape(found[name]) == array.shape == wanted[name].shape, name
        assert np.asarray(found[name]).dtype == array.dtype, name
        np.testing.assert_array_equal(np.asarray(found[name]), array, err_msg=name)
    moments = [array for name, array in written.items() if "param_states" in name]
    assert any(array.any() for array in moments) == with_moments


@pytest.mark.parametrize("case", CASES)
def test_t5x_computes_and_trains_with_it_as_we_do(case: str, tmp_path: Path) -> None:
    config, scanned = CASES[case]
    model = Trained(config)
    ours.write(model, tmp_path / "checkpoint_1234", scanned=scanned)
    real = RealT5x(config, scanned)
    before = real.checkpointer(tmp_path).restore(path=str(tmp_path / "checkpoint_1234"))

    rng = np.random.default_rng(2)
    inputs, targets = rng.integers(3, config.vocab_size, (2, 2, 8))
    batch = (inputs, np.pad(targets, ((0, 0), (1, 0)))[:, :-1], targets)
    theirs = real.model.module.apply({"params": before.params}, *batch, enable_dropout=False)
    params = load(model)
    np.testing.assert_allclose(network.Transformer(config).apply({"params": params}, *batch), theirs, atol=1e-4)

    flat_grads = {
        name: jnp.asarray(rng.normal(size=np.shape(p)) * 0.7, jnp.float32)
        for name, p in flatten_dict(before.params, sep="/").items()
    }
    their_grads = unflatten_dict(flat_grads, sep="/")
    real.checkpointer(tmp_path / "gradients").save(before.replace_params(their_grads))
    real.checkpointer(tmp_path / "next").save(before.apply_gradient(their_grads, learning_rate=0.01))
    after = ours.open(tmp_path / "next")
    assert after.step == after.updates == 1235
    state = AdafactorState(jnp.int32(1234), unflatten_dict(model.moments, sep="/"))
    updates, state = Adafactor().update(load(ours.open(tmp_path / "gradients")), state, params, jnp.float32(0.01))
    found, moments = flat(jax.tree.map(jnp.add, params, updates)), flat(state.moments)
    for name, layer in arrays(config):
        at = ... if layer is None else layer
        np.testing.assert_allclose(found[name][at], after.read(name, layer), rtol=0, atol=1e-6, err_msg=name)
        for slot, value in after.read_moments(name, layer).items():
            np.testing.assert_allclose(moments[f"{name}/{slot}"][at], value, rtol=1e-5, err_msg=f"{name}/{slot}")
