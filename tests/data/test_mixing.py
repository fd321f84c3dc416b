import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from vikhr_t5.data.mixing import Interleaving, apportion, permuted, spread

COUNTS = st.lists(st.integers(1, 40), min_size=1, max_size=12)


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=20), st.integers(1, 5000))
def test_apportioned_counts_add_up_and_are_off_by_less_than_one(weights: list[float], total: int) -> None:
    counts = apportion(weights, total)
    assert counts.sum() == total
    assert np.all(np.abs(counts - np.array(weights) * total / sum(weights)) < 1)


@given(COUNTS)
def test_any_prefix_holds_nearly_the_shares(counts: list[int]) -> None:
    order = spread(counts)
    seen = np.cumsum(order[:, None] == np.arange(len(counts)), axis=0)
    exact = np.arange(1, len(order) + 1)[:, None] * np.array(counts) / len(order)
    assert seen[-1].tolist() == counts
    assert np.abs(seen - exact).max() <= 1 + len(counts) / 2


@given(COUNTS, st.integers(0, 3000))
def test_interleaving_agrees_with_counting(counts: list[int], place: int) -> None:
    sequence = Interleaving(counts)
    unrolled = np.tile(sequence.cycle, place // len(sequence.cycle) + 1)
    k, before = sequence[place]
    assert k == unrolled[place]
    assert before == np.sum(unrolled[:place] == k)
    assert sequence.place(k, before) == place
    assert sequence.count(place).tolist() == [int(np.sum(unrolled[:place] == i)) for i in range(len(counts))]


@settings(max_examples=50)
@given(st.integers(1, 700), st.integers(0, 2**64))
def test_permuted_is_a_permutation(size: int, key: int) -> None:
    assert sorted(permuted(i, size, key) for i in range(size)) == list(range(size))


def test_permutations_are_uniform_and_unrelated() -> None:
    size, keys = 7, 4000
    counts = np.zeros((size, size))
    for key in range(keys):
        for i in range(size):
            counts[i, permuted(i, size, key)] += 1
    # Each cell is binomial with mean keys / size; five standard deviations are never reached by chance.
    mean = keys / size
    assert np.abs(counts - mean).max() < 5 * np.sqrt(mean * (1 - 1 / size))

    first, second = ([permuted(i, 2000, key) for i in range(2000)] for key in (8, 9))
    for a, b in ((first, range(2000)), (first, second), (first[1:], first[:-1])):
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.1
