"""Adafactor against t5x's own updates; AdamW against optax and, RMS-scaled, against torch."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax.traverse_util import unflatten_dict
from reference_checkpoint import REFERENCE, flat, load_arrays, reference_params, stack_layers, under, unstack_scanned
from tiny_run import CONFIG, TinyVocabulary

from conversion import t5x, t5x_files
from conversion.stored import MemoryModel, StoredModel, arrays, load
from vikhr_t5.errors import UserError
from vikhr_t5.model import network
from vikhr_t5.train import optimizers
from vikhr_t5.train.optax_optimizer import OptaxOptimizer
from vikhr_t5.train.optimizers import Adafactor, AdamW
from vikhr_t5.train.state import EncoderDecoderModel, TrainState
from vikhr_t5.train.step import Trainer, zero_sums

SHAPE = dataclasses.replace(
    CONFIG, vocab_size=1024, emb_dim=64, num_heads=4, head_dim=16, mlp_dim=128,
    num_encoder_layers=2, num_decoder_layers=2, dropout_rate=0.0,
)  # fmt: skip


def reference_batch(name: str, kind: str) -> dict[str, np.ndarray]:
    batch = under(load_arrays(name, "inputs.npz"), f"{kind}/")
    return {**batch, "decoder_source_ids": (batch["decoder_target_tokens"] > 0).astype(np.int32)}


@functools.cache
def training_step(optimizer, per_layer_bias: bool):
    """The whole road of an update, with t5x's base.gin at learning rate 0.01."""
    vocabulary = TinyVocabulary()
    vocabulary.size = 1024
    module = network.Transformer(dataclasses.replace(SHAPE, relative_bias_per_layer=per_layer_bias))
    model = EncoderDecoderModel(module, vocabulary, vocabulary, optimizer)
    return jax.jit(Trainer(lambda step: jnp.float32(0.01)).step_function(model, 1))


def run_steps(state: TrainState, batch, optimizer, steps: int, per_layer_bias: bool = False) -> TrainState:
    for _ in range(steps):
        state, _, _ = training_step(optimizer, per_layer_bias)(state, zero_sums(1), batch, jax.random.key(0))
    return state


@pytest.fixture(scope="module", autouse=True)
def _full_precision():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.mark.parametrize(
    ("name", "kind", "stored"),
    [
        ("t511_d64", "plain", "ckpt_legacy"),
        ("t511_d64", "packed", "ckpt_orbax"),
        ("scan_d64", "plain", "ckpt_legacy"),
        ("scan_d64", "plain", "ckpt_orbax"),
    ],
)
def test_one_step_from_a_converted_checkpoint_equals_t5x(name, kind, stored, tmp_path):
    """Loss, gradient and update from t5x's state at step 200; the result, written for t5x, is what t5x had then."""
    scanned = name == "scan_d64"
    model = t5x.open(REFERENCE / name / stored / "checkpoint_200")
    optimizer = Adafactor(factor_layer_kernels=scanned)
    state = run_steps(converted(model), reference_batch(name, kind), optimizer, 1, scanned)

    t5x.write(StateModel(state, model.config), tmp_path / "checkpoint_201", scanned=scanned)
    found = t5x_files.arrays(tmp_path / "checkpoint_201")
    # The copies of the reference lack what is (1,) there, and t511_d64's moments after the packed batch.
    outputs = load_arrays(name, "after_step1.npz") if scanned else load_arrays(name, "outputs.npz")
    expected = outputs if scanned else under(outputs, f"{kind}/after_step1/")
    parameters, moments = (under(expected, prefix) for prefix in ("target/", "state/param_states/"))
    assert len(parameters) == len(under(found, "target/"))
    assert len(moments) >= 40 or kind == "packed"
    for path, array in parameters.items():
        np.testing.assert_allclose(found[f"target/{path}"].read(), array, rtol=0, atol=1e-5, err_msg=path)
    for path, array in moments.items():
        after = found[f"state/param_states/{path}"].read()
        np.testing.assert_allclose(after, array, rtol=1e-4, atol=1e-6 * array.max(), err_msg=path)
    assert found["state/step"].read() == 201


