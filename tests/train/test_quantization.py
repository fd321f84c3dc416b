"""8-bit blocks: the values, their nearest and what comes back, against bitsandbytes; lengths of blocks.

`reference/bitsandbytes_blocks.npz` is what bitsandbytes 0.50.2 (CPU; `create_dynamic_map`, `quantize_blockwise`) makes
of 64 blocks of 32 numbers of very different sizes, signed and unsigned.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vikhr_t5.train.quantization import block_size, dequantize, quantize, values

REFERENCE = Path(__file__).parents[1] / "reference" / "bitsandbytes_blocks.npz"


@pytest.mark.parametrize("name", ["signed", "unsigned"])
def test_values_and_codes_are_those_of_bitsandbytes(name):
    """Its CPU kernel finds the nearest value by a table of equal steps, and so misses it among the smallest."""
    stored, signed = np.load(REFERENCE), name == "signed"
    theirs = {part: stored[f"{name}/{part}"] for part in ("values", "codes", "scales", "dequantized")}
    np.testing.assert_allclose(values(signed), theirs["values"], rtol=1e-6)
    x = stored["x"] if signed else np.abs(stored["x"])
    found = jax.jit(quantize, static_argnums=1)(x, signed)
    np.testing.assert_array_equal(found.scales[:, 0], theirs["scales"])
    numbers = np.asarray(dequantize(found, signed))
    large = np.abs(x) > 1e-3 * theirs["scales"][:, None]
    assert large.sum() > 500
    same = found.codes == theirs["codes"]
    assert same[large].mean() > 0.99
    np.testing.assert_allclose(numbers[same], theirs["dequantized"][same], rtol=1e-6)
    nearer = np.abs(numbers - x) <= np.abs(theirs["dequantized"] - x) + 1e-7 * theirs["scales"][:, None]
    if signed:
        assert np.all(nearer)
    else:  # where it gives 0, ours gives the smallest value above
        assert np.all(nearer | (theirs["codes"] == 0) | (found.codes == 1))
        assert np.all(np.asarray(found.codes)[x > 0] > 0)


@pytest.mark.parametrize("signed", [True, False])
def test_what_comes_back_is_near(signed):
    """Half a step is 0.7% of a block's largest number, and 7% of one a tenth of it; unsigned half as much."""
    x = np.random.default_rng(1).normal(size=(3, 4, 320)).astype(np.float32)
    x = x if signed else np.square(x)
    found = quantize(jnp.asarray(x), signed)
    assert found.codes.shape == x.shape
    assert found.scales.shape == (3, 4, 8)
    back, largest = np.asarray(dequantize(found, signed)), np.repeat(found.scales, 40, axis=-1)
    error = np.abs(back - x)
    assert np.all(error <= (0.0072 if signed else 0.0036) * largest)
    big = np.abs(x) > 0.1 * largest
    assert np.all(error[big] <= (0.071 if signed else 0.036) * np.abs(x[big]))
    assert np.array_equal(np.sign(back)[big], np.sign(x)[big])


def test_zeros_stay_zeros():
    found = quantize(jnp.zeros((2, 64)), True)
    assert not dequantize(found, True).any()


@pytest.mark.parametrize(
    ("length", "block", "mesh"),
    [(512, 32, 16), (768, 48, 16), (2816, 44, 64), (5120, 40, 128), (32128, 251, 128), (58368, 57, 1024)],
)
def test_blocks_divide_over_a_mesh_as_the_axis_does(length, block, mesh):
    """T5's dimensions and vocabularies."""
    assert block_size(length) == block
    assert (length // block) % mesh == 0


@pytest.mark.parametrize(("length", "block"), [(7, None), (16, 16), (50257, 29), (64 * 257, None)])
def test_an_axis_without_a_fit_divisor_is_not_quantized(length, block):
    assert block_size(length) == block
