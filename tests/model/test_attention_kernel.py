"""The GPU's attention kernel, interpreted on the CPU: against torch with transformers' bias, against the plain path, on
meshes; and that a whole train step lowers to it for CUDA.

Whether XLA compiles it for a card, and how fast it is there: benchmarks/gpu_step.py.
"""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from quick import quick_jit
from random_params import enlarged_params
from transformers.models.t5.modeling_t5 import T5Attention

from vikhr_t5.data.byte_vocabulary import ByteVocabulary
from vikhr_t5.errors import UserError
from vikhr_t5.model import attention_kernel, network, ops
from vikhr_t5.model.attention import FusedAttention, PlainAttention, attention_between
from vikhr_t5.train import optimizers
from vikhr_t5.train.losses import token_losses
from vikhr_t5.train.state import EncoderDecoderModel
from vikhr_t5.train.step import Trainer, zero_sums

CASES = {  # rows, queries, keys, heads, head dim, causal, with a bias table, dtype
    "packed encoder": (9, 130, 130, 2, 16, False, True, "float32"),
    "packed decoder": (2, 100, 100, 3, 64, True, True, "float32"),
    "cross-attention": (2, 70, 150, 2, 32, False, False, "float32"),
    "bfloat16": (2, 64, 64, 1, 128, True, True, "bfloat16"),
}
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}  # of the largest value; rounding is 6e-8 and 4e-3


def packed(rng, rows, length, segments=3):
    """Segment ids of rows packed with up to `segments` examples, some of no token, and padding: [rows, length]."""
    cuts = np.sort(rng.integers(0, length, (rows, segments)), axis=1)
    ids = 1 + (np.arange(length)[None, :, None] >= cuts[:, None, :]).sum(-1)
    return np.where(ids > segments, 0, ids).astype(np.int32)


def example(rows, queries, keys, heads, head_dim, causal, with_table, dtype):
    rng = np.random.default_rng(queries)
    q = rng.normal(size=(rows, queries, heads, head_dim)) * head_dim**-0.25
    k = rng.normal(size=(rows, keys, heads, head_dim)) * head_dim**-0.25
    v, g = rng.normal(size=k.shape), rng.normal(size=q.shape)
    table = rng.normal(size=(heads, ops.NUM_BUCKETS)).astype(np.float32) if with_table else None
    q_segments = packed(rng, rows, queries)
    k_segments = q_segments if queries == keys else packed(rng, rows, keys)
    return *(np.asarray(jnp.asarray(x, dtype)) for x in (q, k, v)), table, q_segments, k_segments, np.asarray(g, dtype)


def by_torch(q, k, v, table, q_segments, k_segments, g, causal):
    """float64: values, and gradients of q, k, v and the table. The mask is written out pair by pair."""
    wide = lambda x: torch.tensor(np.asarray(x, np.float64).swapaxes(1, 2), requires_grad=True)  # noqa: E731
    query, key, value = map(wide, (q, k, v))
    seen = np.zeros((len(q), q.shape[1], k.shape[1]), bool)
    for b, t, s in np.ndindex(seen.shape):
        seen[b, t, s] = 0 < k_segments[b, s] == q_segments[b, t] and (s <= t or not causal)
    blind = ~seen.any(-1)
    mask = torch.where(torch.tensor(seen | blind[..., None]), 0.0, -torch.inf).double()[:, None]
    leaves = [query, key, value]
    if table is not None:
        weight = torch.tensor(table.T, dtype=torch.float64, requires_grad=True)
        offsets = torch.arange(k.shape[1])[None, :] - torch.arange(q.shape[1])[:, None]
        buckets = T5Attention._relative_position_bucket(offsets, not causal, 32, 128)
        mask = mask + torch.nn.functional.embedding(buckets, weight).permute(2, 0, 1)[None]
        leaves.append(weight)
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=1.0)
    out = out * torch.tensor(~blind)[:, None, :, None]  # a query that sees nothing gives zeros
    gradients = torch.autograd.grad(out, leaves, torch.tensor(np.asarray(g, np.float64).swapaxes(1, 2)))
    rows = [x.detach().numpy().swapaxes(1, 2) for x in (out, *gradients[:3])]
    return [*rows, *(x.numpy().T for x in gradients[3:])]


