"""A TNT step: full logits of both models, TRL's distillation loss, ours, and the backbones without any head.

Every path is a function of a policy, its original and a batch that leaves gradients in the policy and returns its
loss. The optimizer, which is the same for all, is left out.
"""

from dataclasses import dataclass

import torch
from torch import nn

from trl_extensions._compat import chunked_divergence_loss
from trl_extensions.core.modeling.head import ReferenceStates, output_head
from trl_extensions.tnt.collator import DataCollatorForTNT
from trl_extensions.tnt.fused_loss import Objective
from trl_extensions.tnt.loss import targeted_negative_loss
from trl_extensions.tnt.scores import score_tokens, scored_states

from .models import random_tokens


@dataclass(frozen=True)
class Batch:
    """Texts of one length; all tokens behind the prompt are scored, one in fifty of them unwanted.

    Attributes:
        rows: Their token ids.
        prompt: How many of the first ones are not scored.
    """

    rows: list[list[int]]
    prompt: int = 1

    @property
    def tokens(self) -> int:
        return sum(map(len, self.rows))

    @property
    def scored_tokens(self) -> int:
        return self.tokens - self.prompt * len(self.rows)

    def inputs(self, *, share_prefix: bool = False) -> dict[str, torch.Tensor]:
        """The batch as `TNTTrainer` gets it."""
        signs = [[0] * self.prompt + [-1 if i % 50 == 0 else 1 for i in range(self.prompt, len(r))] for r in self.rows]
        return DataCollatorForTNT(0, share_prefix=share_prefix)(
            [{"input_ids": row, "token_weights": own} for row, own in zip(self.rows, signs, strict=True)]
        )


def make_batch(rows: int, length: int, vocabulary: int) -> Batch:
    """Texts that have nothing in common."""
    return Batch(random_tokens(rows, length, vocabulary, seed=1))


def make_samples(number: int, prompt: int, response: int, vocabulary: int) -> Batch:
    """Several responses to one prompt."""
    (begin,), ends = random_tokens(1, prompt, vocabulary, seed=1), random_tokens(number, response, vocabulary, seed=2)
    return Batch([begin + end for end in ends], prompt)


def dense(policy: nn.Module, original: nn.Module, batch: Batch) -> torch.Tensor:
    """The definition on full float32 logits of both models."""
    inputs = batch.inputs()
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    with torch.no_grad():
        ref_logits = original(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    logits = policy(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    losses = targeted_negative_loss(logits, ref_logits, ids[:, 1:], inputs["token_weights"][:, 1:], variant="ff")
    loss = losses.sum() / batch.scored_tokens
    loss.backward()
    return loss.detach()


def ours(policy: nn.Module, original: nn.Module, batch: Batch, *, share_prefix: bool = False) -> torch.Tensor:
    """What `TNTTrainer` runs for a batch, with the collator's work in it."""
    inputs = batch.inputs(share_prefix=share_prefix)
    with torch.inference_mode():
        states = scored_states(original, inputs)
    reference = ReferenceStates(states.clone(), output_head(original, states))
    scores = score_tokens(policy, inputs, reference, Objective("ff"))
    loss = scores.total / batch.scored_tokens
    loss.backward()
    return loss.detach()


def distillation(policy: nn.Module, original: nn.Module, batch: Batch) -> torch.Tensor:
    """The forward KL of TRL's `DistillationTrainer` on the same tokens; another objective, the same ingredients."""
    inputs = batch.inputs()
    layout = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"], "use_cache": False}
    states = policy.model(**layout).last_hidden_state[:, :-1]
    with torch.no_grad():
        ref_states = original.model(**layout).last_hidden_state[:, :-1]
    loss, _, _ = chunked_divergence_loss(
        states, ref_states, policy.lm_head.weight, original.lm_head.weight, inputs["attention_mask"][:, 1:], beta=0.0
    )
    loss.backward()
    return loss.detach()


def no_head(policy: nn.Module, original: nn.Module, batch: Batch) -> torch.Tensor:
    """Both backbones and a gradient that reaches every state, without any head: the least a step can cost."""
    inputs = batch.inputs()
    layout = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"], "use_cache": False}
    with torch.no_grad():
        ref_states = original.model(**layout).last_hidden_state
    states = policy.model(**layout).last_hidden_state
    loss = (states * ref_states).mean()
    loss.backward()
    return loss.detach()


def shared(policy: nn.Module, original: nn.Module, batch: Batch) -> torch.Tensor:
    """The same with `share_prefix`."""
    return ours(policy, original, batch, share_prefix=True)


PATHS = {"dense": dense, "ours": ours, "distillation": distillation, "no head": no_head}
PATHS |= {"apart": ours, "shared": shared}
