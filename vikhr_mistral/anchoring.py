"""Staying close to the base model: the loss against the data, mixed with a distance to the base's predictions.

Of one token, with y the token that follows, m the model's distribution and b the base's:

    none      -log m_y
    linear    (1 - t) · (-log m_y) + t · KL(b ‖ m)
    slerp     (1 - w) · (-log m_y) + w · CE(b, m),   w = sin²(tΩ) / sin²Ω,   cos Ω = √b_y

`slerp` is the cross-entropy against a target that lies on the geodesic of the Fisher metric from the data (one-hot at
y) to b: square roots of distributions are points of a sphere, √q = (sin((1-t)Ω) e_y + sin(tΩ) √b) / sin Ω, which is
cos²(tΩ) at y and sin²(tΩ) b_v / (1 - b_y) at v ≠ y. That is b with weight w and the one-hot with weight 1 - w: the two
losses mixed by a weight that depends, token by token, on how far the base is from the data. It goes from t² where the
base knows y to sin²(πt/2) where y is new to it. docs/anchoring.md derives this.

With a temperature τ the distance is taken between distributions softened by τ and multiplied by τ² (Hinton et al.
2015, arXiv:1503.02531), and w reads the softened b_y; -log m_y stays as it is.

Where the base has another vocabulary, `over` says what is compared:
    extended  the reference is the frozen model with the rows that initialisation gave it; all tokens have a distance;
    shared    the first `base_vocab_size` logits of both, renormalised, and only in documents that both tokenizers cut
              alike (`anchored`), so that the same position always is the same prefix. Elsewhere w = 0.

Letters: N tokens, H hidden size, V vocabulary, S the part of it that is compared.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class AnchorConfig:
    """How the loss is anchored.

    Attributes:
        loss: none, linear or slerp.
        t: from 0 (data alone) to 1 (base alone), at the first step.
        t_end: at the last step; None: as `t`.
        t_schedule: how t goes from one to the other.
        temperature: τ of both distributions in the distance.
        direction: forward KL(base ‖ model), or reverse KL(model ‖ base); slerp has the forward one.
        over: extended or shared, see above.
        base_tokenizer: folder of the base's tokenizer; `shared` needs it.
        reference: folder of the base model; None: what the run starts from. With LoRA and None it is the model itself
            without its adapters, otherwise a second, frozen copy.
        reference_8bit: the second copy in 8 bits (needs bitsandbytes).
    """

    loss: Literal["none", "linear", "slerp"] = "none"
    t: float = 0.0
    t_end: float | None = None
    t_schedule: Literal["linear", "cosine"] = "linear"
    temperature: float = 1.0
    direction: Literal["forward", "reverse"] = "forward"
    over: Literal["extended", "shared"] = "extended"
    base_tokenizer: str | None = None
    reference: str | None = None
    reference_8bit: bool = False

    def __post_init__(self) -> None:
        for name, value in (("t", self.t), ("t_end", self.t_end)):
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name} is {value}, and it lies between 0 (data) and 1 (base)")
        if self.temperature <= 0:
            raise ValueError(f"temperature is {self.temperature}, and it is above 0")
        if self.loss == "slerp" and self.direction == "reverse":
            raise ValueError("slerp has no reverse direction: its target is a distribution; take linear")
        if self.over == "shared" and self.loss != "none" and not self.base_tokenizer:
            raise ValueError("over: shared needs base_tokenizer, the folder of the base's tokenizer")

    @property
    def active(self) -> bool:
        """Whether a reference is needed."""
        return self.loss != "none" and max(self.t, self.t_end or 0.0) > 0

    def t_at(self, step: int, num_steps: int) -> float:
        """t at a step of the run; depends on nothing else, so a resumed run has the same."""
        if self.loss == "none":
            return 0.0
        end = self.t if self.t_end is None else self.t_end
        done = min(step / max(num_steps - 1, 1), 1.0)
        if self.t_schedule == "cosine":
            done = (1 - math.cos(math.pi * done)) / 2
        return self.t + (end - self.t) * done


class TokenLosses(NamedTuple):
    """[N] each, fp32; only `loss` has a gradient."""

    loss: torch.Tensor
    cross_entropy: torch.Tensor  # -log m_y
    distance: torch.Tensor  # KL, at temperature 1·τ, without τ²
    weight: torch.Tensor  # of the distance in the loss


def slerp_weight(t: float, base_log_prob: torch.Tensor) -> torch.Tensor:
    """w = sin²(tΩ) / sin²Ω with cos Ω = √b_y.

    Args:
        t: from 0 to 1.
        base_log_prob: [N] log b_y; exact also where b_y is near 0 (Ω = π/2) and near 1 (Ω = 0, where w = t²).

    Returns:
        [N], from t² to sin²(πt/2).
    """
    log_prob = base_log_prob.clamp(max=0)
    omega = torch.atan2(torch.sqrt(-torch.expm1(log_prob)), torch.exp(log_prob / 2))
    return (t * torch.sinc(t * omega / math.pi) / torch.sinc(omega / math.pi)) ** 2


def token_losses(
    logits: torch.Tensor,
    targets: torch.Tensor,
    config: AnchorConfig,
    t: float = 0.0,
    base_logits: torch.Tensor | None = None,
    anchored: torch.Tensor | None = None,
    shared_size: int | None = None,
) -> TokenLosses:
    """The losses of N tokens.

    Args:
        logits: [N, V] of the model; computed on in fp32 (or fp64, if they are).
        targets: int [N], the token that follows; no -100.
        config: loss, temperature, direction, over.
        t: now.
        base_logits: [N, ≥S] of the base; None: cross-entropy alone.
        anchored: bool [N]; where False, w = 0. None: all.
        shared_size: S, the base's vocabulary, if `over` is shared.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    logits = logits.to(wide)
    cross_entropy = F.cross_entropy(logits, targets, reduction="none")
    if base_logits is None or config.loss == "none":
        zeros = torch.zeros_like(cross_entropy)
        return TokenLosses(cross_entropy, cross_entropy.detach(), zeros, zeros)
    size = shared_size if config.over == "shared" else logits.shape[-1]
    log_m = F.log_softmax(logits[:, :size] / config.temperature, dim=-1)
    log_b = F.log_softmax(base_logits[:, :size].to(wide) / config.temperature, dim=-1)
    if config.direction == "reverse":
        kl = distance = (log_m.exp() * (log_m - log_b)).sum(-1)
    else:
        b = log_b.exp()
        to_base = -(b * log_m).sum(-1)
        kl = to_base + (b * log_b).sum(-1)
        distance = to_base if config.loss == "slerp" else kl
    if config.loss == "slerp":
        weight = slerp_weight(t, log_b.gather(-1, targets.clamp(max=log_b.shape[-1] - 1)[:, None])[:, 0])
    else:
        weight = torch.full_like(cross_entropy, t)
    if anchored is not None:
        weight = weight * anchored
    loss = (1 - weight) * cross_entropy + weight * config.temperature**2 * distance
    return TokenLosses(loss, cross_entropy.detach(), kl.detach(), weight)


