"""A SAMI step: repeated prompts with full logits, ours, and SFT steps of TRL to compare with.

Every path is a function of a model and a query that leaves gradients in the model and returns its loss. The optimizer,
which is the same for all, is left out.
"""

from dataclasses import dataclass

import torch
from torch import nn

from trl_extensions._compat import ChunkedLogProbFunction, add_fused_lm_head
from trl_extensions.sami.collator import DataCollatorForSAMI
from trl_extensions.sami.loss import sami_loss
from trl_extensions.sami.scores import rows_of, score_pairs

from .models import random_tokens


_SFT_OUTPUTS = ("log_probs", "entropy", "is_top1")  # what `SFTTrainer` asks of its head


@dataclass(frozen=True)
class Query:
    """C prompts and the C responses sampled under them, token ids."""

    prompts: list[list[int]]
    responses: list[list[int]]

    @property
    def layout_tokens(self) -> int:
        """Tokens that have to be computed: each prompt once, each response under each prompt."""
        return sum(map(len, self.prompts)) + len(self.prompts) * self.scored_each

    @property
    def scored_tokens(self) -> int:
        """Response tokens under all prompts."""
        return len(self.prompts) * self.scored_each

    @property
    def scored_each(self) -> int:
        return sum(map(len, self.responses))

    @property
    def repeated_tokens(self) -> int:
        """Tokens of the C x C sequences that repeat their prompts, padded."""
        longest = max(map(len, self.prompts)) + max(map(len, self.responses))
        return len(self.prompts) * len(self.responses) * longest


def make_query(constitutions: int, prompt: int, response: int, vocabulary: int) -> Query:
    """A query whose prompts all have one length, and so have its responses."""
    return Query(
        random_tokens(constitutions, prompt, vocabulary, seed=1),
        random_tokens(constitutions, response, vocabulary, seed=2),
    )


def plain(model: nn.Module, query: Query) -> torch.Tensor:
    """(a) What one writes first: C x C padded sequences, full float32 logits, log-softmax, the mean per token."""
    pairs = [(prompt, response) for prompt in query.prompts for response in query.responses]
    length = max(len(prompt) + len(response) for prompt, response in pairs)
    input_ids = torch.zeros(len(pairs), length, dtype=torch.long)
    attention_mask, of_response = torch.zeros_like(input_ids), torch.zeros(input_ids.shape, dtype=torch.bool)
    for row, (prompt, response) in enumerate(pairs):
        end = len(prompt) + len(response)
        input_ids[row, :end] = torch.tensor(prompt + response)
        attention_mask[row, :end] = 1
        of_response[row, len(prompt) : end] = True
    logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits.float()
    logps = logits[:, :-1].log_softmax(-1).gather(-1, input_ids[:, 1:, None])[..., 0]
    of_response = of_response[:, 1:]
    means = (logps * of_response).sum(1) / of_response.sum(1)
    loss = sami_loss(means.view(len(query.prompts), len(query.responses)))
    loss.backward()
    return loss.detach()


def ours(model: nn.Module, query: Query) -> torch.Tensor:
    """What `SAMITrainer` runs for a batch of one query, with the collator's work in it."""
    collate = DataCollatorForSAMI(pad_token_id=0, share_prefix=True)
    inputs = collate([{"prompt_input_ids": query.prompts, "completion_input_ids": query.responses}])
    losses, _ = rows_of(*score_pairs(model, inputs, "mean", None), inputs, beta=0.0)
    loss = losses.sum()
    loss.backward()
    return loss.detach()


def sft(model: nn.Module, query: Query) -> torch.Tensor:
    """(b) The loss of TRL's `SFTTrainer` over as many tokens, sequences and labels as ours has.

    On a CPU its fused head scores every position, prompts included.
    """
    if "forward" not in vars(model):  # the fused head, added once
        add_fused_lm_head(model, outputs=_SFT_OUTPUTS)
    inputs, labels = _as_sft([(prompt, query.responses) for prompt in query.prompts])
    outputs = model(**inputs, labels=labels, fused_lm_head=True)
    loss = -outputs.log_probs.sum() / outputs.label_mask.sum()
    loss.backward()
    return loss.detach()


def sft_at_labels(model: nn.Module, query: Query) -> torch.Tensor:
    """The same with the head at labelled positions only, as TRL does it on a GPU, and the same kernel."""
    return _sft_at_labels(model, [(prompt, query.responses) for prompt in query.prompts])


def sft_matching(model: nn.Module, query: Query) -> torch.Tensor:
    """`sft_at_labels` over the C matching pairs only: what one would train on without the contrast."""
    return _sft_at_labels(model, [(p, [r]) for p, r in zip(query.prompts, query.responses, strict=True)])


def _sft_at_labels(model: nn.Module, rows: list[tuple[list[int], list[list[int]]]]) -> torch.Tensor:
    inputs, labels = _as_sft(rows)
    labels = labels[:, 1:]
    labelled = labels != -100
    states = model.model(**inputs, use_cache=False).last_hidden_state[:, :-1][labelled]
    logps = ChunkedLogProbFunction.apply(
        states, model.lm_head.weight, None, labels[labelled], 1.0, 32768, None, 1.0, _SFT_OUTPUTS
    )[0]
    loss = -logps.mean()
    loss.backward()
    return loss.detach()


def _as_sft(rows: list[tuple[list[int], list[list[int]]]]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    sequences = [prompt + [token for response in responses for token in response] for prompt, responses in rows]
    length = max(map(len, sequences))
    input_ids = torch.zeros(len(rows), length, dtype=torch.long)
    mask, labels = torch.zeros_like(input_ids), torch.full_like(input_ids, -100)
    for row, (sequence, (prompt, _)) in enumerate(zip(sequences, rows, strict=True)):
        input_ids[row, : len(sequence)] = torch.tensor(sequence)
        mask[row, : len(sequence)] = 1
        labels[row, len(prompt) : len(sequence)] = input_ids[row, len(prompt) : len(sequence)]
    return {"input_ids": input_ids, "attention_mask": mask}, labels


PATHS = {
    "plain": plain,
    "ours": ours,
    "SFT": sft,
    "SFT at labels": sft_at_labels,
    "SFT of matching pairs": sft_matching,
}
