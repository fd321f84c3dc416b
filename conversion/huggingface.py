"""Hugging Face's T5, mT5, umT5 and ByT5 folders, array by array.

Weights and configurations are read and written as files, without transformers: it ties the head to the embedding of any
T5 that it builds itself (5.x), while `from_pretrained` on files keeps both.
"""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from conversion import card, names, safetensors, tokenizer
from conversion.blocks import ahead
from conversion.huggingface_config import config_json, generation_json, read_config
from conversion.stored import DTYPES, StoredModel, WithoutOptimizer
from conversion.vikhr import Checkpoint
from conversion.weights import Tensor, open_weights
from vikhr_t5.data.vocabulary import AnyVocabulary
from vikhr_t5.errors import UserError
from vikhr_t5.files import write_json

_SHARED, _HEAD = "shared.weight", "lm_head.weight"
_COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
# In the files of the first T5 models, and used by no version of transformers.
_UNUSED = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"


class HuggingFaceModel(WithoutOptimizer):
    """A `StoredModel`: a folder with config.json and weights.

    Args:
        path: the folder.
        vocabulary: in place of the folder's own.

    Raises:
        UserError: a file is missing or damaged, the model is no T5 of ours, or its tensors are not those that its
            configuration asks for; lists them.
    """

    step = 0

    def __init__(self, path: str | os.PathLike[str], vocabulary: AnyVocabulary | None = None):
        self.folder = Path(path).expanduser().absolute()
        if not self.folder.is_dir():
            raise UserError(f"{path}: no such folder")
        tensors = open_weights(self.folder)
        self.config, ties = read_config(self.folder, _HEAD in tensors)
        self._tensors = self._settled(tensors, ties)
        wanted = {array.name: array for array in names.arrays(self.config)}
        found = {name: tensor.shape for name, tensor in self._tensors.items()}
        names.account(found, {name: array.shape for name, array in wanted.items()}, f"{self.folder}")
        self._names = {(array.ours, array.layer): array for array in wanted.values()}
        halves = {tensor.dtype.name for tensor in self._tensors.values()} == {"bfloat16"}
        self.dtype = "bfloat16" if halves else "float32"
        self.vocabulary: AnyVocabulary | None = vocabulary or tokenizer.read(self.folder)

    def _settled(self, tensors: dict[str, Tensor], ties: bool) -> dict[str, Tensor]:
        """Each tensor once: copies of the embedding are left out if they are copies."""
        tensors = {name: tensor for name, tensor in tensors.items() if name != _UNUSED}
        copies = [name for name in (_SHARED, *_COPIES) if name in tensors]
        if copies:
            tensors[_SHARED] = tensors.pop(copies[0])
        tied = self.config.logits_via_embedding
        for name in [name for name in (*copies[1:], *([_HEAD] if tied else [])) if name in tensors]:
            if not np.array_equal(tensors.pop(name).read(), tensors[_SHARED].read()):
                raise UserError(
                    f"{self.folder}: {name} is not {_SHARED}, though config.json says that they are one:"
                    " set tie_word_embeddings (and scale_decoder_outputs) there to false if the model has its own"
                )
        if ties and not tied and _HEAD not in tensors and copies:
            tensors[_HEAD] = tensors[_SHARED]  # one matrix that does not scale: the same as two
        return tensors

    def read(self, name: str, layer: int | None = None) -> np.ndarray:
        array = self._names[name, layer]
        value = self._tensors[array.name].read()
        if value.dtype == np.float16 or (self.dtype == "float32" and value.dtype != np.float32):
            value = value.astype(np.float32)
        return value.T if array.transpose else value


def write(
    model: StoredModel,
    folder: Path,
    dtype: str,
    max_shard_size: int,
    name: str,
    advance: Callable[[int], None] = lambda count: None,
    license: str | None = None,
) -> None:
    """Writes what `transformers` loads: `T5ForConditionalGeneration.from_pretrained` and `AutoTokenizer`.

    Args:
        folder: does not exist yet; the caller renames it into place. Safetensors (with an index above
            `max_shard_size`), config.json, generation_config.json, the tokenizer's files, and README.md, a model card.
        dtype: of the stored weights, "float32" or "bfloat16" (half precision overflows in T5's feed-forward output).
        max_shard_size: bytes.
        name, license: of the model, in its card.
        advance: called with the bytes of each array once it is written.

    Raises:
        UserError: Hugging Face's T5 cannot express the model; it has no vocabulary, or one that its embedding is too
            small for. The line says which, and the way out.
    """
    config = model.config
    if model.vocabulary is None:
        raise UserError("the source carries no vocabulary, and a Hugging Face model needs one: give --vocabulary")
    rows, size = config.known_vocab_size(), model.vocabulary.size
    if rows < size:
        raise UserError(
            f"the embedding has {rows} rows and {model.vocabulary!r} needs {size}:"
            " the model was trained with another vocabulary"
        )
    configuration = config_json(config, dtype)
    folder.mkdir()
    tokenizer.write(model.vocabulary, folder)
    write_json(folder / "config.json", configuration)
    write_json(folder / "generation_config.json", generation_json(rows, size))
    recipe = card.recipe(model.folder, model.step) if isinstance(model, Checkpoint) else ""
    text = card.text(model, model.vocabulary, dtype, name, license, recipe)
    (folder / "README.md").write_text(text, encoding="utf-8")
    shapes = {array.name: array.shape for array in names.arrays(config)}
    arrays = ahead(names.to_huggingface(model))
    safetensors.write_sharded(folder, shapes, arrays, DTYPES[dtype], max_shard_size, advance)
