"""Random T5 models in transformers and the same weights as our tree; tests only.

Weights go through safetensors and `from_pretrained`: transformers 5 re-ties the head of a model that is given its
weights in any other way.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file
from transformers import T5ForConditionalGeneration

from vikhr_t5.model import network

# Our name within a layer -> (sub-layer of the encoder, of the decoder; name in it). None: not there.
_BLOCKS = {
    "pre_attention_layer_norm/scale": ("layer.0.layer_norm", None),
    "pre_self_attention_layer_norm/scale": (None, "layer.0.layer_norm"),
    "pre_cross_attention_layer_norm/scale": (None, "layer.1.layer_norm"),
    "pre_mlp_layer_norm/scale": ("layer.1.layer_norm", "layer.2.layer_norm"),
    **{f"attention/{n}/kernel": (f"layer.0.SelfAttention.{n[0]}", None) for n in ("query", "key", "value", "out")},
    **{f"self_attention/{n}/kernel": (None, f"layer.0.SelfAttention.{n[0]}") for n in ("query", "key", "value", "out")},
    **{
        f"encoder_decoder_attention/{n}/kernel": (None, f"layer.1.EncDecAttention.{n[0]}")
        for n in ("query", "key", "value", "out")
    },
    **{
        f"mlp/{n}/kernel": (f"layer.1.DenseReluDense.{n}", f"layer.2.DenseReluDense.{n}")
        for n in ("wi", "wi_0", "wi_1", "wo")
    },
}
_OUTSIDE = {
    "token_embedder/embedding": "shared.weight",
    "encoder/relpos_bias/rel_embedding": "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
    "decoder/relpos_bias/rel_embedding": "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
    "encoder/encoder_norm/scale": "encoder.final_layer_norm.weight",
    "decoder/decoder_norm/scale": "decoder.final_layer_norm.weight",
    "decoder/logits_dense/kernel": "lm_head.weight",
}


def to_hf(tree: dict[str, Any]) -> dict[str, np.ndarray]:
    """Our tree (parameters or gradients) -> {name in transformers: array}."""
    named = {}
    for path, array in flatten_dict(tree, sep="/").items():
        transpose = path.endswith(("/kernel", "/rel_embedding"))
        if path in _OUTSIDE:
            named[_OUTSIDE[path]] = np.asarray(array).T if transpose else np.asarray(array)
            continue
        stack, _, inner = path.split("/", 2)
        block = _BLOCKS[inner][stack == "decoder"]
        for i, layer in enumerate(np.asarray(array)):
            named[f"{stack}.block.{i}.{block}.weight"] = layer.T if transpose else layer
    return named


def hf_model(config: network.T5Config, params: dict[str, Any], folder: Path) -> T5ForConditionalGeneration:
    """A float32 transformers model in evaluation mode."""
    description = {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "vocab_size": config.vocab_size,
        "d_model": config.emb_dim,
        "d_kv": config.head_dim,
        "d_ff": config.mlp_dim,
        "num_layers": config.num_encoder_layers,
        "num_decoder_layers": config.num_decoder_layers,
        "num_heads": config.num_heads,
        "feed_forward_proj": "gated-gelu" if len(config.mlp_activations) == 2 else "relu",
        "tie_word_embeddings": config.logits_via_embedding,
        "dropout_rate": 0.0,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
    }
    (folder / "config.json").write_text(json.dumps(description))
    weights = {name: np.ascontiguousarray(array) for name, array in to_hf(params).items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    # Eager attention: the fused kernel returns no attention weights.
    model = T5ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    for name, parameter in model.named_parameters():
        assert np.array_equal(parameter.detach().numpy(), weights[name]), f"{name} was changed while loading"
    return model
