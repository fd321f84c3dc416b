"""Which windows or examples share a row, so that inputs and targets are both full.

S inputs length, T targets length, D denoisers, P parts, K templates, N rows in a cycle, E examples, R rows.

**Windows.** A denoiser fixes the ratio of targets to inputs: about 0.2 when it hides 15% of the text, 1 when it hides
half. A row of 512/240 that holds one such window is empty somewhere. But two windows of lengths x and y, of ratios
a < T/S < b, with x + y = S and a·x + b·y = T fill both sides, and at T = S · (mean ratio of the mixture) such pairs can
be drawn so often that every denoiser has exactly its share of input tokens (a transportation problem). So a *plan* is a
list of *templates* (one window, or two) and how often each is used; a linear programme finds the fewest rows that give
the shares. It does not depend on the text: row r takes the next `raw` tokens of the token store, whatever they are, and
where it starts is arithmetic.

**Examples** of supervised tasks have the lengths they have: first-fit over a random order, computed once.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import permutations
from typing import NamedTuple

import numpy as np
from scipy.optimize import linprog, nnls

from vikhr_t5.data.denoisers import Denoiser, Window, longest_window, window
from vikhr_t5.data.mixing import IntArray, Interleaving, apportion

CYCLE = 1 << 14  # rows after which the sequence of templates repeats; a share is met to about 1/CYCLE
STRATA = 16  # split points that stand for a random split
SHORTEST = 16  # raw tokens below which a window is not worth a place in a pair
OPEN_ROWS = 256  # rows that first-fit keeps open
EXAMPLES_PER_LANE = 8192  # at least; the last rows of a lane are less full


class Part(NamedTuple):
    """A denoiser as the planner sees it: `owner` is its index in the mixture; a random split has STRATA parts."""

    owner: int
    denoiser: Denoiser


@dataclass(frozen=True)
class Template:
    """One way to fill a row: (part, window) one after another."""

    windows: tuple[tuple[Part, Window], ...]

    @cached_property
    def raw(self) -> int:
        """Tokens of text that a row takes."""
        return sum(counts.raw for _, counts in self.windows)


@dataclass(frozen=True)
class WindowPlan:
    """The rows of a denoised task. Templates follow one another in a cycle of N rows and `starts[N]` tokens of text.

    Attributes:
        denoisers: [D] the mixture.
        lengths: (S, T).
        templates: [K], those that are used.
        order: the template of each row.
        starts: int64 [N+1] tokens of text before each row of a cycle.
    """

    denoisers: tuple[Denoiser, ...]
    lengths: tuple[int, int]
    templates: tuple[Template, ...]
    order: Interleaving
    starts: IntArray

    def num_rows(self, num_tokens: int) -> int:
        """Whole rows that `num_tokens` tokens of text give."""
        cycles, rest = divmod(num_tokens, int(self.starts[-1]))
        return cycles * CYCLE + int(np.searchsorted(self.starts, rest, side="right")) - 1

    def locate(self, row: int) -> tuple[int, int]:
        """The index of the row's template, and the token of text that it starts at."""
        cycles, place = divmod(row, CYCLE)
        return int(self.order.cycle[place]), cycles * int(self.starts[-1]) + int(self.starts[place])

    @cached_property
    def totals(self) -> np.ndarray:
        """int64 [D, 4] what each denoiser has in one cycle: windows, raw tokens, input tokens, target tokens."""
        totals = np.zeros((len(self.denoisers), 4), np.int64)
        for template, count in zip(self.templates, self.order.counts, strict=True):
            for part, counts in template.windows:
                totals[part.owner] += count * np.array([1, counts.raw, counts.inputs, counts.targets])
        return totals

    @property
    def shares(self) -> np.ndarray:
        """[D] measured share of input tokens of each denoiser; nominal is its weight."""
        return self.totals[:, 2] / self.totals[:, 2].sum()

    @property
    def fill(self) -> tuple[float, float]:
        """Share of positions that hold tokens, (inputs, targets)."""
        inputs, targets = self.totals[:, 2:].sum(axis=0) / CYCLE / self.lengths
        return float(inputs), float(targets)

    @property
    def windows_per_row(self) -> float:
        """Mean number of windows in a row."""
        return float(self.totals[:, 0].sum() / CYCLE)


