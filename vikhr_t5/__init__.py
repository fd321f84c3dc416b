"""vikhr-t5: train T5 models in JAX for Russian, or any language that English-first models tokenize badly.

`vikhr_t5.load(path)` gives a trained model to use from Python (see api.py).
"""

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vikhr_t5.api import TextModel

__version__ = "0.1.0"


def load(path: str | os.PathLike[str], **options: Any) -> "TextModel":
    """`api.load`: a model of any format, with `generate`, `fill`, `score`, `stream`. Imports JAX when it is called."""
    from vikhr_t5 import api

    return api.load(path, **options)
