"""Does a forecast without true labels say what weak-to-strong training gained?

Every task of a folder of labelled texts, three teachers and two students each, and the forecast of
`trl_extensions.weak_to_strong.forecast` beside the truth, which it does not see. Teachers are probes of the first 2 or
6 layers of the 135M, or a bag of words, and learn from a quarter of the training rows; two checkers learn from another
quarter; the student, a probe of all layers, from the teacher's soft labels of the rest (imitation, or the fixed point
of the product loss). Of the tfidf teacher the checkers are unlike it in turn only, since the task has no third kind.
States and finished tasks are kept in `--output`; the rest is taken up where it stopped.

    python benchmarks/w2s_forecast.py --data DATA --output runs/w2s_forecast
"""

import argparse
import gzip
import json
from pathlib import Path

import numpy as np


DEPTHS = (2, 6, 12, 20, 30)
# Task: file of training rows, file of test rows, columns of the text, how many of each
TASKS = {
    "hh_queries": ("hh_queries/train.jsonl", None, ("text",), 1400, 600),
    "safety_mix": ("safety_mix/train.jsonl", "safety_mix/test.jsonl", ("prompt",), 1400, 500),
    "ethics": ("ethics/commonsense_train.jsonl", "ethics/commonsense_test.jsonl", ("text",), 1400, 500),
    "privacy_policy_qa": ("legalbench/privacy_policy_qa.jsonl.gz", "split", ("question", "text"), 1400, 600),
    "overruling": ("legalbench/overruling.jsonl", None, ("text",), 900, 500),
    "toxic_prompts": ("real_toxicity_prompts/prompts.jsonl.gz", None, ("prompt",), 1400, 600),
    "wiki_toxicity": ("wiki_toxicity/comments.jsonl", None, ("text",), 900, 500),
}


def read(path: Path) -> list[dict]:
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def load(data: Path, name: str) -> tuple[list[str], np.ndarray, int]:
    """Texts and labels of a task, and how many of them are for training: those come first."""
    train, test, columns, first, second = TASKS[name]
    rows = read(data / train)
    if test == "split":
        rows, held_out = ([row for row in rows if (row["split"] == part)] for part in ("train", "test"))
    elif test:
        held_out = read(data / test)
    else:
        np.random.default_rng(0).shuffle(rows)
        rows, held_out = rows[:-second], rows[-second:]
    chosen = rows[:first] + held_out[:second]
    texts = ["\n".join(row[column] for column in columns) for row in chosen]
    return texts, np.array([int(row["label"]) for row in chosen]), min(first, len(rows))


def states(texts: list[str], path: Path) -> np.ndarray:
    """States `(D, N, H)` of the last token after the first layers, of each depth, normed as the whole model would."""
    if path.exists():
        return np.load(path)["states"].astype(np.float32)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from trl_extensions.embedded import resolve_model_name

    name = resolve_model_name("embedded:smollm2-135m-instruct")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16).model.to(device).eval()
    ids = AutoTokenizer.from_pretrained(name)(texts, truncation=True, max_length=160)["input_ids"]
    found = np.zeros((len(DEPTHS), len(texts), model.config.hidden_size), np.float16)
    order = sorted(range(len(ids)), key=lambda place: len(ids[place]))
    for start in range(0, len(order), 32):
        places = order[start : start + 32]
        longest = len(ids[places[-1]])
        # Padding on the right: a causal model does not see it
        batch = torch.tensor([ids[place] + [0] * (longest - len(ids[place])) for place in places]).to(device)
        last = torch.tensor([len(ids[place]) - 1 for place in places])
        with torch.inference_mode():
            hidden = model(batch, output_hidden_states=True, use_cache=False).hidden_states
            for number, depth in enumerate(DEPTHS):
                own = hidden[depth][torch.arange(len(places)), last]
                own = own if depth == model.config.num_hidden_layers else model.norm(own)
                found[number, places] = own.float().cpu().numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, states=found)
    return found.astype(np.float32)