def plan_windows(
    denoisers: Sequence[Denoiser], inputs_length: int, targets_length: int, pack: bool = True
) -> WindowPlan:
    """The plan of fewest rows in which every denoiser has its weight as its share of input tokens.

    Args:
        denoisers: a mixture; the weights add to 1.
        inputs_length: S.
        targets_length: T.
        pack: False for one window in a row, as long as fits.

    Raises:
        UserError: a length is too short for a denoiser.
    """
    parts = [part for owner, denoiser in enumerate(denoisers) for part in _parts(owner, denoiser)]
    templates = [Template(((part, longest_window(part.denoiser, inputs_length, targets_length)),)) for part in parts]
    if pack:
        for low, high in permutations(parts, 2):
            pair = _fit_pair(low.denoiser, high.denoiser, inputs_length, targets_length)
            if pair is not None:
                templates.append(Template(((low, pair[0]), (high, pair[1]))))
    inputs = np.zeros((len(parts), len(templates)))
    for column, template in enumerate(templates):
        for part, counts in template.windows:
            inputs[parts.index(part), column] += counts.inputs / inputs_length
    rows = apportion(_frequencies(inputs, np.array([part.denoiser.weight for part in parts])), CYCLE)
    used = np.flatnonzero(rows)
    chosen = tuple(templates[k] for k in used)
    order = Interleaving(rows[used])
    starts = np.concatenate([[0], np.cumsum(np.array([template.raw for template in chosen])[order.cycle])])
    return WindowPlan(tuple(denoisers), (inputs_length, targets_length), chosen, order, starts)


def _parts(owner: int, denoiser: Denoiser) -> list[Part]:
    """A random split as fixed ones, evenly spaced; each has the same share of the *text*, so 1 - rate of the inputs."""
    if not denoiser.random_split:
        return [Part(owner, denoiser)]
    rates = (np.arange(STRATA) + 0.5) / STRATA
    weights = denoiser.weight * (1 - rates) / np.sum(1 - rates)
    fixed = [denoiser.drawn(float(rate)) for rate in rates]
    return [Part(owner, replace(part, weight=float(weight))) for part, weight in zip(fixed, weights, strict=True)]


