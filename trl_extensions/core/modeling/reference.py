"""The frozen model that a policy is measured against, and what trainers share that score both from hidden states."""

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import nn
from transformers import PreTrainedModel

from ..._compat import (
    ForwardRedirection,
    create_model_from_path,
    disable_dropout_in_model,
    disable_gradient_checkpointing,
    fsdp2_prepare_model,
    get_config_model_id,
    is_deepspeed_zero3_enabled,
    prepare_deepspeed,
    use_adapter,
)
from .batches import eval_mode, keep_trainable
from .head import ReferenceStates, output_head
from .shared_prefix import why_not_exact


logger = logging.getLogger(__name__)

REFERENCE_ADAPTER = "ref"
_MOVES_WEIGHTS = ("pissa", "olora", "corda", "loftq")


@dataclass
class FrozenReference:
    """Runs the reference: a prepared model of its own, or the policy with another adapter, or with none."""

    model: nn.Module | None
    adapter: str | None = None

    @contextmanager
    def running(
        self, policy: nn.Module, accelerator: Accelerator, gradient_checkpointing_kwargs: dict | None = None
    ) -> Iterator[tuple[nn.Module, nn.Module]]:
        """Without gradients, make it runnable: call through the wrapped module, read weights of the unwrapped one. The
        policy may be wrapped; its checkpointing is switched on again with `gradient_checkpointing_kwargs`."""
        with self._without_gradients(accelerator), accelerator.autocast():
            if self.model is not None:
                yield self.model, accelerator.unwrap_model(self.model)
                return
            unwrapped = accelerator.unwrap_model(policy)
            with (
                disable_gradient_checkpointing(unwrapped, gradient_checkpointing_kwargs),
                use_adapter(unwrapped, self.adapter),
                eval_mode(unwrapped),
            ):
                yield policy, unwrapped

    def _without_gradients(self, accelerator: Accelerator) -> AbstractContextManager:
        """Inference mode for a whole model of its own. What modules of the policy would keep from a forward in it
        (tables of positions, say) could not be trained through, and sharded weights are gathered into such tensors.
        """
        plugins = (accelerator.state.deepspeed_plugin, getattr(accelerator.state, "fsdp_plugin", None))
        return torch.inference_mode() if self.model is not None and not any(plugins) else torch.no_grad()


class ReferenceMixin:
    """Mixin for an `SFTTrainer` with the attribute `reference`, which is a `FrozenReference` or None."""

    _redirect = ForwardRedirection()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
        # Before transformers 5.23 adapters in folders, as "ref" is, hide "default", which lies in the root
        root = Path(resume_from_checkpoint)
        hidden = (root / REFERENCE_ADAPTER).is_dir() and (root / SAFETENSORS_WEIGHTS_NAME).is_file()
        if hidden and not self.is_fsdp_enabled:
            policy = self.accelerator.unwrap_model(self.model if model is None else model)
            policy.load_adapter(str(root), "default", is_trainable=policy.active_adapter == "default")

    def _policy_forward(
        self, model: nn.Module, forward: Callable[[nn.Module], tuple[torch.Tensor, Any]]
    ) -> tuple[torch.Tensor, Any]:
        """Call `forward` on the unwrapped policy, inside its wrapper's forward; of what it returns, the scalar with
        gradient comes back in float32, the other, detached, as it is."""
        unwrapped, kept = self.accelerator.unwrap_model(model), []

        def recorded(policy: nn.Module) -> torch.Tensor:
            total, rest = forward(policy)
            kept.append((total.detach(), rest))
            return total

        # The redirection goes round the forward that accelerate wraps in autocast
        with self.accelerator.autocast():
            total = self._redirect(model, unwrapped, recorded, unwrapped)
        exact, rest = kept[0]
        # The head of a model split over devices may lie on another one than the training loop's
        total = total.float().to(self.args.device)
        # FSDP 2 rounds what a forward returns to bfloat16; the value is put right, the gradient is not affected
        return total + (exact.to(total) - total).detach(), rest

    def _shares_prefix(self, *models: nn.Module) -> bool:
        """Whether `share_prefix` is set and exact for some models, before they are sharded; the log says why if not.
        Call it in every process: what one cannot do, none does."""
        if not self.args.share_prefix:
            return False
        reasons = (why_not_exact(model, longest=self.args.max_length) for model in models)
        reason = next((reason for reason in reasons if reason), None)
        exact = torch.tensor(reason is None, device=self.accelerator.device)
        if bool(self.accelerator.gather(exact).all()):
            return True
        reason = reason or "another process cannot tell whether it would be exact"
        logger.warning("Every prompt is computed anew for each completion behind it: %s.", reason)
        return False

    def _reference_states(
        self, model: nn.Module, states_of: Callable[..., torch.Tensor], inputs: dict[str, torch.Tensor]
    ) -> ReferenceStates | None:
        """States `states_of(reference, inputs)` and the head they meet, without gradients, if there is a reference."""
        if self.reference is None:
            return None
        checkpointing = self.args.gradient_checkpointing_kwargs
        with self.reference.running(model, self.accelerator, checkpointing) as (wrapped, unwrapped):
            states = self._redirect(wrapped, unwrapped, states_of, unwrapped, inputs)
            # Read outside of the forward: weights that FSDP 2 gathers for it are freed when it ends
            head = output_head(unwrapped, states)
        # What was made in inference mode cannot be saved for a backward pass, its copy can
        return ReferenceStates(states.clone() if states.is_inference() else states, head)


