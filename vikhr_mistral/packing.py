"""Documents -> packed rows whose documents do not see each other.

A row is a dictionary of int arrays [L]:

    input_ids       tokens of one document after another
    position_ids    0, 1, 2, … in each piece of a document: what transformers reads the boundaries from
    targets         the next token of the same document; -100 where there is none, or where it carries no loss
    source_ids      which source the token comes from (for metrics)
    anchored        1 where a loss that needs both tokenizers to agree may be applied (see `anchoring`)

For documents `1 11 12 2` and `1 21 22 23 2` and L = 6:

    input_ids     1  11  12   2 |  1  21      22  23   2 | …
    position_ids  0   1   2   3 |  0   1       0   1   2 | …
    targets      11  12   2 -100| 21  22      23   2 -100| …

A document that is cut goes on in the next row, without what came before; its token at the cut still is a target, of
the row before. So each token is read once, and each is a target once, but for the first of a document.

transformers (5.x) finds the boundaries where a position is not the one before plus one, and builds a block-diagonal
causal mask: for SDPA, eager and flex attention only if there is no `attention_mask` and no cache, and for
FlashAttention only if the batch is one row. `Collator` gives each what it needs.

Letters: L row length, B rows, D documents.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from vikhr_mistral.corpus import TokenizedCorpus
from vikhr_t5.data.mixing import Interleaving, apportion
from vikhr_t5.data.packing import plan_examples
from vikhr_t5.errors import UserError

IGNORED = -100  # in place of a target, or label: no loss; as torch's cross-entropy has it
CYCLE = 1000  # rows after which the order of sources repeats; a share is exact in each cycle
Row = dict[str, np.ndarray]


class DocumentRows:
    """The endless stream of a corpus's documents, in a new order in each epoch, cut into rows without any padding.

    Row r is the r-th L tokens of the stream; it depends on nothing but the seed and r.

    Args:
        corpus: [D] documents.
        length: L.
        seed: of the orders.
        source_id: written into the rows.
    """

    def __init__(self, corpus: TokenizedCorpus, length: int, seed: int, source_id: int = 0):
        self.corpus, self.length, self.seed, self.source_id = corpus, length, seed, source_id
        self.total = len(corpus.tokens)
        # Per instance, and not pickled into a worker process's copy of another instance.
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_epoch"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)

    @property
    def rows_per_epoch(self) -> float:
        return self.total / self.length

    def __getitem__(self, row: int) -> Row:
        pieces, left, at = [], self.length, row * self.length
        while left:
            epoch, offset = divmod(at, self.total)
            piece = self._piece(epoch, offset, left)
            pieces.append(piece)
            left -= len(piece["input_ids"])
            at += len(piece["input_ids"])
        return _join(pieces)

    def _make_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(order [D], where in the epoch each document of the order ends [D])."""
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.corpus.ends))
        lengths = np.diff(self.corpus.ends, prepend=0)
        return order, np.cumsum(lengths[order])

    def _piece(self, epoch: int, offset: int, most: int) -> Row:
        """At most `most` tokens of the document that stands at `offset`."""
        order, ends = self._epoch(epoch)
        place = int(np.searchsorted(ends, offset, side="right"))
        document, left = int(order[place]), int(ends[place]) - offset
        stop = int(self.corpus.ends[document])
        start = stop - left
        size = min(left, most)
        ids = self.corpus.tokens[start : min(start + size + 1, stop)].astype(np.int64)
        anchored = self.corpus.alike is not None and bool(self.corpus.alike[document])
        return _piece(ids[:size], np.append(ids[1:], IGNORED)[:size], self.source_id, anchored)


class MixedRows:
    """Rows of several sources in exact shares: the dataset of a run. Row i depends on the seed and i alone.

    Args:
        sources: each with a share; shares are of rows, hence of tokens.
        shares: positive; they need not add to 1.
        num_rows: of the run.
    """

    def __init__(self, sources: Sequence[DocumentRows], shares: Sequence[float], num_rows: int):
        if min(shares) <= 0:
            raise UserError(f"shares of corpora are above 0, and these are {list(shares)}")
        self.sources, self.num_rows = sources, num_rows
        counts = apportion(shares, CYCLE)
        if counts.min() == 0:
            raise UserError(f"a share below 1 in {CYCLE} of the rows is not met: {list(shares)}")
        self._order = Interleaving(counts // np.gcd.reduce(counts))

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, i: int) -> Row:
        source, row = self._order[i]
        return self.sources[source][row]


class ExampleRows:
    """Whole examples (of instructions), several in a row, first-fit; a row's rest is padding.

    Args:
        examples: {"input_ids": [n], "labels": [n]} each, `labels` as in transformers: the token itself where it
            carries loss, else -100. `source_id` is optional.
        length: L; an example that is longer is refused.
        seed: of the order. Row r of epoch e is row e · rows + r.
        pad_id: what fills a row.
        num_rows: of the run; by default one epoch.
        pack: False for one example in a row.

    Raises:
        UserError: an example is longer than a row.
    """

    def __init__(
        self,
        examples: Sequence[dict[str, Any]],
        length: int,
        seed: int,
        pad_id: int = 0,
        num_rows: int | None = None,
        pack: bool = True,
    ):
        self.examples, self.length, self.seed, self.pad_id, self.pack = examples, length, seed, pad_id, pack
        lengths = np.array([len(example["input_ids"]) for example in examples])
        if not len(lengths):
            raise UserError("no example to train on")
        if lengths.max() > length:
            raise UserError(
                f"example {int(lengths.argmax())} has {lengths.max()} tokens, and a row {length}; cut it first"
            )
        self._lengths = np.stack([lengths, lengths], axis=1)
        self.rows_per_epoch = self._plan(0).num_rows
        self.num_rows = num_rows or self.rows_per_epoch

    def _plan(self, epoch: int) -> Any:
        cached = getattr(self, "_cached", None)
        if cached is None or cached[0] != epoch:
            plan = plan_examples(self._lengths, self.length, self.length, self.seed + epoch, self.pack)
            self._cached = cached = (epoch, plan)
        return cached[1]

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, i: int) -> Row:
        epoch = 0
        while i >= self._plan(epoch).num_rows:  # first-fit may take another number of rows in another order
            i -= self._plan(epoch).num_rows
            epoch += 1
        pieces = []
        for k in self._plan(epoch).examples(i):
            example = self.examples[k]
            labels = np.asarray(example["labels"], np.int64)
            ids = np.asarray(example["input_ids"], np.int64)
            pieces.append(_piece(ids, np.append(labels[1:], IGNORED), example.get("source_id", 0), False))
        rest = self.length - sum(len(piece["input_ids"]) for piece in pieces)
        if rest:
            pieces.append(_piece(np.full(rest, self.pad_id), np.full(rest, IGNORED), 0, False))
        return _join(pieces)


def _piece(ids: np.ndarray, targets: np.ndarray, source_id: int, anchored: bool) -> Row:
    return {
        "input_ids": ids,
        "position_ids": np.arange(len(ids)),
        "targets": targets,
        "source_ids": np.full(len(ids), source_id),
        "anchored": np.full(len(ids), int(anchored)),
    }


def _join(pieces: Sequence[Row]) -> Row:
    return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}


class Collator:
    """B rows -> tensors [B, L], or [1, B·L] for FlashAttention, which finds packed documents in a single row only.

    There is no attention_mask: with one, transformers does not look for packed documents.
    """

    def __init__(self, attention: str = "sdpa"):
        self.flatten = "flash" in attention

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        import torch

        batch = {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]}
        return {name: value.reshape(1, -1) for name, value in batch.items()} if self.flatten else batch
