"""Win rates with and without length, as a module of the `evaluate` library."""

import datasets
import evaluate

from trl_extensions.core.judge.win_rate import length_adjusted, length_balanced, win_rate


_CITATION = """\
@article{dubois2024length,
    title = {Length-Controlled {AlpacaEval}: A Simple Way to Debias Automatic Evaluators},
    author = {Dubois, Yann and Galambosi, Bal{\\'a}zs and Liang, Percy and Hashimoto, Tatsunori B.},
    journal = {arXiv preprint arXiv:2404.04475},
    year = {2024}
}
"""

_DESCRIPTION = """\
How often a model's answers are judged better than another's, a tie being half a win: as it is, averaged over pairs in
which the answer is shorter, about equally long and longer, and at equal length by a logistic regression. Where the
three differ, length had a part in the wins. Each comes with an interval.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list` of `float`): Outcome of every pair: 1 the model's answer won, 0.5 tie, 0 it lost. Leave out
        pairs on which the judge could not be read.
    prediction_lengths (`list` of `float`): Lengths of the model's answers: tokens, words or characters.
    reference_lengths (`list` of `float`): Lengths of the other answers, in the same unit.
    groups (`list`, *optional*): Which rows belong together, e.g. the prompt they answer; drawn together.
    confidence (`float`, defaults to 0.95): Coverage of the intervals.
    resamples (`int`, defaults to 2000): Of the bootstrap.
    seed (`int`, defaults to 0): Of the bootstrap.

Returns:
    win_rate, low, high (`float`): The raw rate; Wilson's interval, or with groups a bootstrap over these.
    length_balanced (`dict`): `value`, `low`, `high`; `strata`, the number of rows and the rate of each; `empty`, those
        without rows, which the value leaves out.
    length_adjusted (`dict`): `value`, `low`, `high`, `slope`; `overlap`, 0 where one side is always the longer one and
        the value is extrapolated; `reason` where there was nothing to fit and the value is the raw rate.
    n (`int`): Rows.

Examples:

    >>> import evaluate
    >>> from trl_extensions.metrics import metric_path
    >>> metric = evaluate.load(metric_path("win_rate"))
    >>> result = metric.compute(
    ...     predictions=[1, 1, 1, 0],
    ...     prediction_lengths=[90, 80, 70, 10],
    ...     reference_lengths=[20, 20, 20, 20],
    ... )
    >>> result["win_rate"], result["length_balanced"]["value"]
    (0.75, 0.5)
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class WinRate(evaluate.Metric):
    def _info(self):
        names = ("predictions", "prediction_lengths", "reference_lengths")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({name: datasets.Value("float64") for name in names}),
            reference_urls=["https://arxiv.org/abs/2404.04475"],
        )

    def _compute(
        self,
        predictions,
        prediction_lengths,
        reference_lengths,
        groups=None,
        confidence=0.95,
        resamples=2000,
        seed=0,
    ):
        settings = {"groups": groups, "confidence": confidence, "resamples": resamples, "seed": seed}
        columns = (predictions, prediction_lengths, reference_lengths)
        raw = win_rate(predictions, **settings)
        return {
            "win_rate": raw["value"],
            "low": raw["low"],
            "high": raw["high"],
            "length_balanced": length_balanced(*columns, **settings),
            "length_adjusted": length_adjusted(*columns, **settings),
            "n": raw["n"],
        }
