"""What the benchmarks of steps compute from what they measure."""

import pytest

from benchmarks import roofline, step_time
from vikhr_t5.model.config import T5Config


@pytest.mark.parametrize("size", ["small", "base"])
def test_the_products_are_all_of_a_step(size):
    """The roofline's list against the model's own count of FLOPs."""
    d, heads, k, f, layers = shape = step_time.SIZES[size]
    config = T5Config(roofline.VOCABULARY, "float32", d, heads, layers, layers, k, f, step_time.GATED)
    kinds = roofline.products(shape, 8, 512, 114)
    assert sum(3 * kind.flops * kind.count for kind in kinds) == config.flops_per_step(8, 512, 114)
    for part, flops in config.forward_flops(512, 114).items():
        assert sum(kind.flops * kind.count for kind in kinds if kind.part == part) == 8 * flops


def test_a_floor_takes_each_product_as_often_as_a_step_has_it():
    rows = [
        {"part": "encoder", "count": 3, "seconds": {"jax float32": [1, 2, 3], "torch float32": [2, 1, 3]}},
        {"part": "head", "count": 1, "seconds": {"jax float32": [4, 4, 4], "torch float32": [5, 5, 1]}},
    ]
    for row in rows:
        row["seconds"] |= {"jax bfloat16": [1, 1, 1], "torch bfloat16": [1, 1, 1]}
    floors = roofline.floors(rows)
    assert floors["jax float32"] == {"encoder": 18, "decoder": 0, "head": 12, "step": 30}
    assert floors["torch float32"]["step"] == 18 + 11
    assert floors["fastest float32"]["step"] == 3 * (1 + 1 + 3) + 4 + 4 + 1


def test_ratios_compare_like_with_like_and_the_fastest_with_the_fastest():
    def side(*turns: float) -> dict:
        return {"wall": sorted(turns)[1], "turns": list(turns), "processor": 2 * turns[0], "peak_gib": turns[0]}

    result = {
        "ours float32": side(4, 4, 5),
        "theirs float32": side(8, 6, 7),
        "ours bfloat16": side(3, 2, 2),
        "theirs bfloat16": side(9, 9, 8),
    }
    ratios = step_time.ratios(result)
    assert ratios["theirs float32"]["wall"] == 7 / 4
    assert (ratios["theirs float32"]["from"], ratios["theirs float32"]["to"]) == (7 / 5, 8 / 4)
    assert ratios["theirs bfloat16"]["memory"] == 3 / 9
    fastest = ratios["fastest"]
    assert (fastest["ours"], fastest["theirs"], fastest["wall"]) == ("ours bfloat16", "theirs float32", 7 / 2)
