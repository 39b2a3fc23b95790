"""Capacity recovery ratio (CRR): the share of prompts on which a target model is judged no worse than a strong one.

A judge sees both answers in both orders; a side wins only if it wins twice, all else is a tie. Ties count in full, so
that a judge that goes by places, and makes a tie of every pair, gives 1: see `contradictions`.

Args:
    predictions (`list` of `str`): For each prompt "win", "tie" or "loss" of the target model: by the judge with one of
        the answers first, or in the end, if `swapped` is left out. "unread" where its reply could not be read.
    swapped (`list` of `str`, *optional*): The same by the judge with the other answer first.
    confidence (`float`, defaults to 0.95): Coverage of the interval.

Returns:
    crr, low, high (`float` or `None`): (wins + ties) / (wins + ties + losses) and Wilson's interval of it; None if no
        verdict could be read.
    wins, ties, losses (`int`): Prompts.
    unread (`int`): Prompts with a verdict that could not be read, which are not in the ratio.
    contradictions (`int` or `None`): Ties of a win in one order and a loss in the other; None without `swapped`.
"""

import evaluate

from trl_extensions.codeclm.comparison import capacity_recovery
from trl_extensions.metrics import metric_info


_OUTCOMES = {"win": 1.0, "tie": 0.5, "loss": 0.0}


class CRR(evaluate.Metric):
    def _info(self):
        paper = "Wang et al. (2024): CodecLM: Aligning Language Models with Tailored Synthetic Data"
        return metric_info(__doc__, paper, "2404.05875", predictions="string")

    def _compute(self, predictions, swapped=None, confidence=0.95):
        others = predictions if swapped is None else swapped
        if len(predictions) != len(others):
            raise ValueError(f"{len(predictions)} predictions but {len(others)} swapped: give one of each a prompt")
        for name, verdicts in (("predictions", predictions), ("swapped", others)):
            for row, verdict in enumerate(verdicts):
                if verdict not in (*_OUTCOMES, "unread"):
                    problem = f"row {row} of `{name}`: {verdict!r} is no verdict"
                    raise ValueError(f"{problem}; give win, tie, loss or unread")
        read = [pair for pair in zip(predictions, others, strict=True) if "unread" not in pair]
        outcomes = [_OUTCOMES[one] if one == two else 0.5 for one, two in read]
        contradictions = sum({"win", "loss"} == set(pair) for pair in read) if swapped is not None else None
        counts = {"unread": len(predictions) - len(read), "contradictions": contradictions}
        if not outcomes:
            return {"crr": None, "low": None, "high": None, "wins": 0, "ties": 0, "losses": 0} | counts
        found = capacity_recovery(outcomes, confidence=confidence)
        return {name: found[name] for name in ("crr", "low", "high", "wins", "ties", "losses")} | counts
