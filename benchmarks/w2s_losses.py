"""Do the two further losses of EleutherAI/w2s earn a place? Linear probes of SmolLM2-135M on four tasks, many seeds.

    python benchmarks/w2s_losses.py --data <folder> --output runs/w2s-losses

- window: the weak label's cross-entropy, of rows on which the student's highest probability is below 0.5 + radius.
- entropy: cross-entropy under (1 - c) q + c p, with p the student's own (detached) probabilities. Its gradient in the
  logits is p - ((1 - c) q + c p) = (1 - c)(p - q): that of soft cross-entropy at a smaller learning rate.

States of the frozen models are kept in --output, so a second call goes on. Everything else is that of
benchmarks/w2s_smollm2.yaml. Accuracies are means over seeds; differences are paired by seed and test row, with 95 %
intervals of a bootstrap over both (whole groups of rows).
"""

import argparse
import gzip
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from trl_extensions.embedded import resolve_model_name
from trl_extensions.weak_to_strong.data.examples import Example, split_halves, take_slice
from trl_extensions.weak_to_strong.labels.calibrate import apply_temperature, fit_temperature
from trl_extensions.weak_to_strong.loss import confidence_loss, product_loss, reverse_kl_loss, soft_cross_entropy
from trl_extensions.weak_to_strong.trainers.features import FeatureStore, features


EPOCHS, BATCH, RATE, DECAY, WARMUP, MAX_LENGTH = 15, 64, 2e-3, 0.1, 0.1, 256
# Task -> layers of teacher and student, share of the rows that the teacher sees
TASKS = {"safety_mix": (2, 30, 0.5), "hh_queries": (2, 30, 0.5), "ethics": (4, 16, 0.5), "privacy_qa": (4, 16, 0.2)}


def window(logits: torch.Tensor, q: torch.Tensor, radius: float) -> torch.Tensor:
    uncertain = logits.detach().softmax(-1).amax(-1) < 0.5 + radius
    return soft_cross_entropy(logits, q) * uncertain


def entropy(logits: torch.Tensor, q: torch.Tensor, coef: float) -> torch.Tensor:
    return soft_cross_entropy(logits, (1 - coef) * q + coef * logits.detach().softmax(-1))


def losses(q: np.ndarray) -> dict[str, Callable]:
    """Name -> loss of logits, soft labels and the share of the warm-up that has passed."""
    prior = torch.tensor(q.mean(axis=0), dtype=torch.float32)
    median = float(np.median(np.abs(q[:, 1] - 0.5)))
    return {
        "soft_ce": lambda x, y, share: soft_cross_entropy(x, y),
        "confidence": lambda x, y, share: confidence_loss(x, y, 0.5 * share, prior),
        "product": lambda x, y, share: product_loss(x, y, 1.0, share),
        "reverse_kl": lambda x, y, share: reverse_kl_loss(x, y),
        "window 0.15": lambda x, y, share: window(x, y, 0.15),
        "window 0.3": lambda x, y, share: window(x, y, 0.3),
        "window midweak": lambda x, y, share: window(x, y, median),
        "entropy": lambda x, y, share: entropy(x, y, 0.5 * share),
    }


