"""Adapter and base -> plain Hugging Face weights, one tensor in memory at a time.

The result has the base's files, shard by shard, in the base's dtypes; the sums are computed in float32. What an adapter
of peft may hold, and what becomes of a weight W [out, in]:

    lora_A [r, in], lora_B [out, r]        W + s·B·A, s = alpha/r, or alpha/√r with use_rslora
    lora_embedding_A [r, V], _B [D, r]     W + s·(B·A)ᵀ
    modules_to_save, base_layer            the saved weight in place of W
    trainable_tokens_delta [n, D]          the saved rows in place of those of trainable_token_indices (token_indices)

All of the adapter is accounted for: what is something else, or finds no weight of its shape in the base, is refused.
"""

import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from conversion.weights import SAFETENSORS, Tensor, open_weights, read_safetensors
from vikhr_mistral import fingerprint
from vikhr_t5.errors import UserError
from vikhr_t5.files import atomic_path
from vikhr_t5.outputs import check_output
from vikhr_t5.progress import Progress

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
# Initialisations that peft subtracts from the base before training: the adapter's base is then in no file.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_ELSEWHERE = "merge it with peft's merge_and_unload"
_LORA = re.compile(r"(.+)\.lora_(embedding_)?([AB])(\.weight)?")
_BENEATH = ".base_layer.weight"
_ROWS = re.compile(r"(.+?)(\.token_adapter)?\.trainable_tokens_delta")


class Adapter(NamedTuple):
    """A folder of peft: its settings, and its tensors by their names in the base model."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]


class Change(NamedTuple):
    """What an adapter does to one weight of the base.

    weight: its name.
    shape: it must have; None for any number of rows from `rows` on.
    apply: the weight in float32, which it may overwrite -> the merged one.
    """

    weight: str
    shape: tuple[int | None, ...]
    rows: int
    apply: Callable[[np.ndarray], np.ndarray]

    def fits(self, shape: tuple[int, ...]) -> bool:
        same = len(shape) == len(self.shape) and all(a in (None, b) for a, b in zip(self.shape, shape, strict=True))
        return same and shape[0] >= self.rows


def merge(
    adapter_dir: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    base_dir: str | os.PathLike[str] | None = None,
) -> None:
    """Writes the model folder `output_dir`, whole or not at all: weights, config.json, and the adapter's tokenizer, or
    the base's where it has none.

    Args:
        adapter_dir: what `pretrain` or `instruct` wrote, or peft's `save_pretrained`.
        output_dir: replaced if it is a model.
        base_dir: the base model's folder (default: the one that the adapter names).

    Raises:
        UserError: no such folder, a file that is not whole, an adapter of another base (by fingerprint or shapes),
            or of a kind that is not merged here.
    """
    adapter = read_adapter(Path(adapter_dir))
    base = Path(base_dir or adapter.config.get("base_model_name_or_path") or "")
    if not base_dir and not (base / "config.json").is_file():
        raise UserError(f"{adapter_dir} names the base {str(base)!r}, which is no folder here: give it with --base")
    output = Path(output_dir)
    for source in (adapter.folder, base):
        if output.exists() and source.exists() and output.samefile(source):
            raise UserError(f"{output} is where the adapter or its base lies: give another folder for the result")
    check_output(output, "config.json")
    tensors = open_weights(base)
    changes = fitting_changes(adapter, tensors, base)
    fingerprint.check(adapter.folder, base)
    with atomic_path(output) as temporary:
        temporary.mkdir()
        _write_weights(base, temporary, tensors, changes)
        _copy_others(base, adapter.folder, temporary)


def read_adapter(folder: Path) -> Adapter:
    """The settings and tensors of an adapter. UserError where it is none, or of a kind that is not merged here."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        kind = config["peft_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} is no adapter ({CONFIG}: {type(error).__name__}: {error})") from None
    if kind not in ("LORA", "TRAINABLE_TOKENS"):
        raise UserError(
            f"{folder} is an adapter of the kind {kind}; LORA and TRAINABLE_TOKENS are merged here: {_ELSEWHERE}"
        )
    start = config.get("init_lora_weights")
    changed = isinstance(start, str) and start.startswith(_CHANGES_BASE)
    for name, refused in (
        (f"init_lora_weights={start}", changed),
        ("fan_in_fan_out", config.get("fan_in_fan_out")),
        ("alora_invocation_tokens", config.get("alora_invocation_tokens")),
    ):
        if refused:
            raise UserError(f"{folder}: an adapter with {name} is not merged here: {_ELSEWHERE}")
    tensors = {name.removeprefix(_PREFIX): tensor for name, tensor in read_safetensors(folder / WEIGHTS).items()}
    return Adapter(folder, config, tensors)


def fitting_changes(adapter: Adapter, base: Mapping[str, Tensor], base_dir: Path) -> dict[str, list[Change]]:
    """The changes of each weight. UserError where the base has no such weight, or one of another shape."""
    found: dict[str, list[Change]] = {}
    for change in changes_of(adapter):
        if change.weight not in base:
            raise UserError(f"{adapter.folder} is of another base: {base_dir} has no {change.weight}")
        has = base[change.weight].shape
        if not change.fits(has):
            wanted = " × ".join(str(n or f"at least {change.rows}") for n in change.shape)
            raise UserError(
                f"{adapter.folder} is of another base: it changes {change.weight} of {wanted}, and in {base_dir} that"
                f" is {' × '.join(map(str, has))}"
            )
        found.setdefault(change.weight, []).append(change)
    return found