def build_reference(
    policy: nn.Module, accelerator: Accelerator, ref_model: PreTrainedModel | None = None, adapter_is_trained=False
) -> FrozenReference:
    """Freeze the reference at the cheapest place that is right. Call before the unwrapped policy's first update.

    It is `ref_model` if given; else, of a PEFT model, the base behind a fresh adapter, or, where that came with the
    model (`adapter_is_trained`), a frozen copy of it named "ref"; else a frozen in-memory copy of the policy (reloaded
    from its path under ZeRO-3, where weights are sharded already).
    """
    reject_fsdp1(accelerator)
    if ref_model is not None:
        _check_explicit(policy, ref_model)
        return frozen_model(ref_model, accelerator)
    if hasattr(policy, "peft_config"):
        config = policy.peft_config[policy.active_adapter]
        if getattr(config, "bias", "none") != "none":
            what = f"`bias: {config.bias}` trains biases of the base model, which is the reference here"
            raise ValueError(f"{what}: leave it at none, or pass `ref_model`.")
        # Some initialisations move a part of the base weights into the adapter: without it the base is another model
        moved = str(getattr(config, "init_lora_weights", True)).lower().startswith(_MOVES_WEIGHTS)
        if not adapter_is_trained and not moved:
            return FrozenReference(None)
        _copy_adapter(policy)
        return FrozenReference(None, REFERENCE_ADAPTER)
    return frozen_model(_copy_of(policy), accelerator)


def reject_fsdp1(accelerator: Accelerator) -> None:
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.fsdp_version == 1:
        raise ValueError("FSDP 1 hides the output head, which the reference needs: use FSDP 2 (`fsdp_version: 2`).")


def frozen_model(model: nn.Module, accelerator: Accelerator) -> FrozenReference:
    """A model of its own as a frozen reference, prepared for the launcher in use; `ValueError` under FSDP 1."""
    reject_fsdp1(accelerator)
    model.requires_grad_(False)
    model.eval()
    keep_trainable(model)  # laid out for inference, weights equal to the policy's would give other numbers
    disable_dropout_in_model(model)
    if model.is_gradient_checkpointing:
        model.gradient_checkpointing_disable()
    if accelerator.state.deepspeed_plugin is not None:
        return FrozenReference(prepare_deepspeed(model, accelerator))
    if getattr(accelerator.state, "fsdp_plugin", None) is not None:
        # As for the policy: sharded layer by layer, and filled from rank 0 where only that one has loaded weights
        return FrozenReference(fsdp2_prepare_model(accelerator, model))
    return FrozenReference(accelerator.prepare_model(model, evaluation_mode=True))


def _check_explicit(policy: nn.Module, ref_model: nn.Module) -> None:
    # The policy may be a PEFT model built around the very model that was passed as the reference
    if any(module is ref_model for module in policy.modules()):
        raise ValueError("`ref_model` and `model` are the same object, which is trained: pass a copy, or none.")
    ours, theirs = (model.config.get_text_config().vocab_size for model in (policy, ref_model))
    if ours != theirs:
        raise ValueError(f"`ref_model` has a vocabulary of {theirs} tokens, the model one of {ours}: they must agree.")


def _copy_of(policy: nn.Module) -> nn.Module:
    if is_deepspeed_zero3_enabled():
        like = {"dtype": policy.dtype, "attn_implementation": policy.config._attn_implementation, "device_map": None}
        return create_model_from_path(get_config_model_id(policy.config), **like)
    duplicate = copy.deepcopy(policy)
    # TRL patches `forward` on the instance; the copied patch would still call the policy's own forward
    duplicate.__dict__.pop("forward", None)
    return duplicate


def _copy_adapter(policy: nn.Module) -> None:
    active = policy.active_adapter
    policy.add_adapter(REFERENCE_ADAPTER, policy.peft_config[active])
    weights = get_peft_model_state_dict(policy, adapter_name=active, save_embedding_layers=False)
    set_peft_model_state_dict(policy, weights, adapter_name=REFERENCE_ADAPTER)
    policy.set_adapter(active)
    policy.set_requires_grad(REFERENCE_ADAPTER, False)