def _frequencies(inputs: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """[K] how often to use each template: inputs [P, K] @ frequencies = shares, with the smallest sum.

    Fewest rows for given input tokens is least waste on both sides at once. Of the many solutions as good as the best,
    the most even one is taken, so that a denoiser meets many partners and thereby windows of many lengths.
    """
    best = linprog(np.ones(inputs.shape[1]), A_eq=inputs, b_eq=shares, method="highs").fun
    firm = 1e4  # weight of what must hold against what is wished
    system = np.vstack([firm * inputs, np.full((1, inputs.shape[1]), firm), np.eye(inputs.shape[1])])
    wanted = np.concatenate([firm * shares, [firm * best], np.zeros(inputs.shape[1])])
    return nnls(system, wanted)[0]


def _fit_pair(low: Denoiser, high: Denoiser, inputs_length: int, targets_length: int) -> tuple[Window, Window] | None:
    """Windows of the two that together fill both sides to the last token, or None where their ratios do not allow it.

    `low` gives fewer targets for its inputs than the row, `high` more. Among the lengths that fit, those are taken
    whose noise is nearest to the nominal rates: off by a token at most, or 1%.
    """
    longest = inputs_length + targets_length

    def partner(raw: int) -> int:
        """Raw tokens of the longest `high` window that fits beside `raw` tokens of `low`."""
        left = inputs_length - window(low, raw).inputs
        return bisect_right(range(2, longest), left, key=lambda other: window(high, other).inputs) + 1

    def excess(raw: int) -> int:
        return window(low, raw).targets + window(high, partner(raw)).targets - targets_length

    # The longer `low`, the fewer targets: the row is full on both sides where the excess changes sign.
    most = bisect_left(range(SHORTEST, longest), True, key=lambda raw: partner(raw) < SHORTEST)
    lengths = range(SHORTEST, SHORTEST + most)
    if not lengths or excess(lengths[0]) < 0 or excess(lengths[-1]) > 0:
        return None
    crossing = lengths[0] + bisect_left(lengths, 0, key=lambda raw: -excess(raw))
    best, least = None, np.inf
    for raw in range(max(lengths[0], crossing - 24), min(lengths[-1], crossing + 24) + 1):
        first = window(low, raw)
        second = _exact(high, inputs_length - first.inputs, targets_length - first.targets)
        if second is None:
            continue
        off = [abs(first.noise - first.raw * low.rate), abs(second.noise - second.raw * high.rate)]
        if off[1] <= max(1, 0.01 * second.noise) and sum(off) < least:
            best, least = (first, second), sum(off)
    return best


def _exact(denoiser: Denoiser, inputs_length: int, targets_length: int) -> Window | None:
    """The window of exactly these lengths, with whatever noise that takes; None where there is none."""
    ample = inputs_length + 2 * targets_length  # enough kept tokens that every span finds a gap
    noise = 1 + bisect_left(range(1, targets_length), targets_length, key=lambda n: window(denoiser, ample, n).targets)
    raw = ample + inputs_length - window(denoiser, ample, noise).inputs
    if raw <= noise:
        return None
    found = window(denoiser, raw, noise)
    return found if (found.inputs, found.targets) == (inputs_length, targets_length) else None


@dataclass(frozen=True)
class ExamplePlan:
    """The rows of a supervised task: row r holds the examples `order[bounds[r]:bounds[r + 1]]`.

    Attributes:
        order: int64 [E] every example once.
        bounds: int64 [R+1].
    """

    order: IntArray
    bounds: IntArray

    @property
    def num_rows(self) -> int:
        """R."""
        return len(self.bounds) - 1

    def examples(self, row: int) -> list[int]:
        """The indices of a row's examples."""
        return self.order[self.bounds[row] : self.bounds[row + 1]].tolist()


def plan_examples(
    lengths: np.ndarray, inputs_length: int, targets_length: int, seed: int, pack: bool = True
) -> ExamplePlan:
    """Packs examples by first-fit, in a random order, into whichever of the open rows has room on both sides.

    Lanes of `EXAMPLES_PER_LANE` examples are packed apart, into rows of their own, so that NumPy places one example of
    each lane at a time: a million examples take half a second.

    Args:
        lengths: int [E, 2] input and target tokens of each example; what is over the row's length will be trimmed.
        inputs_length: S.
        targets_length: T.
        seed: of the order.
        pack: False for one example in a row.
    """
    order = np.random.default_rng(seed).permutation(len(lengths))
    if not pack:
        return ExamplePlan(order, np.arange(len(order) + 1))
    limits = np.array([inputs_length, targets_length], np.int32)
    needed = np.minimum(lengths, limits)[order].astype(np.int32)
    lanes = max(1, len(order) // EXAMPLES_PER_LANE)
    inputs_left, targets_left = np.full((2, lanes, OPEN_ROWS), -1, np.int32)
    rows = np.zeros(lanes, np.int64)  # that each lane has opened
    row_of = np.empty(len(order), np.int64)  # the row of each example, counted in its lane
    for start in range(0, len(order), lanes):
        inputs, targets = needed[start : start + lanes].T
        lane = np.arange(len(inputs))
        fits = (inputs_left[: len(lane)] >= inputs[:, None]) & (targets_left[: len(lane)] >= targets[:, None])
        slot = fits.argmax(axis=1)
        full = lane[~fits[lane, slot]]
        slot[full] = rows[full] % OPEN_ROWS  # a new row takes the place of the oldest open one
        inputs_left[full, slot[full]], targets_left[full, slot[full]] = limits
        rows[full] += 1
        inputs_left[lane, slot] -= inputs
        targets_left[lane, slot] -= targets
        newest = rows[lane] - 1
        row_of[start : start + lanes] = newest - (newest - slot) % OPEN_ROWS  # the last row that took this place
    row_of += (np.cumsum(rows) - rows)[np.arange(len(order)) % lanes]
    by_row = np.argsort(row_of, kind="stable")
    return ExamplePlan(order[by_row], np.searchsorted(row_of[by_row], np.arange(rows.sum() + 1)))