def converted(model: StoredModel) -> TrainState:
    moments: dict[str, list[np.ndarray]] = {}
    for name, layer in arrays(model.config):
        for slot, value in model.read_moments(name, layer).items():
            moments.setdefault(f"{name}/{slot}", []).append(value)
    stacked = {path: np.stack(values) if "/layers/" in path else values[0] for path, values in moments.items()}
    opt_state = optimizers.AdafactorState(jnp.int32(model.updates), unflatten_dict(stacked, sep="/"))
    return TrainState(jnp.int32(model.step), load(model), opt_state)


class StateModel(MemoryModel):
    """A state of training as a stored model."""

    def __init__(self, state: TrainState, config: network.T5Config):
        super().__init__(state.params, config, step=int(state.step))
        self.updates, self.moments = int(state.opt_state.updates), flat(state.opt_state.moments)

    def read_moments(self, name, layer=None):
        found = {path.removeprefix(f"{name}/"): array for path, array in self.moments.items() if f"{name}/" in path}
        return {slot: array if layer is None else array[layer] for slot, array in found.items()}


@pytest.mark.parametrize("name", ["t511_d64", "scan_d64"])
def test_steps_1_and_3_from_a_fresh_optimizer_equal_t5x(name):
    """scan_d64 exercises factored moments, per-layer statistics of stacked layers, and a bias in each layer."""
    scanned = name == "scan_d64"
    to_ours = unstack_scanned if scanned else stack_layers
    steps = load_arrays(name, "fresh_adafactor_steps.npz")
    expected1, expected3 = (to_ours(under(steps, f"after_step{n}/target/")) for n in (1, 3))
    params, batch = reference_params(name), reference_batch(name, "plain")
    optimizer = Adafactor(factor_layer_kernels=scanned)
    state = run_steps(TrainState(jnp.int32(0), params, optimizer.init(params)), batch, optimizer, 1, scanned)

    # A first update is +-lr * RMS(p) however small the gradient. Where the gradient is zero but for rounding (one
    # element here, 7e-8 of the tensor's largest), its sign is not defined: it is taken from the reference, once.
    undecided = jax.tree.map(lambda found, expected: np.abs(found - expected) > 1e-5, state.params, expected1)
    assert sum(int(x.sum()) for x in jax.tree.leaves(undecided)) <= 1
    for path, where in flat(undecided).items():
        if where.any():
            v = flat(state.opt_state.moments)[f"{path}/v"]
            assert v[where].max() < 1e-12 * v.max()
    state = state._replace(params=jax.tree.map(np.where, undecided, expected1, state.params))
    assert_close(flat(run_steps(state, batch, optimizer, 2, scanned).params), flat(expected3), 1e-5)


def assert_close(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=0, atol=tolerance, err_msg=name)


def random_tree(seed: int, scale: float = 1.0):
    rng = np.random.default_rng(seed)
    shapes = {
        "token_embedder": {"embedding": (256, 128)},
        "encoder": {
            "layers": {"mlp": {"wi": {"kernel": (3, 128, 160)}}, "norm": {"scale": (3, 128)}},
            "relpos_bias": {"rel_embedding": (4, 32)},
        },
    }
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape) * scale, jnp.float32),
        shapes,
        is_leaf=lambda x: type(x) is tuple,
    )


OPTAX = OptaxOptimizer(optax.chain(optax.clip(0.5), optax.adamw(optax.linear_schedule(0.0, 0.1, 10))))


