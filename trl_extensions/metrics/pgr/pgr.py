"""Performance gap recovered, as a module of the `evaluate` library."""

import datasets
import evaluate
import numpy as np

from trl_extensions.weak_to_strong.evaluation import pgr_interval


_CITATION = """\
@article{burns2023weak,
    title = {Weak-to-Strong Generalization: Eliciting Strong Capabilities With Weak Supervision},
    author = {Burns, Collin and Izmailov, Pavel and Kirchner, Jan Hendrik and Baker, Bowen and Gao, Leo and
        Aschenbrenner, Leopold and Chen, Yining and Ecoffet, Adrien and Joglekar, Manas and Leike, Jan and
        Sutskever, Ilya and Wu, Jeff},
    journal = {arXiv preprint arXiv:2312.09390},
    year = {2023}
}
"""

_DESCRIPTION = """\
Performance gap recovered (PGR): the share of the accuracy gap between a weak model and a ceiling (the strong model
trained on true labels) that a strong model trained on the weak model's labels has closed. 0: no better than its weak
teacher, 1: as good as the ceiling. It is undefined where the ceiling is not above the weak model.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list` of `int`): Classes predicted by the strong model trained on weak labels.
    references (`list` of `int`): True classes.
    weak_predictions (`list` of `int`): Classes predicted by the weak model.
    ceiling_predictions (`list` of `int`): Classes predicted by the strong model trained on true labels.
    groups (`list`, *optional*): Which rows belong together, e.g. the question they ask; drawn together.
    confidence (`float`, defaults to 0.95): Coverage of the interval.
    resamples (`int`, defaults to 2000): Of the bootstrap over rows.
    seed (`int`, defaults to 0): Of the bootstrap.

Returns:
    pgr (`float` or `None`): Performance gap recovered; None where undefined.
    low, high (`float` or `None`): Bootstrap interval of it, over the resamples that have a gap.
    weak, strong, ceiling (`float`): Accuracies.
    reason (`str` or `None`): Why there is no PGR.
    undefined_share (`float`): Share of resamples without a gap; above 0.05 the interval is not to be relied upon.

Examples:

    >>> import evaluate
    >>> from trl_extensions.metrics import metric_path
    >>> pgr = evaluate.load(metric_path("pgr"))
    >>> result = pgr.compute(
    ...     references=[1] * 10,
    ...     weak_predictions=[1] * 6 + [0] * 4,
    ...     predictions=[1] * 7 + [0] * 3,
    ...     ceiling_predictions=[1] * 8 + [0] * 2,
    ... )
    >>> round(result["pgr"], 6)
    0.5
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class PGR(evaluate.Metric):
    def _info(self):
        names = ("predictions", "references", "weak_predictions", "ceiling_predictions")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({name: datasets.Value("int64") for name in names}),
            reference_urls=["https://arxiv.org/abs/2312.09390"],
        )

    def _compute(
        self,
        predictions,
        references,
        weak_predictions,
        ceiling_predictions,
        groups=None,
        confidence=0.95,
        resamples=2000,
        seed=0,
    ):
        columns = {"weak": weak_predictions, "strong": predictions, "ceiling": ceiling_predictions}
        right = {name: np.equal(column, references).astype(float) for name, column in columns.items()}
        result = pgr_interval(**right, groups=groups, confidence=confidence, resamples=resamples, seed=seed)
        accuracies = {name: float(values.mean()) for name, values in right.items()}
        kept = ("low", "high", "reason", "undefined_share")
        return {"pgr": result["value"]} | accuracies | {name: result[name] for name in kept}