def fused(arguments, segments, g, causal):
    """The same of the kernel."""
    blocks = attention_kernel.visited_blocks(*segments, causal)
    value, pull = jax.vjp(
        lambda *given: attention_kernel.fused_attention(*given, *segments, *blocks, causal), *arguments
    )
    return value, *(x for x in pull(g) if x is not None)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_values_and_gradients_are_those_of_torch(case):
    *arguments, q_segments, k_segments, g = example(*case)
    causal, dtype = case[5], case[7]
    ours = quick_jit(fused, static_argnums=3)(arguments, (q_segments, k_segments), g, causal)
    theirs = by_torch(*arguments, q_segments, k_segments, g, causal)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == (jnp.float32 if a.shape[-1] == ops.NUM_BUCKETS else dtype)
        np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=0, atol=TOLERANCE[dtype] * np.abs(b).max())


def test_blocks_that_nothing_sees_are_not_read():
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(1, 192, 1, 16)).astype(np.float32) for _ in range(3))
    segments = np.repeat([[1, 2, 0]], 64, axis=1).astype(np.int32)
    keys, queries = attention_kernel.visited_blocks(segments, segments, causal=False)
    assert np.asarray(keys).tolist() == np.asarray(queries).tolist() == [[[0, 1], [1, 2], [0, 0]]]
    k[:, 128:] = v[:, 128:] = q[:, 128:] = np.nan
    attend = FusedAttention(jnp.asarray(segments), jnp.asarray(segments), causal=False)
    out, *gradients = quick_jit(lambda *a: (lambda y, pull: (y, *pull(y)))(*jax.vjp(lambda *a: attend(*a, None), *a)))(
        q, k, v
    )
    assert np.isfinite(out).all()
    assert not np.asarray(out)[:, 128:].any()
    for gradient in gradients:
        assert not np.asarray(gradient)[:, 128:].any()
        assert np.abs(np.asarray(gradient)[:, :128]).min() > 0


CONFIG = network.T5Config(
    64, "float32", 16, 2, 2, 2, 16, 24, ("gelu", "linear"), dropout_rate=0.0, remat_policy="minimal"
)


def test_the_choice(monkeypatch):
    segments = jnp.ones((1, 4), jnp.int32)

    def chosen(capability=None, **changes):
        device = type("Device", (), {} if capability is None else {"compute_capability": capability})
        monkeypatch.setattr(jax, "devices", lambda: [device])
        return type(attention_between(dataclasses.replace(CONFIG, **changes), segments, segments))

    assert chosen() is chosen("7.0") is chosen("gfx942") is PlainAttention
    assert chosen("8.0") is chosen("9.0") is chosen("10.0") is FusedAttention
    assert chosen(attention="fused") is chosen("9.0", head_dim=128, dtype="bfloat16") is FusedAttention
    for odd in ({"head_dim": 48}, {"head_dim": 8}, {"head_dim": 128}, {"attention": "plain"}):
        assert chosen("9.0", **odd) is PlainAttention
    with pytest.raises(UserError, match="power of 2 from 16, of at most 256 bytes; not 48 of float32"):
        chosen(attention="fused", head_dim=48)
    with pytest.raises(UserError, match="attention 'flash'"):
        chosen(attention="flash")


def test_the_train_step_of_xl_lowers_to_the_kernel_for_cuda(monkeypatch):
    """T5 1.1 XL, bfloat16, 64 x 512/128: three attentions forward; dq, dk and dv of each; two tables."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    config = network.T5Config(
        32128,
        "bfloat16",
        2048,
        32,
        24,
        24,
        64,
        5120,
        ("gelu", "linear"),
        0.0,
        attention="fused",
        remat_policy="minimal",
    )
    bytes_ = ByteVocabulary()
    model = EncoderDecoderModel(network.Transformer(config), bytes_, bytes_, optimizers.Adafactor())
    step = Trainer(lambda step: 1e-3).step_function(model, num_sources=1)
    names = {"encoder": ("input_tokens", "segment_ids"), "decoder": ("target_tokens", "input_tokens", "segment_ids")}
    names["decoder"] += ("loss_weights", "source_ids")
    lengths = {"encoder": 512, "decoder": 128}
    batch = {f"{s}_{n}": jax.ShapeDtypeStruct((64, lengths[s]), jnp.int32) for s in names for n in names[s]}
    sums = jax.eval_shape(lambda: zero_sums(1))
    traced = jax.jit(step, donate_argnums=(0, 1)).trace(model.abstract_state(), sums, batch, jax.random.key(0))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    calls = re.findall(r"@__gpu\$xla.gpu.triton.*?name = \"_(\w+)_kernel\"", text)
    assert sorted(calls) == ["dkv"] * 3 + ["dq"] * 3 + ["dtable"] * 2 + ["forward"] * 3
    products = re.findall(r"dot_general .*-> tensor<64x(?:512|128)x\d+x(\w+)>", text)
    assert len(products) > 20, "what a dense layer returns, and the gradients of its input"
    assert set(products) == {"bf16"}
    assert not re.search(r"tensor<64x(32x)?(512x512|128x128|128x512)x(bf16|f32|32)", text), "an array of [B, H, T, S]"


PROGRAM = """
import json
import jax, numpy as np
from quick import quick_jit
from vikhr_t5.model.attention import FusedAttention, PlainAttention
from vikhr_t5.train.partitioning import Partitioner

