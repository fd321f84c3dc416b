"""The base model that a run stays close to: the run's own weights without adapters, or a second, frozen copy.

Letters: B rows, L row length, H hidden size.
"""

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from vikhr_mistral.anchoring import AnchorConfig
from vikhr_t5.errors import UserError


class Reference:
    """Gives the base's hidden states of a batch, and its head.

    Args:
        copy: the frozen copy; None: the trained model without its adapters, which is given to each call.
    """

    def __init__(self, copy: Any = None):
        self.copy = copy
        self.head: Callable[[torch.Tensor], torch.Tensor] | None = None if copy is None else copy.lm_head

    @torch.no_grad()
    def hidden(self, model: Any, adapters: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """[B, L, H] hidden states before the head.

        Args:
            model: what is trained, as it is called (sharded, compiled), inside `loss_forward`.
            adapters: the PEFT model in it.
            inputs: input_ids and position_ids.
        """
        ids, positions = inputs["input_ids"], inputs["position_ids"]
        if self.copy is not None:
            # Ids that the base lacks stand in documents that are not anchored, and documents do not see each other.
            known = ids.where(ids < self.copy.config.vocab_size, 0)
            return self.copy.model(input_ids=known, position_ids=positions, use_cache=False).last_hidden_state
        training = model.training
        model.eval()  # no dropout in the base
        try:
            with adapters_off(adapters):
                return model(input_ids=ids, position_ids=positions)
        finally:
            model.train(training)


@contextlib.contextmanager
def adapters_off(model: Any) -> Iterator[None]:
    """PEFT's `disable_adapter` without its change of requires_grad: under FSDP2 it would put the gradients back on
    gathered weights only, and trained copies of embeddings and head would stay frozen."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def load_copy(folder: str, config: AnchorConfig, dtype: torch.dtype, attention: str, device: torch.device) -> Any:
    """The frozen copy: on the device, in 8 bits, or its layers sharded over the processes of a distributed run.

    Raises:
        UserError: the folder is no model, or 8 bits are asked for without bitsandbytes.
    """
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": attention}
    if config.reference_8bit:
        if importlib.util.find_spec("bitsandbytes") is None:
            raise UserError(
                "reference_8bit needs the package bitsandbytes: pip install bitsandbytes (NVIDIA GPUs), or false"
            )
        from transformers import BitsAndBytesConfig

        options |= {"quantization_config": BitsAndBytesConfig(load_in_8bit=True), "device_map": {"": device}}
    if not (Path(folder) / "config.json").is_file():
        raise UserError(f"{folder} is no model folder: it has no config.json")
    copy = AutoModelForCausalLM.from_pretrained(folder, **options).requires_grad_(False).eval()
    if config.reference_8bit:
        return copy
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        # Embedding and head stay whole: the head is used in chunks, outside of the copy's forward pass.
        mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
        for layer in copy.model.layers:
            fully_shard(layer, mesh=mesh)
    return copy.to(device)
