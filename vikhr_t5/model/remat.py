"""What of a layer is kept for the backward pass; the rest is computed again (Chen et al. 2016, arXiv:1604.06174)."""

from collections.abc import Callable
from typing import Any

import jax

from vikhr_t5.model import ops

LAYER_INPUT = "layer_input"  # the name of the array that enters a layer

_POLICIES: dict[str, Callable] = {
    "matmuls": jax.checkpoint_policies.save_only_these_names(ops.MATMUL, ops.ATTENTION),
    "attention": jax.checkpoint_policies.save_only_these_names(ops.ATTENTION),
    "layer_inputs": jax.checkpoint_policies.nothing_saveable,
    "layer_inputs_on_host": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[LAYER_INPUT],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


def remat(layer: Callable[..., Any], policy: str) -> Callable[..., Any]:
    """`layer`, the body of a scan whose carry is named LAYER_INPUT, under a policy of `T5Config.remat_policy`."""
    if policy == "everything":
        return layer
    return jax.checkpoint(layer, policy=_POLICIES[policy], prevent_cse=False)
