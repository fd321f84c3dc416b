"""What a task takes from the run: the vocabulary and the data folder, by environment variables.

seqio registers tasks when their module is imported, before any argument can reach them. The commands of vikhr-t5 set
these variables from the gin macros; whoever imports the tasks elsewhere (real t5x, a notebook) sets them first.

    VIKHR_T5_VOCABULARY   path of a SentencePiece model, or "bytes"   gin: VOCABULARY_FILE
    VIKHR_T5_EXTRA_IDS    number of sentinels                         gin: EXTRA_IDS (300; bytes: 0, as in ByT5)
    VIKHR_T5_DATA_DIR     folder of the corpora                       (none: the tasks that need it say so)
"""

import os
from pathlib import Path

import seqio

from vikhr_t5.errors import UserError

VOCABULARY, EXTRA_IDS, DATA_DIR = "VIKHR_T5_VOCABULARY", "VIKHR_T5_EXTRA_IDS", "VIKHR_T5_DATA_DIR"


def vocabulary() -> seqio.SentencePieceVocabulary | seqio.ByteVocabulary:
    """The run's vocabulary; its file is read at first use, so it need not exist yet.

    Raises:
        UserError: VIKHR_T5_VOCABULARY is not set, or VIKHR_T5_EXTRA_IDS is no number.
    """
    path = os.environ.get(VOCABULARY)
    if not path:
        raise UserError(f"no vocabulary: set {VOCABULARY} to a SentencePiece model (in gin: VOCABULARY_FILE)")
    extra_ids = os.environ.get(EXTRA_IDS, "0" if path == "bytes" else "300")
    if not extra_ids.isdigit():
        raise UserError(f"{EXTRA_IDS}={extra_ids!r} is no number of sentinels (in gin: EXTRA_IDS)")
    if path == "bytes":
        return seqio.ByteVocabulary(int(extra_ids))
    return seqio.SentencePieceVocabulary(path, extra_ids=int(extra_ids))


def output_features() -> dict[str, seqio.Feature]:
    """`inputs` and `targets` of the run's vocabulary, each ending in EOS."""
    return {name: seqio.Feature(vocabulary(), add_eos=True) for name in ("inputs", "targets")}


def data_dir() -> Path:
    """The folder of the corpora. UserError when VIKHR_T5_DATA_DIR is not set or names no folder."""
    path = os.environ.get(DATA_DIR)
    if not path or not os.path.isdir(path):
        raise UserError(f"{DATA_DIR}={path!r} is no folder: set it to the folder of your corpora")
    return Path(path)
