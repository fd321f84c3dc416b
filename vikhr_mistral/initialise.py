"""`vikhr-mistral init`: a base model with rows for an extended tokenizer, tensor by tensor.

Memory is that of the largest tensor a few times over: under 2 GB for a model of 7B parameters.
"""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from conversion import safetensors
from conversion.weights import Tensor, open_weights
from vikhr_mistral import embeddings, focus, initialise_check, pieces, tokenizer_files
from vikhr_mistral.initialise_check import EMBEDDING, HEAD
from vikhr_t5.errors import UserError
from vikhr_t5.files import atomic_path, write_json
from vikhr_t5.outputs import check_output, room
from vikhr_t5.progress import Progress

MATRICES = {EMBEDDING: "embed_tokens", HEAD: "lm_head"}
STATISTICS = "init.json"
_PADDING = 256  # rows that a base may have above its pieces


def init(
    base_dir: str | os.PathLike[str],
    tokenizer_dir: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    method: str = embeddings.MEAN,
    seed: int = 0,
    auxiliary: str | None = None,
    base_tokenizer: str | None = None,
    verify: bool = False,
    max_shard_size: int | str = "5GB",
) -> dict[str, Any]:
    """Writes the model folder `output_dir`, whole or not at all, and prints what became of the rows.

    Args:
        base_dir: a model of the Mistral or Llama family: config.json, safetensors or .bin, and tokenizer.model.
        tokenizer_dir: what `vikhr-mistral tokenizer` wrote; its files are copied into the output.
        method, seed: as in `embeddings`.
        auxiliary: of "focus": a file of vectors for the pieces of the new tokenizer (`focus.read_vectors`).
        base_tokenizer: the base's SentencePiece model where it is not in `base_dir`; "mistral" as in
            `pieces.open_model`.
        verify: compare the written model with the base (`initialise_check.check`).
        max_shard_size: bytes, or a size such as "5GB".

    Returns:
        {"method", "seed", "rows": {kind: count}, "old_pieces_in_a_mean", "norms": {matrix: {"old" and kinds: norm}}},
        also in init.json.

    Raises:
        UserError: a file is missing or damaged; the model is of another family; model and tokenizer do not belong
            together; `output_dir` is not free; the disk is too small; verification finds a difference.
    """
    embeddings.check_method(method)
    if (method == embeddings.FOCUS) != bool(auxiliary):
        raise UserError(
            "method focus needs --auxiliary, a file of vectors for the new tokenizer's pieces, and no other does"
        )
    limit, base, output = safetensors.parse_size(max_shard_size), Path(base_dir), Path(output_dir)
    check_output(output, STATISTICS)
    config = read_config(base)
    old, new = pieces.open_model(base_tokenizer or base), pieces.open_model(tokenizer_dir)
    tensors = _matching(open_weights(base), config, base, len(old.pieces))
    _check_special(old, new, tokenizer_dir)
    if method == embeddings.EXPONENTIAL and HEAD not in tensors:
        raise UserError(
            f"{base} has one matrix for input and output (tie_word_embeddings), and exponential makes other rows for"
            " the one than for the other: use --method mean"
        )
    plan = embeddings.plan(old, new, method)
    if auxiliary:
        plan = focus.focused(plan, new, auxiliary)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    for name in MATRICES.keys() & shapes.keys():
        shapes[name] = (len(plan.kinds), shapes[name][1])
    dtype = _dtype(tensors, base)
    total = sum(int(np.prod(shape)) for shape in shapes.values()) * dtype.itemsize
    norms: dict[str, dict[str, float]] = {}

    def new_rows(name: str, old: np.ndarray) -> np.ndarray:
        own = embeddings.for_output(plan, method) if name == HEAD else plan
        made = embeddings.new_rows(own, old, method, seed)
        norms[MATRICES[name]] = embeddings.norms(plan, old, made)
        return made

    def arrays() -> Iterator[tuple[str, np.ndarray]]:
        for name, tensor in tensors.items():
            yield name, new_rows(name, tensor.read()) if name in MATRICES else tensor.read()

    shown = Progress(f"writing {output}", total, unit="bytes")
    with room(output, total), atomic_path(output) as folder, shown as progress:
        folder.mkdir()
        safetensors.write_sharded(folder, shapes, arrays(), dtype, limit, progress.advance)
        write_json(folder / "config.json", {**config, "vocab_size": len(plan.kinds)})
        if (base / "generation_config.json").is_file():
            shutil.copyfile(base / "generation_config.json", folder / "generation_config.json")
        tokenizer_files.write(new, folder)
        statistics = _statistics(plan, method, seed, norms)
        write_json(folder / STATISTICS, statistics)
        if verify:
            initialise_check.check(base, folder, old, new, plan)
    show(statistics)
    return statistics


