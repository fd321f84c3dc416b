"""Which benchmarks there are, what a result of one is, and the values that were published."""

from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple


class Benchmark(NamedTuple):
    """data: whose rows, of `benchmark_data.SCHEMAS`; metric: lm-eval's; chance: of a random choice; num_fewshot:
    examples in a prompt unless asked otherwise; None: never any."""

    data: str
    metric: str
    chance: float | None = None
    num_fewshot: int | None = None


BENCHMARKS = {
    "ru_mmlu": Benchmark("ru_mmlu", "acc", 1 / 4, 5),
    "xwinograd_ru": Benchmark("xwinograd_ru", "acc", 1 / 2, 0),
    "xwinograd_ru_seq2seq": Benchmark("xwinograd_ru", "acc", 1 / 2),
    "xnli_ru": Benchmark("xnli_ru", "acc", 1 / 3, 0),
    "xnli_ru_seq2seq": Benchmark("xnli_ru", "acc", 1 / 3),
    "translate_ru_en": Benchmark("translate", "chrf", None, 0),
    "translate_ru_en_seq2seq": Benchmark("translate", "chrf"),
    "translate_en_ru": Benchmark("translate", "chrf", None, 0),
    "translate_en_ru_seq2seq": Benchmark("translate", "chrf"),
    "perplexity_ru": Benchmark("perplexity_ru", "bits_per_byte"),
    "perplexity_ru_seq2seq": Benchmark("perplexity_ru", "bits_per_byte"),
    "perplexity_en": Benchmark("perplexity_en", "bits_per_byte"),
    "perplexity_en_seq2seq": Benchmark("perplexity_en", "bits_per_byte"),
}
DEFAULT = ("ru_mmlu", "xwinograd_ru", "xnli_ru")


def needs_encoder(name: str) -> bool:
    """Whether a formulation is one for encoder-decoders."""
    return name.endswith("_seq2seq")


@dataclass(frozen=True)
class Result:
    """One model on one benchmark.

    Attributes:
        value: accuracy, chrF (0 to 100) or bits per byte.
        stderr: its standard error over items; None where there is a single one.
        items: that were scored.
        prompts, cut: different contexts, and those that were longer than `max_length` and lost their beginning.
        parts: of ru_mmlu, its categories: {name: (value, stderr)}.
        settings: what else was set, and what was found: versions, seed, dtype, data.
        fingerprint: of model, task, rows and settings; an equal one is not computed again.
    """

    model: str
    benchmark: str
    value: float
    stderr: float | None
    items: int
    num_fewshot: int
    prompts: int
    cut: int
    max_length: int
    fingerprint: str
    parts: dict[str, tuple[float, float | None]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


class Published(NamedTuple):
    """A column that others measured: their values, as they write them, and where they do."""

    model: str
    source: str
    values: dict[str, str]


_VIKHR_T5 = "https://huggingface.co/Vikhrmodels/VikhrT5-3b"
_VIKHR_7B = "https://huggingface.co/Vikhrmodels/Vikhr-7b-0.1"
# As the cards stand; neither says how many examples were in a prompt, nor which revision of lm-eval it was.
PUBLISHED = (
    Published("VikhrT5-3b", _VIKHR_T5, {"ru_mmlu": "0.32", "xwinograd_ru": "0.71", "xnli_ru": "0.4280"}),
    Published("FRED-T5-XL (1.7b)", _VIKHR_T5, {"ru_mmlu": "0.252", "xwinograd_ru": "0.57", "xnli_ru": "0.34"}),
    Published("FLAN-T5-XL (3b)", _VIKHR_T5, {"ru_mmlu": "0.28", "xwinograd_ru": "0.52", "xnli_ru": "0.33"}),
    Published("Vikhr-7b-0.1", _VIKHR_7B, {"ru_mmlu": "0.60", "xwinograd_ru": "0.72", "xnli_ru": "0.3812"}),
    Published("Mistral-7B-v0.1", _VIKHR_7B, {"ru_mmlu": "0.66", "xwinograd_ru": "0.68", "xnli_ru": "0.3691"}),
)