def probe(features, rows: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Probabilities of class 1 of all rows, learnt from soft labels of some: each row once a class, weighted."""
    from scipy.sparse import issparse, vstack
    from sklearn.linear_model import LogisticRegression

    if not issparse(features):
        features = (features - features[rows].mean(axis=0)) / (features[rows].std(axis=0) + 1e-6)
    weights = np.concatenate([labels, 1 - labels])
    used, own = weights > 1e-6, features[rows]
    both = vstack([own, own]).tocsr() if issparse(features) else np.concatenate([own, own])
    classes = np.repeat([1, 0], len(rows))
    model = LogisticRegression(C=10 if issparse(features) else 0.003, tol=1e-3)
    return model.fit(both[used], classes[used], sample_weight=weights[used]).predict_proba(features)[:, 1]


def student(features, rows: np.ndarray, soft: np.ndarray, rounds: int) -> np.ndarray:
    """What imitates the soft labels, or, after a few rounds, learns their product with its own predictions."""
    said = probe(features, rows, soft[rows])
    for _ in range(rounds):
        product = said[rows] * soft[rows]
        said = probe(features, rows, product / (product + (1 - said[rows]) * (1 - soft[rows])))
    return said


def measure(data: Path, output: Path, task: str, seeds: int) -> list[dict]:
    from sklearn.feature_extraction.text import TfidfVectorizer

    from trl_extensions.weak_to_strong.evaluation import Predictions, evaluate_run
    from trl_extensions.weak_to_strong.forecast import forecast

    texts, labels, first = load(data, task)
    views = dict(zip((f"L{depth}" for depth in DEPTHS), states(texts, output / "states" / f"{task}.npz"), strict=True))
    for name, options in (
        ("words", {"ngram_range": (1, 2)}),
        ("chars", {"analyzer": "char_wb", "ngram_range": (2, 4)}),
    ):
        vectorizer = TfidfVectorizer(sublinear_tf=True, min_df=2, **options).fit(texts[:first])
        views[name] = vectorizer.transform(texts)
    test = np.arange(first, len(texts))
    said: dict[str, list[np.ndarray]] = {}
    for seed in range(seeds):
        order = np.random.default_rng(seed).permutation(first)
        taught, checked, rest = np.split(order, [first // 4, first // 2])
        own = {"ceiling": probe(views["L30"], rest, labels[rest].astype(float))}
        own |= {
            f"checks {name}": probe(views[name], checked, labels[checked].astype(float))
            for name in ("words", "chars", "L2")
        }
        for weak in ("L2", "L6", "words"):
            own[weak] = soft = probe(views[weak], taught, labels[taught].astype(float))
            own |= {
                f"{weak} {loss}": student(views["L30"], rest, soft, n) for loss, n in (("soft_ce", 0), ("product", 2))
            }
        for name, probs in own.items():
            said.setdefault(name, []).append(probs[test])
    rows = []
    for weak, checkers in (("L2", ("words", "chars")), ("L6", ("words", "chars")), ("words", ("chars", "L2"))):
        for loss in ("soft_ce", "product"):
            roles = {"weak": weak, loss: f"{weak} {loss}", "ceiling": "ceiling"}
            runs = {
                seed: {
                    role: Predictions(
                        tuple(map(str, test)), labels[test], np.stack([1 - said[n][seed], said[n][seed]], axis=1)
                    )
                    for role, n in roles.items()
                }
                for seed in range(seeds)
            }
            true = evaluate_run(runs)
            classes = {name: [(own > 0.5).astype(int) for own in probs] for name, probs in said.items()}
            own = forecast(classes[weak], classes[f"{weak} {loss}"], {c: classes[f"checks {c}"] for c in checkers})
            rows.append({
                "task": task, "weak": weak, "loss": loss, "forecast": own,
                "scores": {role: true["scores"][role]["balanced_accuracy"]["value"] for role in roles},
                "gain": true["differences"]["balanced_accuracy"][loss],
                "pgr": true["pgr"]["balanced_accuracy"][loss],
            })  # fmt: skip
    return rows


def cell(estimate: dict) -> str:
    if estimate["value"] is None:
        return "none"
    return f"{estimate['value']:+.3f} ({estimate['low']:+.3f} to {estimate['high']:+.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("runs/w2s_forecast"))
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    if not options.data.is_dir():
        print(f"skipped: there is no {options.data}")
        return
    found = []
    for task in TASKS:
        path = options.output / f"{task}-{options.seeds}.json"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(measure(options.data, options.output, task, options.seeds)))
        found += json.loads(path.read_text())
    print(
        "| task | teacher | loss | balanced accuracy: teacher, student, ceiling | PGR | gain | forecast gain | ratio |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for row in found:
        shares = ", ".join(f"{value:.3f}" for value in row["scores"].values())
        cells = [cell(own) for own in (row["pgr"], row["gain"], row["forecast"]["gain"], row["forecast"]["ratio"])]
        print(f"| {' | '.join([row['task'], row['weak'], row['loss'], shares, *cells])} |")
    given = [row for row in found if row["forecast"]["gain"]["value"] is not None]
    inside = sum(
        own["low"] <= row["gain"]["value"] <= own["high"] for row in given for own in [row["forecast"]["gain"]]
    )
    pairs = np.array([[row["gain"]["value"], row["forecast"]["gain"]["value"]] for row in given])
    error, spread = np.abs(pairs[:, 1] - pairs[:, 0]).mean(), np.abs(pairs[:, 0]).mean()
    print(
        f"\n{len(given)} of {len(found)} have a forecast; {inside} of these intervals hold the true gain. Mean error "
    )
    print(f"{error:.3f} (of always saying 0: {spread:.3f}), correlation {np.corrcoef(pairs.T)[0, 1]:.2f}.")


if __name__ == "__main__":
    main()
