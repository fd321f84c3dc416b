"""A preprocessor that leaves out of training what a model is evaluated on; what there is to leave out, is reported by
`vikhr-t5 decontaminate`.

    flan.add_task("my_flan", "me/flan", steps=[not_evaluated_on(["xnli_ru", "ru_mmlu"], data_dir="evaluation")])
"""

import functools
import os
from collections.abc import Sequence

from tasks.cleaning import Preprocessor, leave_out
from vikhr_t5.data.decontamination import NGRAM, Index, read_items


def not_evaluated_on(
    against: Sequence[str],
    data_dir: str | os.PathLike[str] | None = None,
    fields: Sequence[str] = ("inputs", "targets"),
    ngram: int = NGRAM,
    min_share: float = 0.0,
) -> Preprocessor:
    """A seqio preprocessor: without the examples that contaminate an evaluation set, counted as `in_SET`.

    The sets are read when the first example is; a set that changes does not make a cache stale.

    Args:
        against, data_dir: the sets, as in `vikhr_t5.data.decontamination.read_items`.
        fields: of an example, which together are its text: `("text",)` for documents.
        ngram, min_share: as in `vikhr_t5.data.decontamination.Index`.
    """

    @functools.cache
    def index() -> Index:
        return Index([item for name in against for item in read_items(name, data_dir)], ngram, min_share)

    def not_evaluated_on(*values: bytes) -> str | None:
        matches = index().find(" ".join(value.decode(errors="replace") for value in values))
        return f"in_{index().items[matches[0].item].set_name}" if matches else None

    return leave_out(not_evaluated_on, *fields)