def chunked_losses(
    head: Callable[[torch.Tensor], torch.Tensor],
    hidden: torch.Tensor,
    targets: torch.Tensor,
    config: AnchorConfig,
    t: float = 0.0,
    base_head: Callable[[torch.Tensor], torch.Tensor] | None = None,
    base_hidden: torch.Tensor | None = None,
    anchored: torch.Tensor | None = None,
    shared_size: int | None = None,
    chunk_tokens: int = 1024,
) -> TokenLosses:
    """`token_losses` from hidden states, some tokens at a time: logits live for `chunk_tokens` tokens only.

    Neither the forward nor the backward pass holds [N, V]: a chunk's logits, of both models, are made again in the
    backward pass (one more product with the head: 1% of a 7B model's step).

    Args:
        head: [n, H] -> [n, V].
        hidden: [N, H] of the model.
        base_head, base_hidden: of the base; [N, H of the base].
        others: as for `token_losses`.
    """

    def chunk(
        hidden: torch.Tensor, targets: torch.Tensor, base_hidden: torch.Tensor | None, anchored: torch.Tensor | None
    ) -> TokenLosses:
        with torch.no_grad():
            base_logits = base_head(base_hidden) if base_head is not None and base_hidden is not None else None
        return token_losses(head(hidden), targets, config, t, base_logits, anchored, shared_size)

    parts = []
    for start in range(0, max(len(hidden), 1), chunk_tokens):  # without tokens: one chunk of none
        part = slice(start, start + chunk_tokens)
        others = [None if array is None else array[part] for array in (base_hidden, anchored)]
        parts.append(checkpoint(chunk, hidden[part], targets[part], *others, use_reentrant=False))
    return TokenLosses(*(torch.cat(arrays) for arrays in zip(*parts, strict=True)))
