"""Denoisers: what part of a window of text the model must restore, in NumPy.

A *span* denoiser hides `spans` random runs of tokens: each leaves a sentinel in the inputs, and the targets list the
sentinels with what they hide. A *prefix* denoiser gives the first part of the window and asks for the rest.

    window          a b c d e f g
    span inputs     [MODE] a <0> d e <1> EOS        targets  <0> b c <1> f g EOS
    prefix inputs   [MODE] a b c d e EOS            targets  f g EOS

Lengths always count the EOS of either side and the mode token. Their arithmetic (counts from rounded rates) is that of
T5's span corruption (Raffel et al. 2020, appendix C.2; google-research/text-to-text-transfer-transformer). Spans are
placed otherwise: any set of gaps between kept tokens is equally likely, so a window may begin with a span and need not
end with one, and a single span falls anywhere.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from vikhr_t5.errors import UserError, nearest

if TYPE_CHECKING:
    from vikhr_t5.data.vocabulary import AnyVocabulary

IntArray = np.ndarray[Any, np.dtype[np.int32]]


@dataclass(frozen=True)
class Denoiser:
    """One way to corrupt a window.

    Attributes:
        name: names its loss in the metrics; unique in a mixture.
        kind: "span" or "prefix".
        rate: the share of a window's tokens that moves to the targets, in (0, 1).
        mean_span: tokens in a span on average, >= 1; None for a prefix.
        mode: the mode token put first in the inputs, or None.
        weight: the denoiser's share of the mixture's input tokens (UL2 fills the inputs of every example, so there it
            is the share of examples too).
        random_split: a prefix that ends anywhere, each point equally likely (UL2R), instead of at 1 - rate. `rate` is
            then the mean, and lengths are those of a fixed split: see `drawn`.

    Raises:
        UserError: on values outside the above.
    """

    name: str
    kind: str
    rate: float
    mean_span: float | None = None
    mode: str | None = None
    weight: float = 1.0
    random_split: bool = False

    def __post_init__(self) -> None:
        def refuse(reason: str) -> None:
            raise UserError(f"denoiser {self.name!r}: {reason}")

        if self.kind not in ("span", "prefix"):
            refuse(f'kind is {self.kind!r}; use "span" or "prefix"')
        if not 0 < self.rate < 1:
            refuse(f"rate is {self.rate}; it must lie between 0 and 1")
        if self.kind == "span" and (self.mean_span is None or self.mean_span < 1):
            refuse(f"mean_span is {self.mean_span}; a span denoiser needs a mean span of at least 1 token")
        if self.kind == "prefix" and self.mean_span is not None:
            refuse("mean_span belongs to span denoisers; leave it out")
        if self.random_split and self.kind == "span":
            refuse("random_split belongs to prefix denoisers; leave it out")
        if not self.weight > 0:
            refuse(f"weight is {self.weight}; it must be positive")

    def drawn(self, uniform: float) -> "Denoiser":
        """The denoiser with its split fixed at `uniform` in (0, 1) where the split is random, else itself."""
        return replace(self, rate=uniform, random_split=False) if self.random_split else self


class Window(NamedTuple):
    """Token counts of one corrupted window: `raw` = kept + noise; `inputs`, `targets` count EOS and the mode token."""

    raw: int
    noise: int
    spans: int
    inputs: int
    targets: int


def window(denoiser: Denoiser, raw: int, noise: int | None = None) -> Window:
    """The counts when `denoiser` corrupts `raw` >= 2 tokens.

    `noise` (1 to raw - 1) replaces round(raw * rate), to fit a length exactly or to move a prefix's split.
    A span denoiser has round(noise / mean_span) spans, at least one, and never more than fit; a prefix has none.
    """
    if raw < 2:
        raise ValueError(f"a window needs 2 tokens or more, one kept and one hidden; got {raw}")
    if noise is None:
        noise = min(max(round(raw * denoiser.rate), 1), raw - 1)
    elif not 1 <= noise < raw:
        raise ValueError(f"{noise} noise tokens in a window of {raw}")
    kept, spans = raw - noise, 0
    if denoiser.mean_span is not None:
        spans = min(max(round(noise / denoiser.mean_span), 1), noise, kept + 1)
    return Window(raw, noise, spans, (denoiser.mode is not None) + kept + spans + 1, noise + spans + 1)


@lru_cache(maxsize=4096)
def longest_window(denoiser: Denoiser, inputs_length: int, targets_length: int | None = None) -> Window:
    """The window of most raw tokens whose inputs and targets fit.

    Without `targets_length`, T5's convention: half-noise windows (rate <= 0.5) have targets no longer than the inputs.

    Raises:
        UserError: no window of at least one hidden token (before clipping) fits these lengths.
    """
    limit = targets_length if targets_length is not None else inputs_length if denoiser.rate <= 0.5 else None

    def fits(raw: int) -> bool:
        counts = window(denoiser, raw)
        return counts.inputs <= inputs_length and (limit is None or counts.targets <= limit)

    # Both lengths never fall as raw grows, so bisection finds the last that fits.
    low, high = 1, 2
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    if low < 2 or round(low * denoiser.rate) < 1 or round(low * denoiser.rate) >= low:
        sides = f"inputs {inputs_length}" + ("" if targets_length is None else f", targets {targets_length}")
        raise UserError(
            f"lengths too short for denoiser {denoiser.name!r}: {sides} hold no window with a corruption rate of"
            f" {denoiser.rate}; raise TASK_FEATURE_LENGTHS or choose another mixture"
        )
    return window(denoiser, low)


def _ul2() -> tuple[Denoiser, ...]:
    r, x = [(3, 0.15), (8, 0.15)], [(3, 0.5), (8, 0.5), (64, 0.15), (64, 0.5)]
    return (
        *(_span("R", mean, rate, "[NLU]", 0.4 / len(r)) for mean, rate in r),
        *(_span("X", mean, rate, "[NLG]", 0.4 / len(x)) for mean, rate in x),
        Denoiser("S-25", "prefix", 0.25, mode="[S2S]", weight=0.2),
    )


def _span(group: str, mean: float, rate: float, mode: str | None = None, weight: float = 1.0) -> Denoiser:
    return Denoiser(f"{group}-{mean}-{round(100 * rate)}", "span", rate, mean, mode, weight)


_FRED = [(3, 0.15), (8, 0.15), (64, 0.15), (3, 0.5), (8, 0.5), (64, 0.5)]

# Weights are relative here; `mixture` makes them add to 1.
MIXTURES: dict[str, tuple[Denoiser, ...]] = {
    # T5 (Raffel et al. 2020): the i.i.d. span corruption of T5 v1.1 and mT5.
    "span_corruption": (_span("span", 3, 0.15),),
    # UL2 (Tay et al. 2022, table 1), at the shares of the public seqio tasks.
    "ul2": _ul2(),
    # UL2R, with which U-PaLM continues a finished model (Tay et al. 2022b): 1/2 S to a random point, 1/4 R, and 1/4 X,
    # long spans or a high rate.
    "ul2r": (
        _span("R", 3, 0.15, "[NLU]", 0.25),
        _span("X", 32, 0.15, "[NLG]", 0.125),
        _span("X", 3, 0.5, "[NLG]", 0.125),
        Denoiser("S", "prefix", 0.5, mode="[S2S]", weight=0.5, random_split=True),
    ),
    # FRED-T5 (Zmitrovich et al. 2023). Its shares are not published: equal ones.
    "fred": (
        Denoiser("LM", "prefix", 0.25, mode="<LM>"),
        *(Denoiser(f"SC{i}", "span", rate, mean, f"<SC{i}>") for i, (mean, rate) in enumerate(_FRED, start=1)),
    ),
    # T5Gemma 2 (Google 2025): four span denoisers and a prefix at 1:1:1:1:4, no mode tokens.
    "t5gemma2": (
        *(_span("span", mean, rate) for mean, rate in [(3, 0.15), (12, 0.5), (32, 0.15), (32, 0.5)]),
        Denoiser("prefix-75", "prefix", 0.75, weight=4.0),
    ),
}


def mixture(spec: str | Sequence[Denoiser]) -> tuple[Denoiser, ...]:
    """A named mixture or one's own denoisers, with weights that add to 1.

    Raises:
        UserError: an unknown name, no denoiser, or two of one name.
    """
    if isinstance(spec, str):
        if spec not in MIXTURES:
            raise UserError(f"unknown denoiser mixture {spec!r}; {nearest(spec, MIXTURES)}")
        spec = MIXTURES[spec]
    names = [denoiser.name for denoiser in spec]
    if not names:
        raise UserError("a mixture of no denoisers; name one of " + ", ".join(MIXTURES) + " or list at least one")
    if doubles := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"two denoisers of one mixture are called {doubles[0]!r}; give each its own name")
    total = sum(denoiser.weight for denoiser in spec)
    return tuple(replace(denoiser, weight=denoiser.weight / total) for denoiser in spec)


def to_json(denoisers: Iterable[Denoiser]) -> dict[str, Any]:
    """A mixture as a JSON value: what a token store's manifest says of the corruption applied after it."""
    return {"transform": "denoise", "denoisers": [asdict(denoiser) for denoiser in denoisers]}