B, T, H, K = 8, 72, 4, 16
rng = np.random.default_rng(0)
q, k, v, g = (rng.normal(size=(B, T, H, K)).astype(np.float32) for _ in range(4))
table = rng.normal(size=(H, 32)).astype(np.float32)
segments = np.repeat(1 + (np.arange(T)[None] >= 40), B, axis=0).astype(np.int32)

def differentiate(attention):
    def attend(q, k, v, table):
        y, pull = jax.vjp(lambda q, k, v, table: attention(q, k, v, attention.bias(table)), q, k, v, table)
        return y, *pull(g.reshape(y.shape))
    return attend

alone = quick_jit(differentiate(PlainAttention(segments, segments, True, True)))(q, k, v, table)
found = {}
for shape in ((2, 2, 2), (1, 1, 8)):
    mesh = Partitioner(*shape)
    attend = lambda *arguments: differentiate(FusedAttention(segments, segments, True))(*arguments)
    shardings = (*[mesh.batch] * 3, mesh.replicated)
    sharded = mesh.jit(attend, in_shardings=shardings, **quick_jit.keywords)(q, k, v, table)
    found["x".join(map(str, shape))] = {
        "error": max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(sharded, alone)),
        "held": sharded[1].addressable_shards[0].data.size / q.size,
    }
print(json.dumps(found))
"""


def test_each_device_of_a_mesh_computes_its_rows_and_heads():
    root = Path(__file__).parents[2]
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "NPROC": "16",  # several fake devices in one process can wait for each other for ever with fewer threads
        "PYTHONPATH": f"{root}:{root / 'tests'}",
    }
    run = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    # Four heads do not divide over eight devices: there each computes all of them.
    assert {mesh: result["held"] for mesh, result in found.items()} == {"2x2x2": 1 / 8, "1x1x8": 1}
    assert all(result["error"] < 1e-5 for result in found.values()), found


@pytest.mark.slow
@pytest.mark.parametrize("per_layer", [False, True])
def test_the_network_is_the_same_with_the_kernel(per_layer):
    """Loss and gradients of a packed batch through both stacks, with what a remat policy keeps of attention."""
    rng = np.random.default_rng(0)
    inputs, targets = rng.integers(2, 64, (3, 70)), rng.integers(2, 64, (3, 30))
    segments = [1 + (np.arange(x.shape[1])[None] >= 20) + 0 * x for x in (inputs, targets)]
    inputs[:, 60:] = targets[:, 25:] = 0
    batch = (inputs, np.pad(targets, ((0, 0), (1, 0)))[:, :-1], targets, *segments)
    params = enlarged_params(dataclasses.replace(CONFIG, relative_bias_per_layer=per_layer), 0)

    def loss(params, attention):
        config = dataclasses.replace(CONFIG, relative_bias_per_layer=per_layer, attention=attention)
        hidden = network.Transformer(config).apply({"params": params}, *batch, method="decoder_hidden")
        return (token_losses(hidden, *network.head(params, config), targets).loss * (targets > 0)).sum()

    step = quick_jit(jax.value_and_grad(loss), static_argnums=1)
    (value, gradients), (expected, expected_gradients) = (step(params, name) for name in ("fused", "plain"))
    assert float(value) == pytest.approx(float(expected), rel=1e-5)
    for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected_gradients), strict=True):
        assert np.linalg.norm(a - b) < 1e-4 * np.linalg.norm(b)
