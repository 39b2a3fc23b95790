"""Performance gap recovered (PGR): the share of the accuracy gap between a weak model and a ceiling (the strong model
trained on true labels) that a strong model trained on the weak model's labels has closed.

0: no better than its weak teacher, 1: as good as the ceiling. Undefined where the ceiling is not above the weak model.

Args:
    predictions (`list` of `int`): Classes predicted by the strong model trained on weak labels.
    references (`list` of `int`): True classes.
    weak_predictions (`list` of `int`): Classes predicted by the weak model.
    ceiling_predictions (`list` of `int`): Classes predicted by the strong model trained on true labels.
    groups (`list`, *optional*): Which rows belong together, e.g. the question they ask; drawn together.
    confidence, resamples, seed: Of the bootstrap over rows: 0.95, 2000 and 0.

Returns:
    pgr, low, high (`float` or `None`): PGR and its interval, over the resamples that have a gap; None where undefined.
    weak, strong, ceiling (`float`): Accuracies.
    reason (`str` or `None`): Why there is no PGR.
    undefined_share (`float`): Share of resamples without a gap; above 0.05 the interval is not to be relied upon.
"""

import evaluate
import numpy as np

from trl_extensions.metrics import metric_info
from trl_extensions.weak_to_strong.evaluation import pgr_interval


class PGR(evaluate.Metric):
    def _info(self):
        title = "Weak-to-Strong Generalization: Eliciting Strong Capabilities With Weak Supervision"
        columns = ("predictions", "references", "weak_predictions", "ceiling_predictions")
        return metric_info(__doc__, f"Burns et al. (2023): {title}", "2312.09390", **dict.fromkeys(columns, "int64"))

    def _compute(self, predictions, references, weak_predictions, ceiling_predictions, **options):
        columns = {"weak": weak_predictions, "strong": predictions, "ceiling": ceiling_predictions}
        right = {name: np.equal(column, references).astype(float) for name, column in columns.items()}
        found = pgr_interval(**right, **options)
        accuracies = {name: float(values.mean()) for name, values in right.items()}
        rest = {name: found[name] for name in ("low", "high", "reason", "undefined_share")}
        return {"pgr": found["value"]} | accuracies | rest
