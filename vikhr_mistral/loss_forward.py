"""A causal model whose forward pass ends in losses, so that its logits never exist as a whole.

The loss is made inside the head's own forward pass, because that is where FSDP2 has the head's weights gathered, and
where PEFT puts trained copies of them.

Letters: B rows, L row length, N = tokens of B·L that have a target, H hidden size.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional as F

from vikhr_mistral.anchoring import AnchorConfig, TokenLosses, chunked_losses
from vikhr_mistral.packing import IGNORED


def causal_model(model: Any) -> Any:
    """The transformers model inside a PEFT one, or itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def frozen_head(head: Any) -> Any:
    """[n, H] -> [n, V] with the head's weights as they were before PEFT: without its copy, rows or adapter."""
    original = getattr(head, "original_module", None)
    if original is None:
        original = getattr(head, "base_layer", head)
    return lambda hidden: F.linear(hidden.to(original.weight.dtype), original.weight)


@contextlib.contextmanager
def loss_forward(
    model: Any, config: AnchorConfig, base_head: Any = None, shared_size: int | None = None, chunk: int = 1024
) -> Iterator[None]:
    """Within it, `model(...)` takes a batch and gives losses, or hidden states; after it, all is as before.

    `model(input_ids=[B, L], position_ids=[B, L])` -> hidden states [B, L, H] before the head.
    `model(…, targets=[B, L], anchored=[B, L], t=…, base_hidden=[B, L, H])` -> (TokenLosses [N], index [N] of the
    tokens with a target in B·L). Without base_hidden the loss is the cross-entropy.

    Args:
        config: of the loss.
        base_head: of the reference; None: the model's own, as it was before PEFT.
        shared_size: size of the base's vocabulary, if the loss is over `shared`.
        chunk: tokens whose logits exist at a time.
    """
    causal = causal_model(model)
    head = causal.get_output_embeddings()
    plain_head = head.forward
    base = base_head or frozen_head(head)

    def head_forward(hidden: torch.Tensor, targets: torch.Tensor | None = None, **others: Any) -> Any:
        if targets is None:
            return hidden
        arguments = {"base_head": base, "shared_size": shared_size, "chunk_tokens": chunk, **others}
        return chunked_losses(plain_head, hidden, targets, config, **arguments)

    def forward(
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        targets: torch.Tensor | None = None,
        anchored: torch.Tensor | None = None,
        t: float = 0.0,
        base_hidden: torch.Tensor | None = None,
        **_: Any,
    ) -> torch.Tensor | tuple[TokenLosses, torch.Tensor]:
        # A cache would hide the documents' boundaries from transformers.
        body = causal.model(input_ids=input_ids, position_ids=position_ids, use_cache=False)
        hidden = body.last_hidden_state
        if targets is None:
            return head(hidden)
        index = (targets.flatten() != IGNORED).nonzero()[:, 0]
        rows = hidden.flatten(0, 1)[index]
        losses = head(
            rows,
            targets=targets.flatten()[index],
            t=t,
            base_hidden=None if base_hidden is None else base_hidden.flatten(0, 1)[index],
            anchored=None if anchored is None or config.over != "shared" else anchored.flatten()[index].bool(),
        )
        return losses, index

    causal.forward, head.forward = forward, head_forward
    try:
        yield
    finally:
        del causal.forward, head.forward
