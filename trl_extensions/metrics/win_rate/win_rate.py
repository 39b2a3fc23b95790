"""How often a model's answers are judged better than another's, a tie being half a win: as it is, averaged over pairs
in which the answer is shorter, about equally long and longer, and at equal length by a logistic regression.

Where the three differ, length had a part in the wins. Each comes with an interval.

Args:
    predictions (`list` of `float`): Outcome of every pair: 1 the model's answer won, 0.5 tie, 0 it lost. Leave out
        pairs on which the judge could not be read.
    prediction_lengths (`list` of `float`): Lengths of the model's answers: tokens, words or characters.
    reference_lengths (`list` of `float`): Lengths of the other answers, in the same unit.
    groups (`list`, *optional*): Which rows belong together, e.g. the prompt they answer; drawn together.
    confidence, resamples, seed: Of the intervals: 0.95, 2000 (500 for `length_adjusted`) and 0.

Returns:
    win_rate, low, high (`float`): The raw rate; Wilson's interval, or with groups a bootstrap over these.
    length_balanced (`dict`): `value`, `low`, `high`; `strata`, the number of rows and the rate of each; `empty`, those
        without rows, which the value leaves out.
    length_adjusted (`dict`): `value`, `low`, `high`, `slope`; `overlap`, 0 where one side is always the longer one and
        the value is extrapolated; `reason` where there was nothing to fit and the value is the raw rate.
    n (`int`): Rows.
"""

import evaluate

from trl_extensions.core.judge.win_rate import length_adjusted, length_balanced, win_rate
from trl_extensions.metrics import metric_info


class WinRate(evaluate.Metric):
    def _info(self):
        paper = "Dubois et al. (2024): Length-Controlled AlpacaEval: A Simple Way to Debias Automatic Evaluators"
        columns = ("predictions", "prediction_lengths", "reference_lengths")
        return metric_info(__doc__, paper, "2404.04475", **dict.fromkeys(columns, "float64"))

    def _compute(self, predictions, prediction_lengths, reference_lengths, **options):
        columns = (predictions, prediction_lengths, reference_lengths)
        raw = win_rate(predictions, **options)
        balanced, adjusted = length_balanced(*columns, **options), length_adjusted(*columns, **options)
        rest = {name: raw[name] for name in ("low", "high", "n")}
        return {"win_rate": raw["value"], "length_balanced": balanced, "length_adjusted": adjusted} | rest