def from_json(value: Mapping[str, Any]) -> tuple[Denoiser, ...]:
    """The inverse of `to_json`. UserError when it is something else."""
    try:
        if value["transform"] != "denoise":
            raise KeyError(value["transform"])
        return tuple(Denoiser(**fields) for fields in value["denoisers"])
    except (KeyError, TypeError) as error:
        raise UserError(f"not a denoiser mixture: {value!r} ({error}); cache the task again") from error


@dataclass(frozen=True)
class Codes:
    """The ids that corruption writes. Sentinel i is `first_sentinel - i`, for i below `num_sentinels`."""

    eos: int
    first_sentinel: int
    num_sentinels: int
    modes: Mapping[str, int]

    @classmethod
    def of(cls, vocabulary: "AnyVocabulary", denoisers: Iterable[Denoiser]) -> "Codes":
        """Codes of a vocabulary; UserError when it lacks a mode token that one of `denoisers` needs."""
        modes = {denoiser.mode for denoiser in denoisers if denoiser.mode is not None}
        return cls(
            eos=vocabulary.eos_id,
            first_sentinel=vocabulary.first_sentinel,
            num_sentinels=vocabulary.num_sentinels,
            modes={mode: vocabulary.mode_id(mode) for mode in sorted(modes)},
        )

    @cached_property
    def sentinels(self) -> IntArray:
        """[num_sentinels] all sentinels in the order of use, descending."""
        return np.arange(self.first_sentinel, self.first_sentinel - self.num_sentinels, -1, dtype=np.int32)