@pytest.mark.parametrize(
    "optimizer",
    [
        Adafactor(),
        Adafactor(min_dim_size_to_factor=8, beta1=0.9, max_parameter_scale=0.5),
        AdamW(rms_scaled=True),
        AdamW(moment_dtype="8bit"),
        OPTAX,
    ],
)
def test_a_stack_of_layers_is_updated_as_its_layers_alone(optimizer):
    """Every statistic is per layer: the layers of a stack, given as separate parameters, move the same."""

    def unstack(tree):
        mlp, norm = tree["encoder"]["layers"]["mlp"], tree["encoder"]["layers"]["norm"]
        layers = {f"layer{i}": jax.tree.map(lambda x, i=i: x[i], {"mlp": mlp, "norm": norm}) for i in range(3)}
        return {**tree, "encoder": {**layers, "relpos_bias": tree["encoder"]["relpos_bias"]}}

    params, grads = random_tree(0), [random_tree(s, 10.0 ** (s - 2)) for s in (1, 2)]
    layer_scale = jnp.asarray([0.1, 1.0, 30.0])  # layers so unlike that a shared statistic would show
    grads[1]["encoder"]["layers"]["mlp"]["wi"]["kernel"] *= layer_scale[:, None, None]
    params["encoder"]["layers"]["mlp"]["wi"]["kernel"] *= layer_scale[:, None, None]
    stacked, alone = (
        run_updates(optimizer, p, gs) for p, gs in ((params, grads), (unstack(params), map(unstack, grads)))
    )
    assert_close(flat(unstack(stacked)), flat(alone), 1e-6)


def run_updates(optimizer, params, grads, learning_rate=0.01):
    state = optimizer.init(params)
    for g in grads:
        updates, state = jax.jit(optimizer.update)(g, state, params, learning_rate)
        params = optax.apply_updates(params, updates)
    return params


@pytest.mark.parametrize("dims", [(128, 300), (300, 128), (200, 200)])
def test_factored_adafactor_equals_optax(dims):
    """optax's Adafactor is another implementation of the same paper; its decay counts steps the same way."""
    rng = np.random.default_rng(0)
    params = {"x": {"kernel": jnp.asarray(rng.normal(size=dims), jnp.float32)}}
    grads = [jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), params) for _ in range(3)]
    theirs = optax.adafactor(0.01, min_dim_size_to_factor=128, eps=1e-30)
    expected, state = params, theirs.init(params)
    for g in grads:
        updates, state = theirs.update(g, state, expected)
        expected = optax.apply_updates(expected, updates)
    assert_close(flat(run_updates(Adafactor(), params, grads)), flat(expected), 1e-6)


def test_adafactor_with_momentum_decay_and_clipping_equals_optax():
    """umT5 XXL's: moments kept whole. optax too decays by a rate that the learning rate does not scale."""
    params, grads = random_tree(0), [random_tree(s, 10.0 ** (s - 2)) for s in (1, 2, 3)]
    del params["encoder"]["layers"]  # optax knows no stacks
    grads = [{**g, "encoder": {"relpos_bias": g["encoder"]["relpos_bias"]}} for g in grads]
    adafactor = optax.adafactor(0.01, factored=False, eps=1e-30, momentum=0.9, weight_decay_rate=0.002)
    theirs = optax.chain(optax.clip_by_global_norm(1.0), adafactor)
    expected, state = params, theirs.init(params)
    for g in grads:
        updates, state = theirs.update(g, state, expected)
        expected = optax.apply_updates(expected, updates)
    ours = Adafactor(factored=False, beta1=0.9, weight_decay_rate=0.002, global_norm_clip_threshold=1.0)
    assert_close(flat(run_updates(ours, params, grads)), flat(expected), 1e-6)
    by_rate = dataclasses.replace(ours, weight_decay_rate=0.2, weight_decay_rate_lr_exponent=1.0)  # 0.2 * 0.01
    assert_close(flat(run_updates(by_rate, params, grads)), flat(expected), 1e-6)


def test_a_fresh_adafactor_begins_at_its_step_offset():
    """As after pre-training for a million steps: a checkpoint without moments must not give a negative count."""
    params, grads = random_tree(0), [random_tree(1), random_tree(2)]
    offset = run_updates(Adafactor(step_offset=1_000_000), params, grads)
    assert_close(flat(offset), flat(run_updates(Adafactor(), params, grads)), 0)


