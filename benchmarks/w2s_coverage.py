"""How often do intervals of 95 % hold the truth? Simulated weak-to-strong runs with known accuracies.

A run has S seeds, and three models whose accuracy deviates from seed to seed; some rows are hard for every seed, by a
latent difficulty that explains the share `--common` of what a row's answer depends on. Accuracy and PGR are compared
with the values that infinitely many seeds and rows would give.

    python benchmarks/w2s_coverage.py
"""

import argparse

import numpy as np
from scipy.stats import norm

from trl_extensions.weak_to_strong.evaluation import CEILING, STRONG, WEAK, Comparison


MODELS, ACCURACIES = (WEAK, STRONG, CEILING), (0.65, 0.75, 0.85)


def coverage(
    seeds: int, deviation: float, rows: int = 500, common: float = 0.6, runs: int = 1000
) -> tuple[float, ...]:
    """Shares of runs whose interval holds the student's accuracy, and its PGR; of PGR among the runs that define it,
    with the share that does."""
    random, held, recovered = np.random.default_rng(0), [], []
    for _ in range(runs):
        shares = np.clip(np.array(ACCURACIES) + deviation * random.normal(size=(seeds, 3)), 0.01, 0.99)
        alone, shared = random.normal(size=(seeds, rows, 3)), random.normal(size=(rows, 1))
        right = np.sqrt(common) * shared + np.sqrt(1 - common) * alone < norm.ppf(shares)[:, None]
        compared = Comparison(MODELS, right.mean(axis=1), right.astype(float))
        own, gap = compared.estimate({STRONG: 1}), compared.pgr(STRONG)
        held.append(own["low"] <= ACCURACIES[1] <= own["high"])
        if gap["value"] is not None:
            recovered.append(gap["low"] <= 0.5 <= gap["high"])
    return float(np.mean(held)), float(np.mean(recovered or [np.nan])), len(recovered) / runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--common", type=float, default=0.6)
    options = parser.parse_args()
    print(
        "| seeds | deviation, points | accuracy covered | PGR covered | PGR defined |\n| --- | --- | --- | --- | --- |"
    )
    for seeds in (2, 3, 5):
        for points in range(5):
            found = coverage(seeds, points / 100, options.rows, options.common, options.runs)
            print(f"| {seeds} | {points} | {' | '.join(f'{share:.1%}' for share in found)} |", flush=True)


if __name__ == "__main__":
    main()
