"""The frozen original model a trainer measures its policy against."""

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel

from ..._compat import (
    create_model_from_path,
    disable_dropout_in_model,
    disable_gradient_checkpointing,
    fsdp2_prepare_model,
    get_config_model_id,
    is_deepspeed_zero3_enabled,
    prepare_deepspeed,
    use_adapter,
)
from .modes import evaluating


REFERENCE_ADAPTER = "ref"
_MOVES_WEIGHTS = ("pissa", "olora", "corda", "loftq")


@dataclass
class FrozenReference:
    """Runs the original model, wherever its weights are.

    Attributes:
        model: A separate, prepared model, or None when the policy itself holds the original behind its adapter.
        adapter: With `model` None: the adapter that is the original; None means all adapters switched off.
    """

    model: nn.Module | None
    adapter: str | None

    @contextmanager
    def running(
        self, policy: nn.Module, accelerator: Accelerator, gradient_checkpointing_kwargs: dict | None = None
    ) -> Iterator[tuple[nn.Module, nn.Module]]:
        """Without gradients, make the original runnable.

        Args:
            policy: The policy as the training loop has it (wrapped by DDP, FSDP, DeepSpeed, or not).
            accelerator: The trainer's accelerator.
            gradient_checkpointing_kwargs: What the policy's checkpointing is switched on with again afterwards.

        Yields:
            `(wrapped, unwrapped)` module; call through the first, read weights of the second.
        """
        with self._without_gradients(accelerator), accelerator.autocast():
            if self.model is not None:
                yield self.model, accelerator.unwrap_model(self.model)
                return
            unwrapped = accelerator.unwrap_model(policy)
            with (
                disable_gradient_checkpointing(unwrapped, gradient_checkpointing_kwargs),
                use_adapter(unwrapped, self.adapter),
                evaluating(unwrapped),
            ):
                yield policy, unwrapped

    def _without_gradients(self, accelerator: Accelerator) -> AbstractContextManager:
        """Inference mode for a whole model of its own. What modules of the policy would keep from a forward in it
        (tables of positions, say) could not be trained through, and sharded weights are gathered into such tensors.
        """
        plugins = (accelerator.state.deepspeed_plugin, getattr(accelerator.state, "fsdp_plugin", None))
        return torch.inference_mode() if self.model is not None and not any(plugins) else torch.no_grad()


def build_reference(
    policy: nn.Module,
    accelerator: Accelerator,
    *,
    ref_model: PreTrainedModel | None = None,
    adapter_is_trained: bool = False,
) -> FrozenReference:
    """Freeze the original at the cheapest place that is right. Call before the policy's first update.

    Args:
        policy: The unwrapped policy.
        accelerator: The trainer's accelerator.
        ref_model: An explicit original; used as it is.
        adapter_is_trained: The policy is a PEFT model that came with its own adapter, so the original is the model
            with that adapter: a frozen copy of it named "ref" is added. False: the base model behind a fresh adapter.

    Returns:
        The reference: `ref_model` if given; else adapters off or the "ref" adapter for a PEFT model; else a frozen
        in-memory copy of the policy (reloaded from its path under ZeRO-3, where weights are sharded already).

    Raises:
        ValueError: `ref_model` is the policy itself, or has another vocabulary; FSDP 1; an adapter that trains biases.
    """
    reject_fsdp1(accelerator)
    if ref_model is not None:
        _check_explicit(policy, ref_model)
        return frozen_model(ref_model, accelerator)
    if hasattr(policy, "peft_config"):
        config = policy.peft_config[policy.active_adapter]
        if getattr(config, "bias", "none") != "none":
            raise ValueError(
                f"`bias: {config.bias}` trains biases of the base model, which is the original here: leave it at "
                "none, or pass `ref_model`."
            )
        # Some initialisations move a part of the base weights into the adapter: without it the base is another model
        moved = str(getattr(config, "init_lora_weights", True)).lower().startswith(_MOVES_WEIGHTS)
        if not adapter_is_trained and not moved:
            return FrozenReference(None, None)
        _copy_adapter(policy)
        return FrozenReference(None, REFERENCE_ADAPTER)
    return frozen_model(_copy_of(policy), accelerator)


def reject_fsdp1(accelerator: Accelerator) -> None:
    """Raise `ValueError` under FSDP 1, which flattens weights."""
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.fsdp_version == 1:
        raise ValueError(
            "FSDP 1 hides the output head that the reference is read through: use FSDP 2 (`fsdp_version: 2`)."
        )


def frozen_model(model: nn.Module, accelerator: Accelerator) -> FrozenReference:
    """A model of its own as a frozen reference, prepared for the launcher in use.

    Raises:
        ValueError: FSDP 1.
    """
    reject_fsdp1(accelerator)
    return FrozenReference(_prepare(model, accelerator), None)


def _check_explicit(policy: nn.Module, ref_model: nn.Module) -> None:
    # The policy may be a PEFT model built around the very model that was passed as the reference
    if any(module is ref_model for module in policy.modules()):
        raise ValueError(
            "`ref_model` and `model` are the same object, so the reference would be trained too: pass a copy, or "
            "leave `ref_model` out."
        )
    ours, theirs = (model.config.get_text_config().vocab_size for model in (policy, ref_model))
    if ours != theirs:
        raise ValueError(f"`ref_model` has a vocabulary of {theirs} tokens, the model one of {ours}: they must agree.")


def _copy_of(policy: nn.Module) -> nn.Module:
    if is_deepspeed_zero3_enabled():
        return create_model_from_path(
            get_config_model_id(policy.config),
            dtype=policy.dtype,
            attn_implementation=policy.config._attn_implementation,
            device_map=None,
        )
    duplicate = copy.deepcopy(policy)
    # TRL patches `forward` on the instance; the copied patch would still call the policy's own forward
    duplicate.__dict__.pop("forward", None)
    return duplicate


def _prepare(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    model.requires_grad_(False)
    model.eval()
    disable_dropout_in_model(model)
    if model.is_gradient_checkpointing:
        model.gradient_checkpointing_disable()
    if accelerator.state.deepspeed_plugin is not None:
        return prepare_deepspeed(model, accelerator)
    if getattr(accelerator.state, "fsdp_plugin", None) is not None:
        # As for the policy: sharded layer by layer, and filled from rank 0 where only that one has loaded weights
        return fsdp2_prepare_model(accelerator, model)
    return accelerator.prepare_model(model, evaluation_mode=True)


def _copy_adapter(policy: nn.Module) -> None:
    active = policy.active_adapter
    policy.add_adapter(REFERENCE_ADAPTER, policy.peft_config[active])
    for name, parameter in list(policy.named_parameters()):
        parts = name.split(".")
        if active in parts:
            at = len(parts) - 1 - parts[::-1].index(active)  # the adapter's own name is the last of that spelling
            frozen = policy.get_parameter(".".join([*parts[:at], REFERENCE_ADAPTER, *parts[at + 1 :]]))
            frozen.data.copy_(parameter.data)
            frozen.requires_grad_(False)
    policy.set_adapter(active)
