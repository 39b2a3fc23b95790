"""Capacity recovery ratio, as a module of the `evaluate` library."""

import datasets
import evaluate

from trl_extensions.codeclm.comparison import capacity_recovery
from trl_extensions.core.judge.win_rate import LOSS, TIE, WIN


_CITATION = """\
@article{wang2024codeclm,
    title = {{CodecLM}: Aligning Language Models with Tailored Synthetic Data},
    author = {Wang, Zifeng and Li, Chun-Liang and Perot, Vincent and Le, Long T. and Miao, Jin and Zhang, Zizhao and
        Lee, Chen-Yu and Pfister, Tomas},
    journal = {arXiv preprint arXiv:2404.05875},
    year = {2024}
}
"""

_DESCRIPTION = """\
Capacity recovery ratio (CRR): the share of prompts on which a target model is judged no worse than a strong one, wins
and ties over all. A judge sees both answers in both orders; a side wins only if it wins twice, all else is a tie.
Ties count in full, so that a judge that goes by places, and makes a tie of every pair, gives 1: see `contradictions`.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list` of `str`): For each prompt "win", "tie" or "loss" of the target model: by the judge with one of
        the answers first, or in the end, if `swapped` is left out. "unread" where its reply could not be read.
    swapped (`list` of `str`, *optional*): The same by the judge with the other answer first.
    confidence (`float`, defaults to 0.95): Coverage of the interval.

Returns:
    crr (`float` or `None`): (wins + ties) / (wins + ties + losses); None if no verdict could be read.
    low, high (`float` or `None`): Wilson's interval of it.
    wins, ties, losses (`int`): Prompts.
    unread (`int`): Prompts with a verdict that could not be read; they are not in the ratio.
    contradictions (`int` or `None`): Ties of a win in one order and a loss in the other; None without `swapped`.

Examples:

    >>> import evaluate
    >>> from trl_extensions.metrics import metric_path
    >>> crr = evaluate.load(metric_path("crr"))
    >>> result = crr.compute(
    ...     predictions=["win", "win", "loss", "loss", "unread"],
    ...     swapped=["win", "loss", "loss", "tie", "win"],
    ... )
    >>> result["crr"], result["wins"], result["ties"], result["losses"], result["unread"], result["contradictions"]
    (0.75, 1, 2, 1, 1, 1)
"""

_OUTCOMES = {"win": WIN, "tie": TIE, "loss": LOSS}
_UNREAD = "unread"


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class CRR(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": datasets.Value("string")}),
            reference_urls=["https://arxiv.org/abs/2404.05875"],
        )

    def _compute(self, predictions, swapped=None, confidence=0.95):
        orders = [
            _checked(predictions, "predictions"),
            _checked(predictions if swapped is None else swapped, "swapped"),
        ]
        if len(orders[0]) != len(orders[1]):
            raise ValueError(f"{len(orders[0])} predictions but {len(orders[1])} swapped: give one of each a prompt")
        verdicts = list(zip(*orders, strict=True))
        read = [pair for pair in verdicts if _UNREAD not in pair]
        outcomes = [_OUTCOMES[one] if one == two else TIE for one, two in read]
        counts = {"unread": len(verdicts) - len(read)}
        counts["contradictions"] = sum({"win", "loss"} == set(pair) for pair in read) if swapped is not None else None
        if not outcomes:
            return {"crr": None, "low": None, "high": None, "wins": 0, "ties": 0, "losses": 0} | counts
        result = capacity_recovery(outcomes, confidence=confidence)
        return {name: result[name] for name in ("crr", "low", "high", "wins", "ties", "losses")} | counts


def _checked(verdicts, name):
    for row, verdict in enumerate(verdicts):
        if verdict not in _OUTCOMES and verdict != _UNREAD:
            raise ValueError(f"row {row} of `{name}`: {verdict!r} is no verdict; give win, tie, loss or unread")
    return verdicts
