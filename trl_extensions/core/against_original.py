"""What trainers share that score a policy beside its frozen original, from hidden states and the output head."""

from collections.abc import Callable

import torch
from torch import nn

from .head import ReferenceStates, output_head


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
            return ReferenceStates(states, output_head(unwrapped, states))
