"""A constitution absorbed: a model trained, without one in its prompt, towards itself with the desired one.

The teacher is the model as it is before, with every principle's definition in its prompt; the student the same model
asked the bare query. On responses of the teacher the loss is KL(teacher || student) over the vocabulary, in nats per
response token: forward, because sum over t of KL(teacher_t || student_t) on the teacher's own samples is, by the chain
rule, an estimate of KL between whole responses, for which the reverse would need the student's samples.
"""

import copy
import random
from collections.abc import Sequence

import torch

from ..core.modeling.chunked import chunked_kl
from ..core.modeling.head import output_head
from ..core.training.load import as_config
from .config import SAMIConfig
from .principles import Constitution, Principle
from .scores import matched_states, pair_lengths
from .trainer import SAMITrainer


class AbsorbTrainer(SAMITrainer):
    """`SAMITrainer` on rows of one response: `prompts` are the teacher's (with the constitution) and the student's
    (without), and `completions` holds the response twice, as that class wants one for each prompt.

    The teacher has the weights that `SAMITrainer` measures KL to: those before the first update, of an adapter that is
    trained on a frozen copy. The loss of a step, and `eval_loss`, are means over its response tokens (nats).
    """

    def __init__(self, model, args=None, **kwargs):
        args = copy.copy(as_config(args, SAMIConfig, model, "absorb"))
        args.log_kl, args.guard_steps, args.guard_max_kl = True, 0, None
        super().__init__(model, args, **kwargs)

    def _prepare_dataset(self, *args, **kwargs):
        dataset = super()._prepare_dataset(*args, **kwargs)
        # Pair 0 is then the response behind the teacher's prompt, "matched", and pair 1 that behind the student's
        return dataset.map(lambda row: {"completion_input_ids": row["completion_input_ids"][:1]})

    def count_items(self, batch):
        return int(pair_lengths(batch)[batch["matched"]].sum())

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        teacher = self._reference_states(model, matched_states, inputs)
        lengths = pair_lengths(inputs)[inputs["matched"]]

        def forward(policy):
            states = matched_states(policy, inputs | {"matched": ~inputs["matched"]})
            kl = chunked_kl(states, output_head(policy, states), teacher.states, teacher.head, reverse=False)
            return kl.sum(), torch.stack([own.sum() for own in kl.detach().split(lengths.tolist())])

        total, sums = self._policy_forward(model, forward)
        self.record({"loss": (sums, lengths.to(sums.device))}, tokens=inputs["attention_mask"])
        loss = self.step_loss(total, int(lengths.sum()))
        return (loss, {"losses": sums}) if return_outputs else loss


def desired_constitution(
    principles: Sequence[Principle], *, seed: int, key: str, other_than: Constitution | None = None
) -> Constitution:
    """Every principle's definition, in an order drawn by `seed` and `key`; of two principles or more, never that of
    `other_than`."""
    order, rng = list(principles), random.Random(f"{seed}:{key}")
    while True:
        rng.shuffle(order)
        text = "\n".join(f"{number}. {own.definition}" for number, own in enumerate(order, start=1))
        if len(order) < 2 or other_than is None or text != other_than.text:
            return Constitution(text, {own.name: True for own in principles})
