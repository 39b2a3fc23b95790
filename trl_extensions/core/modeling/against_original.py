"""What trainers share that score a policy beside its frozen original, from hidden states and the output head."""

import logging
from collections.abc import Callable

import torch
from torch import nn

from .head import ReferenceStates, output_head
from .shared_prefix import why_not_exact


logger = logging.getLogger(__name__)


class AgainstOriginal:
    """Mixin for an `SFTTrainer` with the attributes `reference` (`FrozenReference`) and `_redirect` (TRL's)."""

    def _policy_total(self, model: nn.Module, forward: Callable[[nn.Module], torch.Tensor]) -> torch.Tensor:
        """Call `forward` on the unwrapped policy, inside its wrapper's forward; a scalar with gradient, float32."""
        unwrapped, exact = self.accelerator.unwrap_model(model), []

        def recorded(policy: nn.Module) -> torch.Tensor:
            total = forward(policy)
            exact.append(total.detach())
            return total

        # The redirection goes round the forward that accelerate wraps in autocast
        with self.accelerator.autocast():
            total = self._redirect(model, unwrapped, recorded, unwrapped)
        # The head of a model split over devices may lie on another one than the training loop's
        total = total.float().to(self.args.device)
        # FSDP 2 rounds what a forward returns to bfloat16; the value is put right, the gradient is not affected
        return total + (exact[0].to(total) - total).detach()

    def _shares_prefix(self, *models: nn.Module) -> bool:
        """Whether `share_prefix` is set and exact for some models; one line in the log says why if it is not.

        Call it in every process, before models are sharded: what one process cannot do, none does.
        """
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

    def _original_states(
        self, model: nn.Module, states_of: Callable[..., torch.Tensor], inputs: dict[str, torch.Tensor]
    ) -> ReferenceStates:
        """States `states_of(original, inputs)` and the head they meet, without gradients."""
        with self.reference.running(model, self.accelerator, self.args.gradient_checkpointing_kwargs) as (
            wrapped,
            unwrapped,
        ):
            states = self._redirect(wrapped, unwrapped, states_of, unwrapped, inputs)
            # Read outside of the forward: weights that FSDP 2 gathers for it are freed when it ends
            head = output_head(unwrapped, states)
        # What was made in inference mode cannot be saved for a backward pass, its copy can
        return ReferenceStates(states.clone() if states.is_inference() else states, head)
