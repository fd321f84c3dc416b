"""The shape of a T5 model: validation, parameter and FLOP counts, JSON."""

import dataclasses
import json
from collections.abc import Sequence

import jax.numpy as jnp

from vikhr_t5.errors import UserError, nearest

ACTIVATIONS = ("linear", "relu", "gelu", "silu", "swish")
DTYPES = ("float32", "bfloat16")
ATTENTIONS = ("auto", "plain", "fused")
REMAT_POLICIES = ("everything", "matmuls", "attention", "layer_inputs", "layer_inputs_on_host")
T5X_REMAT_POLICIES = {"none": "everything", "minimal": "matmuls", "full": "layer_inputs"}


@dataclasses.dataclass(frozen=True)
class T5Config:
    """The names and defaults are those of t5x's `network.T5Config`; `relative_bias_per_layer` and `attention` are
    ours.

    Args:
        vocab_size: rows of the embedding; None means "the vocabulary's padded size", filled in by the model.
        dtype: of activations and matmul inputs, "float32" or "bfloat16"; parameters are always float32.
        emb_dim: width D of the residual stream.
        num_heads: attention heads H.
        num_encoder_layers: depth of the encoder.
        num_decoder_layers: depth of the decoder.
        head_dim: width K of a head; H*K may differ from D.
        mlp_dim: width F of the feed-forward block.
        mlp_activations: one name, ("relu",), for T5 v1.0; two, ("gelu", "linear"), for the gated block of v1.1.
        dropout_rate: in [0, 1); applied only where dropout is enabled.
        logits_via_embedding: the output layer is the embedding (v1.0), its logits divided by sqrt(D).
        float32_attention_logits: keep attention logits in float32 when `dtype` is lower.
        remat_policy: what of a layer is kept for its backward pass, which computes the rest again: "everything";
            "matmuls" and what attention computed; "attention": that and the layer's input; "layer_inputs" alone;
            "layer_inputs_on_host": these in the host's memory. t5x's "none", "minimal" and "full" are read as
            "everything", "matmuls" and "layer_inputs".
        relative_bias_per_layer: each layer has its own relative-position bias (t5x's scalable_t5, umT5) instead of
            one per stack (T5).
        attention: "fused", one kernel that holds neither weights nor bias nor mask in memory (on a CPU an interpreter
            runs it, for tests); "plain", XLA's own operations; "auto": fused on NVIDIA GPUs from Ampere on, where
            heads suit it.

    Raises:
        UserError: a value out of range; the line names the field, the value and what is allowed.
    """

    vocab_size: int | None = None
    dtype: str = "float32"
    emb_dim: int = 512
    num_heads: int = 8
    num_encoder_layers: int = 6
    num_decoder_layers: int = 6
    head_dim: int = 64
    mlp_dim: int = 2048
    mlp_activations: Sequence[str] = ("relu",)
    dropout_rate: float = 0.1
    logits_via_embedding: bool = False
    float32_attention_logits: bool = False
    remat_policy: str = "everything"
    relative_bias_per_layer: bool = False
    attention: str = "auto"

    def __post_init__(self) -> None:
        dtype = self.dtype if isinstance(self.dtype, str) else jnp.dtype(self.dtype).name
        object.__setattr__(self, "dtype", dtype)
        activations = (self.mlp_activations,) if isinstance(self.mlp_activations, str) else tuple(self.mlp_activations)
        object.__setattr__(self, "mlp_activations", activations)

        if dtype == "float16":
            raise UserError("T5Config.dtype 'float16' overflows in T5's feed-forward output: use 'bfloat16'")
        _check_name("dtype", dtype, DTYPES)
        object.__setattr__(self, "remat_policy", T5X_REMAT_POLICIES.get(self.remat_policy, self.remat_policy))
        _check_name("remat_policy", self.remat_policy, REMAT_POLICIES)
        _check_name("attention", self.attention, ATTENTIONS)
        for activation in activations:
            _check_name("mlp_activations", activation, ACTIVATIONS)
        if not activations:
            raise UserError("T5Config.mlp_activations is empty: give ('relu',) or ('gelu', 'linear')")
        sizes = ["emb_dim", "num_heads", "num_encoder_layers", "num_decoder_layers", "head_dim", "mlp_dim"]
        for field in sizes + (["vocab_size"] if self.vocab_size is not None else []):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UserError(f"T5Config.{field} must be a whole number of at least 1, not {value!r}")
        if not 0 <= self.dropout_rate < 1:
            raise UserError(f"T5Config.dropout_rate must be in [0, 1), not {self.dropout_rate!r}")

    @property
    def joined_dim(self) -> int:
        """H*K: the width of all heads together."""
        return self.num_heads * self.head_dim

    def known_vocab_size(self) -> int:
        """`vocab_size`, or a UserError while it is still None."""
        if self.vocab_size is None:
            raise UserError("T5Config.vocab_size is not set: bind it, or build the model with a vocabulary")
        return self.vocab_size

    def param_count(self) -> int:
        """Number of parameters (a tied output layer counts once)."""
        layers = self.num_encoder_layers + self.num_decoder_layers
        vocabulary = self.known_vocab_size() * self.emb_dim * (1 if self.logits_via_embedding else 2)
        norms = 2 * self.num_encoder_layers + 3 * self.num_decoder_layers + 2
        biases = 32 * self.num_heads * (layers if self.relative_bias_per_layer else 2)
        return vocabulary + self._layer_matmul_params() + norms * self.emb_dim + biases

    def _layer_matmul_params(self) -> int:
        attention = 4 * self.emb_dim * self.joined_dim
        mlp = (len(self.mlp_activations) + 1) * self.emb_dim * self.mlp_dim
        return (self.num_encoder_layers * (attention + mlp)) + self.num_decoder_layers * (2 * attention + mlp)

    def flops_per_step(self, batch_size: int, inputs_length: int, targets_length: int) -> int:
        """Matmul FLOPs of one forward and backward pass over a batch (recomputation not counted: for MFU).

        The backward pass costs twice the forward. Attention is counted in full, masked positions too.
        """
        return 3 * batch_size * sum(self.forward_flops(inputs_length, targets_length).values())

    def forward_flops(self, inputs_length: int, targets_length: int) -> dict[str, int]:
        """Matmul FLOPs of a forward pass over one row: "encoder", "decoder" and "head" (the output layer)."""
        s, t, hk, d = inputs_length, targets_length, self.joined_dim, self.emb_dim
        mlp = (len(self.mlp_activations) + 1) * d * self.mlp_dim
        encoder = s * (4 * d * hk + mlp) + 2 * s * s * hk
        decoder = t * (4 * d * hk + mlp) + 2 * t * t * hk  # self-attention and feed-forward
        decoder += 2 * t * d * hk + 2 * s * d * hk + 2 * t * s * hk  # cross-attention: q and out, k and v, scores
        return {
            "encoder": 2 * self.num_encoder_layers * encoder,
            "decoder": 2 * self.num_decoder_layers * decoder,
            "head": 2 * t * d * self.known_vocab_size(),
        }

    def to_json(self) -> str:
        """The text of model_config.json."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "T5Config":
        """The inverse of `to_json`.

        Raises:
            UserError: the text is not a JSON object, or has a field that T5Config lacks.
        """
        try:
            fields = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"model configuration is not JSON: {error}") from error
        if not isinstance(fields, dict):
            raise UserError("model configuration is not a JSON object")
        known = [field.name for field in dataclasses.fields(cls)]
        for name in fields:
            if name not in known:
                raise UserError(f"model configuration has an unknown field {name!r}; {nearest(name, known)}")
        return cls(**fields)


def _check_name(field: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise UserError(f"T5Config.{field} {value!r} is unknown; {nearest(str(value), allowed)}")
