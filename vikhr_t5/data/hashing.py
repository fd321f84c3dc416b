"""A number from a text: what decides on which side of a split it falls, in every process and every version."""

import hashlib


def text_hash(text: bytes) -> float:
    """A uniform number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") / 2**64
