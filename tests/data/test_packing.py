import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vikhr_t5.data import packing
from vikhr_t5.data.denoisers import MIXTURES, Denoiser, longest_window, mixture, window
from vikhr_t5.data.packing import STRATA, plan_examples, plan_windows
from vikhr_t5.errors import UserError

# The lengths at which each mixture fills both sides.
NATURAL = {
    "span_corruption": (512, 114),
    "ul2": (512, 240),
    "ul2r": (512, 348),
    "fred": (512, 287),
    "t5gemma2": (256, 460),
}


@pytest.mark.parametrize("name", MIXTURES)
def test_both_sides_are_full_at_natural_lengths(name: str) -> None:
    plan = plan_windows(mixture(name), *NATURAL[name])
    assert min(plan.fill) >= 0.99


@pytest.mark.parametrize("lengths", [(512, 240), (1024, 480), (2048, 960)])
def test_ul2_is_full_on_both_sides(lengths: tuple[int, int]) -> None:
    assert min(plan_windows(mixture("ul2"), *lengths).fill) >= 0.97


def test_other_lengths_waste_no_more_than_they_must() -> None:
    # The shares fix the ratio of targets to inputs, so at 512/512 and 512/256 targets cannot be fuller than this.
    ul2 = mixture("ul2")
    ratio = sum(d.weight * (w := longest_window(d, 512)).targets / w.inputs for d in ul2)
    for targets_length in (256, 512):
        inputs, targets = plan_windows(ul2, 512, targets_length).fill
        assert inputs > 0.999
        assert targets == pytest.approx(512 * ratio / targets_length, rel=0.01)
    inputs, targets = plan_windows(ul2, 512, 114).fill
    assert targets > 0.99
    assert inputs == pytest.approx(114 / (512 * ratio), rel=0.03)


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("lengths", [(512, 512), (512, 240), (128, 64)])
def test_shares_are_met_and_nothing_overflows(name: str, lengths: tuple[int, int]) -> None:
    plan = plan_windows(mixture(name), *lengths)
    weights = np.array([denoiser.weight for denoiser in plan.denoisers])
    assert np.abs(plan.shares / weights - 1).max() < 0.01
    for template in plan.templates:
        inputs = sum(counts.inputs for _, counts in template.windows)
        targets = sum(counts.targets for _, counts in template.windows)
        assert inputs <= lengths[0]
        assert targets <= lengths[1]
        if len(template.windows) == 2:
            assert (inputs, targets) == lengths
        for part, counts in template.windows:
            assert counts == window(part.denoiser, counts.raw, counts.noise)
            assert abs(counts.noise - counts.raw * part.denoiser.rate) <= max(1, 0.01 * counts.noise)


@pytest.mark.parametrize("lengths", [(512, 240), (1024, 480)])
def test_rates_of_ul2_stay_nominal(lengths: tuple[int, int]) -> None:
    plan = plan_windows(mixture("ul2"), *lengths)
    noise = np.zeros(len(plan.denoisers))
    for template, count in zip(plan.templates, plan.order.counts, strict=True):
        for part, counts in template.windows:
            noise[part.owner] += count * counts.noise
    assert noise / plan.totals[:, 1] == pytest.approx([d.rate for d in plan.denoisers], rel=0.005)


def test_a_random_split_falls_everywhere_alike() -> None:
    plan = plan_windows([Denoiser("S", "prefix", 0.5, random_split=True)], 512, 512)
    text: dict[float, int] = {}
    for template, count in zip(plan.templates, plan.order.counts, strict=True):
        for part, counts in template.windows:
            text[part.denoiser.rate] = text.get(part.denoiser.rate, 0) + count * counts.raw
    assert sorted(text) == [(i + 0.5) / STRATA for i in range(STRATA)]
    assert np.array(list(text.values())) / sum(text.values()) == pytest.approx(1 / STRATA, rel=0.08)
    assert min(plan.fill) > 0.98


def test_one_window_in_a_row() -> None:
    plan = plan_windows(mixture("ul2"), 512, 512, pack=False)
    assert plan.windows_per_row == 1
    assert {t.windows[0][1] for t in plan.templates} == {longest_window(d, 512, 512) for d in plan.denoisers}
    assert plan.shares == pytest.approx([d.weight for d in plan.denoisers], rel=0.01)


@settings(max_examples=30)
@given(st.integers(0, 60_000_000), st.integers(0, 80_000))
def test_rows_tile_the_text(num_tokens: int, row: int) -> None:
    plan = UL2
    template, start = plan.locate(row)
    assert plan.locate(row + 1)[1] == start + plan.templates[template].raw
    rows = plan.num_rows(num_tokens)
    assert plan.locate(rows)[1] <= num_tokens < plan.locate(rows + 1)[1]


UL2 = plan_windows(mixture("ul2"), 512, 240)


def test_lengths_too_short_for_a_denoiser() -> None:
    with pytest.raises(UserError, match=r"lengths too short for denoiser 'R-3-15'.*inputs 4"):
        plan_windows(mixture("ul2"), 4, 240)


# ---- examples --------------------------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.integers(0, 70), st.integers(1, 40)), min_size=1, max_size=200),
    st.integers(0, 9),
    st.sampled_from([3, 50, packing.EXAMPLES_PER_LANE]),
)
def test_every_example_is_packed_once_and_no_row_overflows(
    lengths: list[tuple[int, int]], seed: int, examples_per_lane: int
) -> None:
    table = np.array(lengths)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "EXAMPLES_PER_LANE", examples_per_lane)
        plan = plan_examples(table, 64, 32, seed)
    assert sorted(plan.order.tolist()) == list(range(len(lengths)))
    rows = [plan.examples(row) for row in range(plan.num_rows)]
    assert [index for examples in rows for index in examples] == plan.order.tolist()
    for examples in rows:
        assert examples
        assert np.all(np.minimum(table[examples], (64, 32)).sum(axis=0) <= (64, 32))


def test_first_fit_is_close_to_the_bound() -> None:
    lengths = np.random.default_rng(0).lognormal([4.0, 3.0], 0.7, size=(20_000, 2)).astype(int).clip(1)
    bound = (np.minimum(lengths, (512, 240)).sum(axis=0) / (512, 240)).max()
    plan = plan_examples(lengths, 512, 240, seed=1)
    assert plan.num_rows < 1.03 * bound
    again, other = plan_examples(lengths, 512, 240, seed=1), plan_examples(lengths, 512, 240, seed=2)
    assert np.array_equal(plan.order, again.order)
    assert np.array_equal(plan.bounds, again.bounds)
    assert not np.array_equal(plan.order, other.order)


def test_unpacked_examples_have_a_row_each() -> None:
    plan = plan_examples(np.full((5, 2), 3), 64, 32, seed=0, pack=False)
    assert [len(plan.examples(row)) for row in range(plan.num_rows)] == [1] * 5
