"""A T5Config as Hugging Face's config.json and generation_config.json, and back.

transformers 4.x and 5.x read the same file differently. In 4.x `tie_word_embeddings` says whether the output layer is
the embedding; a tied T5 also multiplies the decoder's output by D**-0.5. 5.x keeps of it only whether to multiply
(`scale_decoder_outputs`, for T5; mT5 never does, umT5 always), sets the field to true, and loads an output layer of its
own wherever the files hold one. A config.json that 5.x saved again therefore says true whatever the model is.
"""

import json
from pathlib import Path
from typing import Any

from vikhr_t5.data.vocabulary import Vocabulary
from vikhr_t5.errors import UserError, nearest
from vikhr_t5.model.config import T5Config
from vikhr_t5.model.ops import MAX_DISTANCE, NORM_EPSILON, NUM_BUCKETS

PAD, EOS = Vocabulary.pad_id, Vocabulary.eos_id
ARCHITECTURES = {
    "t5": "T5ForConditionalGeneration",
    "mt5": "MT5ForConditionalGeneration",
    "umt5": "UMT5ForConditionalGeneration",
}
# Gated GELU is the tanh approximation by Hugging Face's own exception; elsewhere that is called gelu_new.
_FEED_FORWARD = {
    ("relu",): "relu",
    ("gelu",): "gelu_new",
    ("silu",): "silu",
    ("gelu", "linear"): "gated-gelu",
    ("relu", "linear"): "gated-relu",
    ("silu", "linear"): "gated-silu",
}
_SIZES = {
    "vocab_size": "vocab_size",
    "emb_dim": "d_model",
    "head_dim": "d_kv",
    "mlp_dim": "d_ff",
    "num_heads": "num_heads",
    "num_encoder_layers": "num_layers",
}


def feed_forward(config: T5Config) -> str:
    """Hugging Face's `feed_forward_proj` for our `mlp_activations`; UserError where it has none."""
    activations = tuple("silu" if name == "swish" else name for name in config.mlp_activations)
    if activations not in _FEED_FORWARD:
        raise UserError(
            f"mlp_activations {tuple(config.mlp_activations)}: Hugging Face's T5 has one activation, alone or gating a"
            " linear branch, such as ('relu',) or ('gelu', 'linear')"
        )
    return _FEED_FORWARD[activations]


def config_json(config: T5Config, dtype: str) -> dict[str, Any]:
    """config.json, for transformers 4.x and 5.x. A bias per layer makes it a umT5. UserError as `feed_forward`."""
    kind = "umt5" if config.relative_bias_per_layer else "t5"
    deeper = config.num_decoder_layers > config.num_encoder_layers
    return {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        "is_encoder_decoder": True,
        **{theirs: getattr(config, ours) for ours, theirs in _SIZES.items()},
        "vocab_size": config.known_vocab_size(),
        "num_decoder_layers": config.num_decoder_layers,
        "feed_forward_proj": feed_forward(config),
        "relative_attention_num_buckets": NUM_BUCKETS,
        "relative_attention_max_distance": MAX_DISTANCE,
        "layer_norm_epsilon": NORM_EPSILON,
        "dropout_rate": config.dropout_rate,
        "initializer_factor": 1.0,
        "tie_word_embeddings": config.logits_via_embedding,
        **({"scale_decoder_outputs": config.logits_via_embedding} if kind == "t5" else {}),
        "decoder_start_token_id": PAD,
        "pad_token_id": PAD,
        "eos_token_id": EOS,
        "use_cache": True,
        "torch_dtype": dtype,
        # `generate` in transformers 5.x makes its cache as deep as the encoder unless it finds this name.
        **({"decoder_layers": config.num_decoder_layers} if deeper else {}),
    }


def generation_json(rows: int, size: int) -> dict[str, Any]:
    """generation_config.json. The embedding's rows past the real vocabulary are never generated."""
    ids = {
        "decoder_start_token_id": PAD,
        "pad_token_id": PAD,
        "eos_token_id": EOS,
    }
    return {**ids, "suppress_tokens": list(range(size, rows))} if rows > size else ids


def read_config(folder: Path, own_head: bool) -> tuple[T5Config, bool]:
    """config.json -> T5Config, float32; and whether transformers takes the embedding for a missing output layer.

    Args:
        own_head: the files hold an output layer: `lm_head.weight`.

    Raises:
        UserError: there is none, or it describes what is not a T5 of ours; says which field and what is possible.
    """
    path = folder / "config.json"
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        kind = fields["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: no configuration of a Hugging Face model ({type(error).__name__}: {error})"
        ) from error
    if kind not in ARCHITECTURES:
        raise UserError(f"{path}: model_type {kind!r} is no T5; {nearest(str(kind), ARCHITECTURES)}")
    same = {
        "relative_attention_num_buckets": NUM_BUCKETS,
        "relative_attention_max_distance": MAX_DISTANCE,
        "layer_norm_epsilon": NORM_EPSILON,
        "decoder_start_token_id": PAD,
        "pad_token_id": PAD,
        "eos_token_id": EOS,
    }
    for name, value in same.items():
        if fields.get(name, value) != value:
            raise UserError(f"{path}: {name} is {fields[name]}, and this network has {value}: it cannot be converted")
    missing = [theirs for theirs in _SIZES.values() if theirs not in fields]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}: copy the model's own config.json")
    gated = "gated-gelu" if kind != "t5" else "relu"  # what the class takes where the file says nothing
    proj = fields.get("feed_forward_proj", gated)
    activations = {theirs: ours for ours, theirs in _FEED_FORWARD.items()}
    if proj not in activations:
        raise UserError(f"{path}: feed_forward_proj {proj!r} is unknown; {nearest(str(proj), activations)}")
    ties = bool(fields.get("tie_word_embeddings", kind == "t5"))
    scaled = bool(fields.get("scale_decoder_outputs", ties)) if kind == "t5" else ties and not own_head
    config = T5Config(
        **{ours: fields[theirs] for ours, theirs in _SIZES.items()},
        num_decoder_layers=fields.get("num_decoder_layers") or fields["num_layers"],
        mlp_activations=activations[proj],
        dropout_rate=fields.get("dropout_rate", 0.1),
        logits_via_embedding=scaled,
        relative_bias_per_layer=kind == "umt5",
    )
    return config, ties
