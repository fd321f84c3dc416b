"""Is an extended model the base, to text of old pieces? Every number is compared, and then logits are computed.

The logits come from transformers' own layers, one at a time, so that a model of 7B parameters takes the memory of a
layer and the two matrices. Nothing is rounded: the same inputs through the same layers give the same bits.
"""

import importlib.resources
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from conversion.weights import Tensor, open_weights
from vikhr_mistral import pieces
from vikhr_mistral.embeddings import Plan
from vikhr_t5.errors import UserError
from vikhr_t5.progress import Progress

if TYPE_CHECKING:
    import torch

EMBEDDING, HEAD, NORM, LAYER = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight", "model.layers."
_DISK = "write it again, and check the disk if this comes twice"
ROWS, LENGTH = 4, 64  # of text
_AT_ONCE = 2048  # rows of a matrix


def check(base: Path, extended: Path, old: Any, new: Any, plan: Plan) -> None:
    """Prints what was compared.

    Args:
        base, extended: model folders; old, new: their SentencePiece `ModelProto`s, with the plan from one to the other.

    Raises:
        UserError: a difference, and where.
    """
    before, after = open_weights(base), open_weights(extended)
    old_ids, new_ids = plan.kept_ids()
    for name in before:
        if name not in after and name == HEAD:
            continue  # tied
        left, right = before[name].read(), after[name].read()
        if name in (EMBEDDING, HEAD):
            parts = np.array_split(np.stack([old_ids, new_ids]), len(old_ids) // _AT_ONCE + 1, axis=1)
            same = all(_same(left[old_part], right[new_part]) for old_part, new_part in parts)
        else:
            same = _same(left, right)
        if not same:
            raise UserError(f"{name} was not written as it is in {base}: nothing was kept; {_DISK}")
    del left, right
    text = _old_text(old, new, plan)
    expected = compute_logits(base, before, text[:, :, 0], old_ids)
    if not np.array_equal(expected, compute_logits(extended, after, text[:, :, 1], new_ids)):
        raise UserError(f"logits of old text are not those of {base}: nothing was kept; {_DISK}")
    print(
        f"verified: {len(after)} tensors and {len(old_ids):,} rows are bitwise those of {base}; on {ROWS} × {LENGTH}"
        f" tokens of English all {expected.size:,} logits of old pieces are bitwise equal"
    )


def _same(left: np.ndarray, right: np.ndarray) -> bool:
    """Bitwise."""
    return left.shape == right.shape and np.array_equal(left.view(np.uint8), right.view(np.uint8))


def _old_text(old: Any, new: Any, plan: Plan) -> np.ndarray:
    """[ROWS, LENGTH, 2] ids of real English in both tokenizers.

    Where English is tokenized anew (replacement), the pieces of it that both have.
    """
    path = importlib.resources.files("tasks.demo_data") / "en.txt"
    english = Path(str(path)).read_text(encoding="utf-8")[:20_000]
    translated = dict(zip(*(ids.tolist() for ids in plan.kept_ids()), strict=True))
    ids = pieces.encoder(old)(english)
    if all(id in translated for id in ids) and pieces.encoder(new)(english) != [translated[id] for id in ids]:
        raise UserError(
            "the new tokenizer has every piece of an English text, and cuts it in another way: make it anew"
        )
    pairs = [(id, translated[id]) for id in ids if id in translated][: ROWS * LENGTH]
    return np.resize(np.array(pairs, np.int64), (ROWS, LENGTH, 2))


def compute_logits(folder: Path, tensors: Mapping[str, Tensor], ids: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """[ROWS, LENGTH] ids -> [ROWS, LENGTH, C] logits in float32 of the C ids in `columns`."""
    import torch
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.from_pretrained(folder)
    num_layers = config.num_hidden_layers
    # One layer at a time goes through a model of one layer, which has no embedding to speak of.
    config.num_hidden_layers, config.vocab_size = 1, 8
    config.bos_token_id = config.eos_token_id = config.pad_token_id = None
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1]
    embedding = tensors[EMBEDDING].read()
    hidden = _torch(embedding[ids])
    model = AutoModel.from_config(config, dtype=hidden.dtype).eval()
    norm, model.norm = model.norm, torch.nn.Identity()
    norm.load_state_dict({"weight": _torch(tensors[NORM].read())})
    with torch.inference_mode(), Progress(f"layers of {folder}", num_layers, unit="layers") as progress:
        for layer in range(num_layers):
            _load(model.layers[0], tensors, f"{LAYER}{layer}.")
            hidden = model(inputs_embeds=hidden, use_cache=False).last_hidden_state
            progress.advance()
        del embedding, model
        head = tensors[HEAD if HEAD in tensors else EMBEDDING].read()[columns]
        logits: np.ndarray = torch.nn.functional.linear(norm(hidden), _torch(head)).float().numpy()
    return logits


def _load(layer: "torch.nn.Module", tensors: Mapping[str, Tensor], prefix: str) -> None:
    """One tensor at a time. Old files hold the rotary frequencies, too, which the layer computes."""
    found = [name for name in tensors if name.startswith(prefix) and not name.endswith("rotary_emb.inv_freq")]
    parameters = dict(layer.named_parameters())
    if unknown := {name.removeprefix(prefix) for name in found} ^ parameters.keys():
        raise UserError(f"transformers' layer and {prefix}* differ in {', '.join(sorted(unknown))}: leave out --verify")
    for name in found:
        parameters[name.removeprefix(prefix)].copy_(_torch(tensors[name].read()))


def _torch(value: np.ndarray) -> "torch.Tensor":
    import torch

    bits = np.uint16 if value.dtype.itemsize == 2 else value.dtype
    return torch.from_numpy(value.view(bits)).view(getattr(torch, value.dtype.name))