def check(denoisers: Iterable[Denoiser], codes: Codes, inputs_length: int, targets_length: int | None) -> None:
    """Refuses, at start-up, what would go wrong inside a run.

    Raises:
        UserError: a denoiser's longest window needs more sentinels than there are (T5's own code writes pieces of text
            instead, silently), a length too short for a denoiser, or a mode token without an id.
    """
    for denoiser in denoisers:
        if denoiser.mode is not None and denoiser.mode not in codes.modes:
            raise UserError(
                f"denoiser {denoiser.name!r} needs the mode token {denoiser.mode!r}, which the vocabulary lacks:"
                " train one with it, or use a mixture without mode tokens"
            )
        counts = longest_window(denoiser, inputs_length, targets_length)
        if counts.spans > codes.num_sentinels:
            raise UserError(
                f"denoiser {denoiser.name!r} needs {counts.spans} sentinels at inputs {inputs_length}, targets"
                f" {targets_length or inputs_length}; the vocabulary has {codes.num_sentinels}: raise EXTRA_IDS or"
                " shorten the inputs"
            )


def corrupt(
    tokens: np.ndarray, denoiser: Denoiser, window: Window, rng: np.random.Generator, codes: Codes
) -> tuple[IntArray, IntArray]:
    """Corrupts one window; the result depends on the arguments alone.

    Args:
        tokens: int [window.raw] token ids without EOS.
        window: counts from `window` or `longest_window` for this denoiser.
        rng: gives the places of the spans; a prefix draws nothing (its split stands in `window`).

    Returns:
        int32 inputs [window.inputs] and targets [window.targets], both ending in EOS; the mode token comes first in the
        inputs. The k-th span, in order of text, is replaced by sentinel k.

    Raises:
        ValueError: `tokens` is not of the window's length, or the window has more spans than `codes` has sentinels.
    """
    raw, noise, spans, inputs_length, targets_length = window
    if tokens.shape != (raw,) or spans > codes.num_sentinels:
        raise ValueError(f"tokens {tokens.shape} and {codes.num_sentinels} sentinels for {window}")
    if not spans:
        inputs, targets = np.empty(inputs_length, np.int32), np.empty(targets_length, np.int32)
        inputs[-1 - (raw - noise) : -1], targets[:-1] = tokens[: raw - noise], tokens[raw - noise :]
        inputs[-1] = targets[-1] = codes.eos
        if denoiser.mode is not None:
            inputs[0] = codes.modes[denoiser.mode]
        return inputs, targets

    gaps, cuts = _spans(rng, raw - noise, noise, spans)
    mode, first = denoiser.mode, int(denoiser.mode is not None)
    in_inputs = gaps + np.arange(first, first + spans)  # places of sentinels; the targets follow the inputs in `both`
    in_targets = cuts[:-1] + np.arange(inputs_length, inputs_length + spans)
    # The index of the token that each place takes, as steps from the place before. In the inputs, leap from a span's
    # first token to its end; in the targets, over the kept tokens between spans. Indices that fall under sentinels, EOS
    # and the mode token may be off the text by one, hence "clip"; these places are overwritten.
    steps = np.ones(inputs_length + targets_length, np.int64)
    steps[0] = -first
    steps[in_inputs + 1] = cuts[1:] - cuts[:-1]
    steps[in_targets[1:]] = gaps[1:] - gaps[:-1]
    steps[inputs_length] = gaps[0] - 1 - raw
    both = tokens.take(steps.cumsum(), mode="clip").astype(np.int32, copy=False)
    both[in_inputs] = both[in_targets] = codes.sentinels[:spans]
    both[inputs_length - 1] = both[-1] = codes.eos
    if mode is not None:
        both[0] = codes.modes[mode]
    return both[:inputs_length], both[inputs_length:]


