"""Performance gap recovered (PGR): the share of the accuracy gap between a weak model and a ceiling (the strong model
trained on true labels) that a strong model trained on the weak model's labels has closed.

0: no better than its weak teacher, 1: as good as the ceiling. Undefined where the ceiling is not clear of the weak
model. The interval is that of these models on other rows; what another seed of training would give is not in it.

Args:
    predictions (`list` of `int`): Classes predicted by the strong model trained on weak labels.
    references (`list` of `int`): True classes.
    weak_predictions (`list` of `int`): Classes predicted by the weak model.
    ceiling_predictions (`list` of `int`): Classes predicted by the strong model trained on true labels.
    groups (`list`, *optional*): Which rows belong together, e.g. the question they ask; drawn together.
    confidence (`float`): Of the interval; 0.95.

Returns:
    pgr, low, high (`float` or `None`): PGR and its interval, Fieller's; None where undefined.
    weak, strong, ceiling (`float`): Accuracies.
    reason (`str` or `None`): Why there is no PGR.
"""

import warnings

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
        if unused := [name for name in ("resamples", "seed") if options.pop(name, None) is not None]:
            warnings.warn(f"{', '.join(unused)}: no effect, since the interval is not a bootstrap's", FutureWarning)
        columns = {"weak": weak_predictions, "strong": predictions, "ceiling": ceiling_predictions}
        right = {name: np.equal(column, references).astype(float) for name, column in columns.items()}
        found = pgr_interval(**right, **options)
        accuracies = {name: float(values.mean()) for name, values in right.items()}
        rest = {name: found[name] for name in ("low", "high", "reason")}
        return {"pgr": found["value"]} | accuracies | rest