def test_adafactor_limits_the_scale_of_a_parameter():
    params, grads = {"x": {"kernel": jnp.full((4, 4), 10.0)}}, [{"x": {"kernel": jnp.ones((4, 4))}}]
    moved = run_updates(Adafactor(max_parameter_scale=2.0), params, grads)["x"]["kernel"]
    np.testing.assert_allclose(moved, 10.0 - 0.01 * 2.0, rtol=1e-6)


AXES = {
    "token_embedder": {"embedding": ("vocab", "embed")},
    "encoder": {
        "layers": {"mlp": {"wi": {"kernel": ("layers", "embed", "mlp")}}, "norm": {"scale": ("layers", "embed")}},
        "relpos_bias": {"rel_embedding": ("heads", "relpos_buckets")},
    },
}


@pytest.mark.parametrize(
    "optimizer", [Adafactor(beta1=0.9), AdamW(), AdamW(moment_dtype="bfloat16"), AdamW(moment_dtype="8bit"), OPTAX]
)
def test_the_state_has_the_axes_of_its_parameters(optimizer):
    params = random_tree(0)
    state, axes = optimizer.init(params), optimizer.state_axes(params, AXES)
    fits = jax.tree.map(lambda v, names: v.ndim == len(names), state, axes)
    assert all(jax.tree.leaves(fits))
    kernels = [
        names
        for names in jax.tree.leaves(axes, is_leaf=lambda x: type(x) is tuple and x[:1] == ("layers",))
        if names == ("layers", "embed", "mlp")
    ]
    in_8_bits = getattr(optimizer, "moment_dtype", None) == "8bit"  # codes and scales of each
    assert len(kernels) == (1 if isinstance(optimizer, Adafactor) else 4 if in_8_bits else 2)  # momentum; mu and nu


def test_factored_state_is_small_and_has_axes():
    params = random_tree(0)
    state, state_axes = Adafactor().init(params), Adafactor().state_axes(params, AXES)
    kernel, kernel_axes = (tree.moments["encoder"]["layers"]["mlp"]["wi"]["kernel"] for tree in (state, state_axes))
    assert {name: v.shape for name, v in kernel.items()} == {"v_row": (3, 128), "v_col": (3, 160)}
    assert kernel_axes == {"v_row": ("layers", "embed"), "v_col": ("layers", "mlp")}
    embedding_axes = state_axes.moments["token_embedder"]["embedding"]
    assert embedding_axes == {"v_row": ("embed",), "v_col": ("vocab",)}
    fits = jax.tree.map(lambda v, names: v.ndim == len(names), state.moments, state_axes.moments)
    assert all(jax.tree.leaves(fits))


def test_adamw_equals_optax():
    params, grads = random_tree(0), [random_tree(s) for s in (1, 2, 3)]
    decays = jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in ("kernel", "embedding"), params)
    theirs = optax.adamw(0.01, b1=0.8, b2=0.95, eps=1e-6, weight_decay=0.1, mask=decays)
    expected, state = params, theirs.init(params)
    for g in grads:
        updates, state = theirs.update(g, state, expected)
        expected = optax.apply_updates(expected, updates)
    ours = run_updates(AdamW(b1=0.8, b2=0.95, eps=1e-6, weight_decay=0.1), params, grads)
    assert_close(flat(ours), flat(expected), 1e-6)


def test_rms_scaled_adamw_equals_nanot5s_rule():
    """nanoT5: torch's Adam with the step of each tensor (each layer's) times max(1e-3, RMS(parameter))."""
    params, grads = random_tree(0, 0.05), [random_tree(s) for s in (1, 2, 3)]
    params["encoder"]["relpos_bias"]["rel_embedding"] *= 1e-4  # below the floor
    layers = {}
    for path, array in flat(params).items():
        stacked = "/layers/" in path
        for i in range(len(array) if stacked else 1):
            layers[path, i] = torch.tensor(array[i] if stacked else array, requires_grad=True)
    for g in grads:
        for (path, i), tensor in layers.items():
            array = flat(g)[path]
            tensor.grad = torch.tensor(array[i] if "/layers/" in path else array)
            rms = max(1e-3, tensor.detach().square().mean().sqrt().item())
            # An Adam of its own for each tensor, whose learning rate is set before each step.
            adam = layers_adam(tensor)
            adam.param_groups[0]["lr"] = 0.02 * rms
            adam.step()
    ours = flat(run_updates(AdamW(eps=1e-6, rms_scaled=True), params, grads, 0.02))
    for (path, i), tensor in layers.items():
        found = ours[path][i] if "/layers/" in path else ours[path]
        np.testing.assert_allclose(found, tensor.detach().numpy(), rtol=2e-5, atol=1e-7, err_msg=path)


