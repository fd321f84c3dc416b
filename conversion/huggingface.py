"""A run or a checkpoint as a Hugging Face T5 folder.

Weights and configurations are written as files, without transformers: it ties the head to the embedding of any T5 that
it builds itself (5.x), while `from_pretrained` on files keeps both.
"""

import os
from pathlib import Path
from typing import Any

from conversion import card, names, safetensors, tokenizer
from vikhr_t5.data.vocabulary import Vocabulary
from vikhr_t5.errors import UserError, nearest
from vikhr_t5.files import atomic_path
from vikhr_t5.model.config import T5Config
from vikhr_t5.model.ops import MAX_DISTANCE, NUM_BUCKETS
from vikhr_t5.progress import Progress
from vikhr_t5.train.checkpoints import SavedModel, read_params


def export(
    source: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    dtype: str = "float32",
    max_shard_size: int | str = "5GB",
) -> SavedModel:
    """Writes what `transformers` loads: `T5ForConditionalGeneration.from_pretrained(out_dir)` and `AutoTokenizer`.

    The folder appears whole or not at all; one that holds an earlier export is replaced.

    Args:
        source: a run folder (its newest whole checkpoint) or one checkpoint's folder.
        out_dir: safetensors (with an index above `max_shard_size`), config.json, generation_config.json,
            spiece.model, tokenizer.json and its two configurations, and README.md, a model card.
        dtype: of the stored weights, "float32" or "bfloat16" (half precision overflows in T5's feed-forward output).
        max_shard_size: bytes, or a size such as "5GB".

    Returns:
        The model that was read, so that it can be verified without reading it again.

    Raises:
        UserError: no whole checkpoint; a model that Hugging Face's T5 cannot express; `out_dir` holds something else;
            the disk is too small. The line says which.
    """
    limit = safetensors.parse_size(max_shard_size)
    if dtype not in safetensors.DTYPES:
        raise UserError(f"dtype {dtype!r} cannot be exported; {nearest(dtype, safetensors.DTYPES)}")
    _check_replaceable(Path(out_dir))
    model = read_params(source)
    write_model(model, Path(out_dir), dtype, limit)
    return model


def write_model(model: SavedModel, out_dir: Path, dtype: str, max_shard_size: int) -> None:
    """`export` of a model that is in memory."""
    names.check_expressible(model.config)
    vocabulary = Vocabulary(os.fspath(model.vocabulary_file), model.extra_ids)
    rows = model.config.known_vocab_size()
    if rows < vocabulary.size:
        raise UserError(
            f"the embedding has {rows} rows and vocabulary {model.vocabulary_file} needs {vocabulary.size}:"
            " the model was trained with another vocabulary"
        )
    shapes = {array.name: array.shape for array in names.arrays(model.config)}
    with atomic_path(out_dir) as folder:
        folder.mkdir()
        tokenizer.write(vocabulary, folder)
        tokenizer.write_json(folder / "config.json", config_json(model.config, dtype))
        tokenizer.write_json(folder / "generation_config.json", generation_json(rows, vocabulary.size))
        (folder / "README.md").write_text(card.text(model, vocabulary, dtype, out_dir.name), encoding="utf-8")
        total = model.config.param_count() * safetensors.DTYPES[dtype][1].itemsize
        with Progress(f"writing {out_dir}", total, unit="bytes") as progress:
            arrays = names.to_huggingface(model.params, model.config)
            safetensors.write_sharded(folder, shapes, arrays, dtype, max_shard_size, progress.advance)


def config_json(config: T5Config, dtype: str) -> dict[str, Any]:
    """config.json, for transformers 4.x and 5.x."""
    deeper = config.num_decoder_layers > config.num_encoder_layers
    return {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "is_encoder_decoder": True,
        "vocab_size": config.known_vocab_size(),
        "d_model": config.emb_dim,
        "d_kv": config.head_dim,
        "d_ff": config.mlp_dim,
        "num_heads": config.num_heads,
        "num_layers": config.num_encoder_layers,
        "num_decoder_layers": config.num_decoder_layers,
        "feed_forward_proj": names.feed_forward(config),
        "relative_attention_num_buckets": NUM_BUCKETS,
        "relative_attention_max_distance": MAX_DISTANCE,
        "layer_norm_epsilon": 1e-6,
        "dropout_rate": config.dropout_rate,
        "initializer_factor": 1.0,
        # True also divides: T5 v1.0 multiplies the hidden state by D**-0.5, as t5x divides the logits by sqrt(D).
        # transformers 5.x reads that from this field, sets the field to true, and stores the second one.
        "tie_word_embeddings": config.logits_via_embedding,
        "scale_decoder_outputs": config.logits_via_embedding,
        "decoder_start_token_id": Vocabulary.pad_id,
        "pad_token_id": Vocabulary.pad_id,
        "eos_token_id": Vocabulary.eos_id,
        "use_cache": True,
        "torch_dtype": dtype,
        # `generate` in transformers 5.x makes its cache as deep as the encoder unless it finds this name.
        **({"decoder_layers": config.num_decoder_layers} if deeper else {}),
    }


def generation_json(rows: int, size: int) -> dict[str, Any]:
    """generation_config.json. The embedding's rows past the real vocabulary are never generated."""
    ids = {
        "decoder_start_token_id": Vocabulary.pad_id,
        "pad_token_id": Vocabulary.pad_id,
        "eos_token_id": Vocabulary.eos_id,
    }
    return {**ids, "suppress_tokens": list(range(size, rows))} if rows > size else ids


def _check_replaceable(out_dir: Path) -> None:
    if out_dir.is_file():
        raise UserError(f"{out_dir} is a file: give a folder to write the model to")
    if out_dir.is_dir() and any(out_dir.iterdir()) and not (out_dir / "config.json").is_file():
        raise UserError(f"{out_dir} is not empty and holds no exported model: give a new folder")