def changes_of(adapter: Adapter) -> Iterator[Change]:
    """What each tensor of an adapter changes. UserError for one that is not known here."""
    saved = adapter.config.get("modules_to_save") or ()
    # peft saves the layer beneath an adapter of the embeddings, too: it is put in place before the adapter is added.
    for name, tensor in sorted(adapter.tensors.items(), key=lambda item: not item[0].endswith(_BENEATH)):
        module = name.removesuffix(".weight")
        if found := _LORA.fullmatch(name):
            partner = f"{found[1]}.lora_{found[2] or ''}{'B' if found[3] == 'A' else 'A'}{found[4] or ''}"
            if partner not in adapter.tensors:
                raise UserError(f"{adapter.folder / WEIGHTS} has {name} and no {partner}: copy it again")
            if found[3] == "A":
                yield _low_rank(adapter, found[1], tensor, adapter.tensors[partner], bool(found[2]))
        elif found := _ROWS.fullmatch(name):
            yield _rows(adapter, found[1], tensor)
        elif name.endswith(_BENEATH) or (name != module and module.split(".")[-1] in saved):
            yield Change(name.replace(_BENEATH, ".weight"), tensor.shape, 0, lambda _, tensor=tensor: tensor.read())  # type: ignore[misc]
        else:
            raise UserError(f"{adapter.folder / WEIGHTS} holds {name}, which is not merged here: {_ELSEWHERE}")


def _low_rank(adapter: Adapter, module: str, a: Tensor, b: Tensor, embedding: bool) -> Change:
    config, rank = adapter.config, a.shape[0]
    patterns: dict[str, float] = config.get("alpha_pattern") or {}
    # peft's rule: the first pattern that the module's name ends in.
    pattern = next((key for key in patterns if re.match(rf"(.*\.)?({key})$", module)), None)
    alpha = patterns[pattern] if pattern else config["lora_alpha"]
    scale = np.float32(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))

    def apply(weight: np.ndarray) -> np.ndarray:
        product = b.read().astype(np.float32) @ a.read().astype(np.float32)
        weight += scale * (product.T if embedding else product)
        return weight

    shape = (a.shape[1], b.shape[0]) if embedding else (b.shape[0], a.shape[1])
    return Change(f"{module}.weight", shape, 0, apply)


def _rows(adapter: Adapter, module: str, rows: Tensor) -> Change:
    given = adapter.config.get("trainable_token_indices") or adapter.config.get("token_indices") or []
    by_module = given if isinstance(given, dict) else {"embed_tokens": given, "lm_head": given}
    indices = next((ids for name, ids in by_module.items() if f".{module}".endswith(f".{name}")), [])
    if len(indices) != rows.shape[0]:
        raise UserError(
            f"{adapter.folder}: {rows.shape[0]} rows of {module} are saved, and {CONFIG} names {len(indices)}: copy it"
            " again"
        )

    def apply(weight: np.ndarray) -> np.ndarray:
        weight[indices] = rows.read()
        return weight

    return Change(f"{module}.weight", (None, *rows.shape[1:]), max(indices) + 1, apply)


def _write_weights(
    base: Path, folder: Path, tensors: Mapping[str, Tensor], changes: Mapping[str, list[Change]]
) -> None:
    index = base / f"{SAFETENSORS}.index.json"
    if index.is_file():
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        shutil.copyfile(index, folder / index.name)
    elif (base / SAFETENSORS).is_file():
        files = [SAFETENSORS]
    else:
        raise UserError(f"{base} holds its weights as .bin, and {SAFETENSORS} is what is merged: convert it first")
    with Progress("merging", sum((base / file).stat().st_size for file in files), "bytes") as progress:
        for file in files:
            with open(base / file, "rb") as source, open(folder / file, "wb") as out:
                for name in _copy_header(source, out):
                    value, dtype = tensors[name].read(), tensors[name].dtype
                    for change in changes.get(name, []):
                        value = change.apply(value.astype(np.float32))
                    value = value.astype(dtype, copy=False)
                    out.write(value.reshape(-1).view(np.uint8).data)
                    progress.advance(value.nbytes)


def _copy_header(source: BinaryIO, out: BinaryIO) -> list[str]:
    """The names in a safetensors file, in the order of their bytes; the header is copied as it is."""
    length = source.read(8)
    header = source.read(int.from_bytes(length, "little"))
    out.write(length + header)
    entries = json.loads(header)
    entries.pop("__metadata__", None)
    return sorted(entries, key=lambda name: entries[name]["data_offsets"])


def _copy_others(base: Path, adapter: Path, folder: Path) -> None:
    """Settings of the base; the tokenizer comes from one folder as a whole."""
    for name in ("config.json", "generation_config.json"):
        if (base / name).is_file():
            shutil.copyfile(base / name, folder / name)
    source = adapter if (adapter / "tokenizer_config.json").is_file() else base
    for pattern in ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*"):
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, folder / file.name)