def read(data: Path, name: str) -> tuple[list[Example], list[Example]]:
    def rows(path: str, text: Callable, group: Callable = lambda i, row: None) -> list[Example]:
        opener = gzip.open if path.endswith(".gz") else open
        with opener(data / path, "rt", encoding="utf-8") as file:
            own = [json.loads(line) for line in file]
        return [Example(f"{path}-{i}", text(r), r["label"], group(i, r)) for i, r in enumerate(own)]

    def find(stem: str) -> str:
        return str(next(data.glob(f"{stem}.jsonl*")).relative_to(data))

    if name == "safety_mix":
        return tuple(rows(find(f"safety_mix/{part}"), lambda r: r["prompt"]) for part in ("train", "test"))
    if name == "hh_queries":
        own = rows(find("hh_queries/train"), lambda r: r["text"])
        order = np.random.default_rng(0).permutation(len(own))
        return [own[i] for i in order[:1400]], [own[i] for i in order[1400:2000]]
    if name == "ethics":
        pair = lambda i, r: str(i // 2)  # noqa: E731 (neighbours are minimal pairs)
        return tuple(rows(find(f"ethics/commonsense_{part}"), lambda r: r["text"], pair) for part in ("train", "test"))
    text = lambda r: f"Clause: {r['text']}\nQuestion: {r['question']}\nDoes the clause answer the question?"  # noqa: E731
    path = find("legalbench/privacy_policy_qa")
    own = rows(path, text, lambda i, r: f"{r['split']}-{r['question_id']}")
    train, test = ([row for row in own if row.group.startswith(part)] for part in ("train", "test"))
    return train[:2000], test[:600]


def states(rows: list[Example], layers: int, folder: Path) -> np.ndarray:
    """`(N, H)` under the first layers of the frozen model."""
    store, loaded = FeatureStore(folder / f"layers_{layers}.npz"), []

    def compute(texts: list[str]) -> np.ndarray:
        if not loaded:
            path, device = (
                resolve_model_name("embedded:smollm2-135m-instruct"),
                "cuda" if torch.cuda.is_available() else "cpu",
            )
            options = {"num_hidden_layers": layers, "num_labels": 2, "dtype": torch.bfloat16}
            model = AutoModelForSequenceClassification.from_pretrained(path, **options).to(device)
            loaded.extend((model, AutoTokenizer.from_pretrained(path)))
            model.config.pad_token_id = loaded[1].pad_token_id
        token_ids = loaded[1](texts, truncation=True, max_length=MAX_LENGTH)["input_ids"]
        return features(loaded[0], token_ids, batch_tokens=2048)

    return store.get([row.text for row in rows], compute)


def fit(x: np.ndarray, q: np.ndarray, loss: Callable, seed: int) -> torch.nn.Linear:
    torch.manual_seed(seed)
    head = torch.nn.Linear(x.shape[1], q.shape[1], bias=False)
    torch.nn.init.normal_(head.weight, std=0.02)
    optimizer = torch.optim.AdamW(head.parameters(), lr=RATE, weight_decay=DECAY)
    x, q = torch.tensor(x), torch.tensor(q, dtype=torch.float32)
    steps = EPOCHS * -(-len(x) // BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    done = 0
    for _ in range(EPOCHS):
        for places in torch.randperm(len(x)).split(BATCH):
            optimizer.zero_grad()
            loss(head(x[places]), q[places], min(1.0, done / (WARMUP * steps))).mean().backward()
            torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            done += 1
    return head


def probs(head: torch.nn.Linear, x: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return head(torch.tensor(x)).double().softmax(-1).numpy()


def one_seed(name: str, train: list, test: list, own: dict[str, np.ndarray], seed: int) -> dict[str, np.ndarray]:
    """Name of a loss -> whether each test row is right, of the teacher and the ceiling too."""
    places = {row.id: i for i, row in enumerate(train)}
    labelled, target = split_halves(train, share=TASKS[name][2], seed=seed)
    held, rest = take_slice(labelled, 0.2, seed=seed)

    def of(rows: list) -> list[int]:
        return [places[row.id] for row in rows]

    def true(rows: list) -> np.ndarray:
        return np.array([row.label for row in rows])

    imitate = losses(np.eye(2))["soft_ce"]
    teacher = fit(own["weak_train"][of(rest)], np.eye(2)[true(rest)], imitate, seed)
    temperature, _ = fit_temperature(probs(teacher, own["weak_train"][of(held)]), true(held))
    q = apply_temperature(probs(teacher, own["weak_train"][of(target)]), temperature)
    x, labels = own["train"][of(target)], true(test)
    found = {"teacher": probs(teacher, own["weak_test"]).argmax(1) == labels}
    for loss, function in losses(q).items():
        found[loss] = probs(fit(x, q, function, seed), own["test"]).argmax(1) == labels
    ceiling = fit(x, np.eye(2)[true(target)], imitate, seed)
    return found | {"ceiling": probs(ceiling, own["test"]).argmax(1) == labels}


def interval(difference: np.ndarray, groups: np.ndarray, draws: int = 2000) -> tuple[float, float, float]:
    """Mean and 95 % interval of `(S, N)` paired differences, drawing seeds and groups of rows."""
    random, names = np.random.default_rng(0), np.unique(groups)
    sums = np.stack([difference[:, groups == g].sum(axis=1) for g in names], axis=1)
    sizes = np.array([(groups == g).sum() for g in names])
    found = []
    for _ in range(draws):
        seeds, own = random.integers(len(sums), size=len(sums)), random.integers(len(names), size=len(names))
        found.append(sums[np.ix_(seeds, own)].mean(axis=0).sum() / sizes[own].sum())
    return float(difference.mean()), *map(float, np.quantile(found, [0.025, 0.975]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--limit", type=int, help="rows a part, to try it out")
    parser.add_argument("--only_features", action="store_true")
    args = parser.parse_args()
    table = {}
    for name in args.tasks:
        train, test = (part[: args.limit] for part in read(args.data, name))
        weak, strong, _ = TASKS[name]
        parts = {"": strong, "weak_": weak}
        own = {
            f"{prefix}{part}": states(rows, layers, args.output / name)
            for prefix, layers in parts.items()
            for part, rows in (("train", train), ("test", test))
        }
        if args.only_features:
            continue
        runs = [one_seed(name, train, test, own, seed) for seed in range(args.seeds)]
        right = {loss: np.stack([run[loss] for run in runs]).astype(float) for loss in runs[0]}
        groups = np.array([row.group or row.id for row in test])
        table[name] = {
            loss: {"accuracy": hits.mean()}
            | {f"minus {base}": interval(hits - right[base], groups) for base in ("soft_ce", "confidence", "product")}
            for loss, hits in right.items()
        }
        header = (
            "| loss | accuracy | minus soft_ce | minus confidence | minus product |\n| --- | --- | --- | --- | --- |"
        )
        print(f"\n{name}: {len(train)} + {len(test)} rows, {args.seeds} seeds\n\n{header}")
        for loss, entry in table[name].items():
            cells = [f"{100 * v:+.1f} ({100 * a:+.1f} to {100 * b:+.1f})" for v, a, b in list(entry.values())[1:]]
            print(f"| {loss} | {entry['accuracy']:.1%} | {' | '.join(cells)} |", flush=True)
    (args.output / "losses.json").write_text(json.dumps(table, indent=2))


if __name__ == "__main__":
    main()