@pytest.mark.parametrize(("moment_dtype", "tolerance"), [("bfloat16", 0.01), ("8bit", 0.03)])
def test_moments_in_fewer_bytes_stay_near_those_of_float32(moment_dtype, tolerance):
    """20 updates; relative to how far a parameter moved, by norms."""
    params, grads = random_tree(0), [random_tree(s) for s in range(1, 21)]
    exact = flat(run_updates(AdamW(), params, grads))
    found = flat(run_updates(AdamW(moment_dtype=moment_dtype), params, grads))
    for name, start in flat(params).items():
        error = np.linalg.norm(found[name] - exact[name]) / np.linalg.norm(exact[name] - start)
        assert error <= tolerance, name
        if moment_dtype == "8bit" and not name.endswith("kernel"):
            assert error == 0, name


def test_bytes_of_the_moments():
    """Of a kernel of 3 x 128 x 160: blocks of 40, so 1.1 bytes; of the rest 4."""
    params = random_tree(0)

    def size(moment_dtype: str, pick) -> int:
        state = AdamW(moment_dtype=moment_dtype).init(params)
        return sum(x.nbytes for moments in (state.mu, state.nu) for x in jax.tree.leaves(pick(moments)))

    numbers = 3 * 128 * 160
    kernel = lambda tree: tree["encoder"]["layers"]["mlp"]  # noqa: E731
    assert [size(d, kernel) / numbers for d in ("float32", "bfloat16", "8bit")] == [8, 4, pytest.approx(2.2)]
    embedding = lambda tree: tree["token_embedder"]  # noqa: E731
    assert [size(d, embedding) / (256 * 128) for d in ("float32", "bfloat16", "8bit")] == [8, 4, 8]


def test_a_second_moment_in_bfloat16_decays():
    """By 0.999 a step, less than half of what bfloat16 sees: rounded to nearest it would stay for ever."""
    params, zero = {"x": {"kernel": jnp.ones((64, 64))}}, {"x": {"kernel": jnp.zeros((64, 64))}}
    optimizer = AdamW(moment_dtype="bfloat16")
    _, state = optimizer.update({"x": {"kernel": jnp.ones((64, 64))}}, optimizer.init(params), params, jnp.float32(0))
    state = jax.lax.fori_loop(0, 999, lambda _, s: optimizer.update(zero, s, params, jnp.float32(0))[1], state)
    left = np.asarray(state.nu["x"]["kernel"], np.float32).mean() / 0.001
    assert left == pytest.approx(0.999**999, rel=0.02)


def test_an_unknown_moment_type_is_refused():
    with pytest.raises(UserError, match=r"AdamW\.moment_dtype '8bits' \(nearest: 8bit"):
        AdamW(moment_dtype="8bits")


_adams: dict[int, torch.optim.Adam] = {}


def layers_adam(tensor: torch.Tensor) -> torch.optim.Adam:
    return _adams.setdefault(id(tensor), torch.optim.Adam([tensor], lr=0.0, eps=1e-6))


def test_clipping_by_global_norm():
    grads = random_tree(0)
    norm = optax.global_norm(grads)
    expected, _ = optax.clip_by_global_norm(2.5).update(grads, optax.EmptyState())
    assert_close(flat(optimizers.clip_by_global_norm(grads, norm, 2.5)), flat(expected), 1e-7)
    untouched = optimizers.clip_by_global_norm(grads, norm, 1e6)
    assert_close(flat(untouched), flat(grads), 0)