def read_config(folder: Path) -> dict[str, Any]:
    """config.json. UserError where it is missing, is no JSON object, or gives no sizes."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config["vocab_size"], int) or not isinstance(config["hidden_size"], int):
            raise ValueError("vocab_size and hidden_size must be numbers")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give the folder of a Hugging Face model") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} does not describe a language model ({type(error).__name__}: {error})") from error
    return config


def _matching(tensors: dict[str, Tensor], config: dict[str, Any], base: Path, num_pieces: int) -> dict[str, Tensor]:
    """The tensors, without a copy of the embedding as head. UserError where they, the configuration and the tokenizer
    do not belong together."""
    if EMBEDDING not in tensors:
        raise UserError(f"{base} has no {EMBEDDING}: only models of the Mistral and Llama family can be extended")
    rows, shape = config["vocab_size"], (config["vocab_size"], config["hidden_size"])
    tied = bool(config.get("tie_word_embeddings", False))
    if not tied and HEAD not in tensors:
        raise UserError(
            f"{base} has no {HEAD}, and config.json does not tie it (tie_word_embeddings): copy the weights again"
        )
    for name in MATRICES.keys() & tensors.keys():
        if tensors[name].shape != shape:
            raise UserError(f"{base}: {name} is {tensors[name].shape}, and config.json asks for {shape}")
    if not num_pieces <= rows < num_pieces + _PADDING:
        raise UserError(
            f"{base}: the model has {rows:,} rows and its tokenizer {num_pieces:,} pieces: they do not belong together;"
            " name the model's own by --base_tokenizer"
        )
    if tied and HEAD in tensors:
        if not np.array_equal(tensors[HEAD].read(), tensors[EMBEDDING].read()):
            raise UserError(f"{base}: {HEAD} is not {EMBEDDING}, though config.json says they are one matrix")
        tensors = {name: tensor for name, tensor in tensors.items() if name != HEAD}
    return tensors


def _check_special(old: Any, new: Any, tokenizer_dir: str | os.PathLike[str]) -> None:
    for name in ("unk_id", "bos_id", "eos_id"):
        id = getattr(old.trainer_spec, name)
        if getattr(new.trainer_spec, name) != id or (id >= 0 and new.pieces[id].piece != old.pieces[id].piece):
            raise UserError(f"{tokenizer_dir} is not made from the base's tokenizer: its {name} differs; make it anew")


def _dtype(tensors: dict[str, Tensor], base: Path) -> np.dtype:
    found = sorted({tensor.dtype.name for tensor in tensors.values()})
    if len(found) > 1:
        raise UserError(f"{base} stores its tensors as {' and '.join(found)}: save it in one type first")
    return next(iter(tensors.values())).dtype


def _statistics(plan: embeddings.Plan, method: str, seed: int, norms: dict[str, dict[str, float]]) -> dict[str, Any]:
    made = plan.kinds == embeddings.MADE
    return {
        "method": method,
        "seed": seed,
        "rows": {kind: plan.count(kind) for kind in embeddings.KINDS},
        "old_pieces_in_a_mean": float(np.diff(plan.starts)[made].mean()) if made.any() else 0.0,
        "norms": norms,
    }


def show(statistics: dict[str, Any], console: Console | None = None) -> None:
    """The statistics as a table in the terminal."""
    norms: dict[str, dict[str, float]] = statistics["norms"]
    table = Table(title=f"rows by {statistics['method']}", title_justify="left")
    for column in ("", "rows", *(f"norm in {name}" for name in norms)):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row("old", "", *(f"{found['old']:.4g}" for found in norms.values()))
    for kind, count in statistics["rows"].items():
        table.add_row(kind, f"{count:,}", *(f"{found[kind]:.4g}" if kind in found else "" for found in norms.values()))
    table.caption = f"{statistics['old_pieces_in_a_mean']:.2f} old pieces in a new one"
    (console or Console()).print(table)
