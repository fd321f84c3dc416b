"""The vocabulary of ByT5: the bytes of UTF-8, with three ids before them.

Ids: 0 padding, 1 EOS, 2 unknown (no text has it), 3 … 258 the bytes 0x00 … 0xFF, then `extra_ids` sentinels with
`<extra_id_0>` the highest. `seqio.ByteVocabulary` gives the same ids for the same text and the same `extra_ids`.

Two libraries disagree on the sentinels of the released ByT5 checkpoints, and only one of them is what they were trained
on. T5's span corruption counts down from the last id of the vocabulary, which t5x's gin files make with
`extra_ids=0`: the sentinels are the ids 258, 257, …, those of the bytes 0xFF, 0xFE, … (ByT5's paper, section 3.1: "we
reuse the final 100 byte IDs"). UTF-8 never has the first eleven of them, 0xF5 … 0xFF; spans are long (20 bytes), so an
input of 1024 bytes seldom needs more. transformers' ByT5Tokenizer instead reads `<extra_id_0>`, `<extra_id_1>`, … as
259, 260, …: rows that only pad the embedding to 384 and were never trained. Here `<extra_id_0>` is 258.
"""

import hashlib
import re
from collections.abc import Iterable
from functools import cached_property

from vikhr_t5.errors import UserError

PADDED_TO = 128
OFFSET = 3  # the id of byte 0

_BYTES_END = OFFSET + 256
_BORROWED = 100  # byte ids that double as sentinels where there are no others
_NEVER_IN_UTF8 = 0x100 - 0xF5
_SENTINEL = re.compile(r"<extra_id_(0|[1-9][0-9]*)>")


class ByteVocabulary:
    """The bytes of a text as ids, with the interface of `Vocabulary`. It has no file.

    Args:
        extra_ids: number of sentinels above the bytes; with 0, ByT5's own, the highest bytes serve (see above).
    """

    pad_id = 0
    eos_id = 1
    unk_id = 2
    source = "bytes"
    mode_tokens: tuple[str, ...] = ()

    def __init__(self, extra_ids: int = 0):
        if extra_ids < 0:
            raise UserError(f"extra_ids is {extra_ids}; the number of sentinels cannot be negative")
        self.extra_ids = extra_ids

    def __repr__(self) -> str:
        return f"ByteVocabulary(extra_ids={self.extra_ids})"

    @property
    def size(self) -> int:
        """Real ids: 3, the bytes, and the sentinels."""
        return _BYTES_END + self.extra_ids

    @property
    def padded_size(self) -> int:
        """Rows of the embedding: `size` up to a multiple of 128; 384 for ByT5."""
        return -(-self.size // PADDED_TO) * PADDED_TO

    @property
    def num_sentinels(self) -> int:
        """How many sentinels corruption may use."""
        return self.extra_ids or _BORROWED

    @property
    def first_sentinel(self) -> int:
        """The id of `<extra_id_0>`, the highest real id; the others descend from it."""
        return self.size - 1

    @property
    def last_sentinel(self) -> int:
        """The lowest id that is a sentinel and can be nothing else: such are read and written as `<extra_id_i>`."""
        return self.size - (self.extra_ids or _NEVER_IN_UTF8)

    def sentinel(self, index: int) -> int:
        """The id of `<extra_id_index>`. UserError beyond the last."""
        if not 0 <= index < self.num_sentinels:
            raise UserError(f"<extra_id_{index}>: {self!r} has {self.num_sentinels} sentinels, from 0; raise EXTRA_IDS")
        return self.first_sentinel - index

    def mode_id(self, token: str) -> int:
        """UserError: bytes have no mode tokens."""
        raise UserError(
            f"mode token {token!r}: {self!r} has no mode tokens; use denoisers without them, or a SentencePiece model"
        )

    @cached_property
    def _spelled(self) -> dict[int, str]:
        """Id -> name of the sentinels that can be nothing else."""
        return {self.first_sentinel - i: f"<extra_id_{i}>" for i in range(self.size - self.last_sentinel)}

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without EOS. Sentinels written in the text become their ids, as in ByT5Tokenizer.

        (seqio spells them out in bytes, and so does what is cached by its tasks.)
        """
        ids, start = [], 0
        for match in _SENTINEL.finditer(text):
            id = self.first_sentinel - int(match[1])
            if id >= self.last_sentinel:
                ids += _of_bytes(text[start : match.start()])
                ids.append(id)
                start = match.end()
        return ids + _of_bytes(text[start:])

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; padding, EOS, unknown and what is not UTF-8 are dropped, sentinels read `<extra_id_i>`.

        Raises:
            UserError: an id >= size.
        """
        text = bytearray()
        for id in map(int, ids):
            self._check(id)
            if id in self._spelled:
                text += self._spelled[id].encode()
            elif id >= OFFSET:
                text.append(id - OFFSET)
        return text.decode("utf-8", errors="ignore")

    def piece(self, id: int) -> str:
        """One id to look at: "a", "▁" for a space, "<0xD0>" for a byte that is no letter. UserError on id >= size."""
        self._check(id)
        named = {self.pad_id: "<pad>", self.eos_id: "</s>", self.unk_id: "<unk>", OFFSET + 0x20: "▁", **self._spelled}
        byte = id - OFFSET
        return named.get(id) or (chr(byte) if 0x20 < byte < 0x7F else f"<0x{byte:02X}>")

    def _check(self, id: int) -> None:
        if not 0 <= id < self.size:
            raise UserError(f"id {id} is outside the vocabulary of {self.size} ({self!r})")

    def fingerprint(self) -> str:
        """SHA-256, in hexadecimal, of the kind and the number of sentinels: equal for equal ids."""
        return hashlib.sha256(f"bytes\0extra_ids={self.extra_ids}".encode()).hexdigest()


def _of_bytes(text: str) -> list[int]:
    return [byte + OFFSET for byte in text.encode("utf-8")]