def _spans(rng: np.random.Generator, kept: int, noise: int, spans: int) -> tuple[np.ndarray, np.ndarray]:
    """Where spans lie in a text of `kept` + `noise` tokens, every arrangement equally likely.

    Returns:
        gaps: int64 [spans], ascending: kept tokens to the left of each span, out of 0 … kept, no two the same.
        cuts: int64 [spans + 1], from 0 to noise: hidden tokens to the left of each span, and of the end of the text.
    """
    while True:  # the smallest of random keys are a uniform subset; a tie at the border is drawn again
        keys = rng.random(kept + noise, dtype=np.float32)
        gaps, joints = _smallest(keys[: kept + 1], spans), _smallest(keys[kept + 1 :], spans - 1)
        if gaps.size == spans and joints.size == spans - 1:
            break
    cuts = np.empty(spans + 1, np.int64)
    cuts[0], cuts[-1] = 0, noise
    np.add(joints, 1, out=cuts[1:-1])
    return gaps, cuts


def _smallest(keys: np.ndarray, count: int) -> np.ndarray:
    """Places of the `count` smallest keys, ascending; fewer where the next key equals one of them."""
    if count >= keys.size:
        return np.arange(count)
    ordered = keys.copy()
    ordered.partition(count)
    return (keys < ordered[count]).nonzero()[0]
