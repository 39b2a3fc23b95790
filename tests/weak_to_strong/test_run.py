"""Runs from end to end on tiny models: what they leave, how they resume, and that reports say what their files say."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from trl_extensions.cli.main import main
from trl_extensions.core.runs.jsonl import read_jsonl


GOOD = [
    "boil an egg",
    "explain the sky",
    "be friendly",
    "cool the water",
    "jump over a dog",
    "write a poem",
    "sort a list",
]
BAD = ["steal an egg", "hide the body", "be cruel", "poison the water", "hurt a dog", "forge a note", "break a lock"]


def requests(number: int, part: str) -> list[dict]:
    rows = []
    for i in range(number):
        label = i % 2
        what = (BAD if label else GOOD)[i // 2 % len(GOOD)]
        rows.append({"text": f"Please {what}, {part} {i}.", "label": ["safe", "unsafe"][label], "topic": i // 4})
    return rows


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def arguments(tmp_path, tiny_model_dir):
    """A run of a bag-of-words model and a linear probe, one seed, two losses."""
    return [
        "--model_name_or_path", str(tiny_model_dir), "--weak_models", "sklearn:naive-bayes",
        "--examples", write(tmp_path / "train.jsonl", requests(48, "train")),
        "--test_examples", write(tmp_path / "test.jsonl", requests(16, "test")),
        "--variants", "soft_ce", "confidence", "--seeds", "0", "--num_train_epochs", "2", "--linear_probe", "true",
        "--per_device_train_batch_size", "8", "--learning_rate", "0.01", "--use_cpu", "true", "--bf16", "false",
        "--gradient_checkpointing", "false", "--report_to", "none", "--save_strategy", "no", "--disable_tqdm", "true",
        "--output_dir", str(tmp_path / "out"),
    ]  # fmt: skip


def accuracy(path: Path) -> float:
    rows = read_jsonl(path)
    return sum(int(np.argmax(row["probs"])) == row["label"] for row in rows) / len(rows)


def test_run_reports_what_its_files_say_and_resumes(arguments, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["w2s", "run", *arguments]) == 0
    evaluation = json.loads((out / "evaluation.json").read_text())
    said = out / "predictions" / "seed_0"
    for name in ("weak", "ceiling", "soft_ce", "confidence"):
        assert evaluation["scores"][name]["accuracy"]["value"] == pytest.approx(accuracy(said / f"{name}.jsonl"))
        assert [row["label"] for row in read_jsonl(said / f"{name}.jsonl")] == [0, 1] * 8
    labels = read_jsonl(out / "seed_0" / "labels" / "stage_0" / "weak_labels.jsonl")
    assert len(labels) == 24
    assert (out / "report.md").is_file()
    assert any(out.glob("*.png"))

    before = {path: path.stat().st_mtime_ns for path in out.glob("predictions/*/*")}
    (said / "confidence.jsonl").unlink()
    capsys.readouterr()
    assert main(["w2s", "run", *arguments]) == 0
    printed = capsys.readouterr().out
    assert printed.count("done already") == 3
    after = {path: path.stat().st_mtime_ns for path in out.glob("predictions/*/*")}
    assert {path.stem for path in after if after[path] != before[path]} == {"confidence"}


def test_other_settings_are_refused_but_further_seeds_and_variants_are_not(arguments, tmp_path, capsys):
    assert main(["w2s", "run", *arguments]) == 0
    assert main(["w2s", "run", *arguments, "--learning_rate", "0.02"]) == 2
    assert "learning_rate was 0.01, now 0.02" in capsys.readouterr().err
    assert main(["w2s", "run", *arguments, "--variants", "product", "soft_ce+weights", "--seeds", "0", "1"]) == 0
    said = {str(path.relative_to(tmp_path / "out" / "predictions")) for path in tmp_path.glob("out/predictions/*/*")}
    assert {"seed_1/product.jsonl", "seed_1/soft_ce+weights.jsonl", "seed_0/confidence.jsonl"} <= said


def test_probe_asks_the_backbone_about_each_text_once(arguments, monkeypatch):
    from trl_extensions.weak_to_strong.labels import transformer_learner

    asked = []
    real = transformer_learner.features

    def counted(model, token_ids, **options):
        asked.extend(map(tuple, token_ids))
        return real(model, token_ids, **options)

    monkeypatch.setattr(transformer_learner, "features", counted)
    assert main(["w2s", "run", *arguments, "--seeds", "0", "1"]) == 0
    assert len(asked) == len(set(asked))
    assert len(asked) <= 48 + 16


def test_first_layers_of_the_model_teach_all_of_it(arguments, tiny_model_dir, tmp_path):
    arguments[arguments.index("sklearn:naive-bayes")] = f"{tiny_model_dir}[:1]"
    arguments[arguments.index("--linear_probe") + 1] = "false"
    own = ["--variants", "soft_ce", "--num_train_epochs", "1", "--use_peft", "--save_models", "true"]
    assert main(["w2s", "run", *arguments, *own]) == 0
    saved = tmp_path / "out" / "seed_0" / "soft_ce" / "model"
    assert (saved / "adapter_config.json").is_file()
    # `evaluate` loads the saved adapter by another path and must say the same
    said = tmp_path / "out" / "predictions" / "seed_0"
    model = ["--model_name_or_path", str(saved), "--output_dir", str(tmp_path / "alone")]
    compare = ["--weak_predictions", str(said / "weak.jsonl"), "--ceiling_predictions", str(said / "ceiling.jsonl")]
    assert main(["w2s", "evaluate", *arguments, *model, *compare]) == 0
    again = [row["probs"] for row in read_jsonl(tmp_path / "alone" / "predictions.jsonl")]
    first = [row["probs"] for row in read_jsonl(said / "soft_ce.jsonl")]
    np.testing.assert_allclose(again, first, atol=1e-4)


def test_groups_stay_on_one_side(arguments, tmp_path):
    assert main(["w2s", "run", *arguments, "--group_column", "topic", "--variants", "soft_ce"]) == 0
    labelled = {row["text"] for row in read_jsonl(tmp_path / "out/seed_0/labels/stage_0/weak_labels.jsonl")}
    for topic in range(12):
        texts = {row["text"] for row in requests(48, "train") if row["topic"] == topic}
        assert texts <= labelled or not texts & labelled


def test_groups_on_both_sides_of_the_test_are_said(arguments, tmp_path, caplog):
    assert main(["w2s", "label", *arguments, "--group_column", "topic"]) == 0
    # Topics 0 to 3 of the test rows are topics of training rows too
    assert "4 groups (0, ...) have rows in `examples` and in the test" in caplog.text


def test_label_then_train(arguments, tmp_path):
    assert main(["w2s", "label", *arguments]) == 0
    made = tmp_path / "out" / "weak_labels.jsonl"
    assert len(read_jsonl(made)) == 24
    target = ["--output_dir", str(tmp_path / "trained"), "--dataset_name", str(made)]
    assert main(["w2s", "train", *arguments, *target, "--loss_type", "confidence"]) == 0
    assert (tmp_path / "trained" / "model" / "config.json").is_file()


def test_label_rows_without_labels(arguments, tmp_path):
    rows = [{"text": row["text"]} for row in requests(10, "new")]
    assert main(["w2s", "label", *arguments, "--unlabelled", write(tmp_path / "new.jsonl", rows)]) == 0
    made = read_jsonl(tmp_path / "out" / "weak_labels.jsonl")
    assert [row["text"] for row in made] == [row["text"] for row in rows]
    assert {row["label"] for row in made} == {None}


def test_reward_run(arguments, tiny_model_dir, tmp_path):
    def pairs(number, part):
        return [
            {"prompt": f"{part} {i}?", "chosen": f"Sure, {GOOD[i % 7]}.", "rejected": f"No, {BAD[i % 7]}."}
            for i in range(number)
        ]

    arguments[arguments.index("--examples") + 1] = write(tmp_path / "p.jsonl", pairs(32, "train"))
    arguments[arguments.index("--test_examples") + 1] = write(tmp_path / "q.jsonl", pairs(12, "test"))
    place = arguments.index("--linear_probe")
    arguments = arguments[:place] + arguments[place + 2 :]
    own = ["--task", "reward", "--variants", "soft_ce", "--num_train_epochs", "1"]
    assert main(["w2s", "run", *arguments, *own]) == 0
    said = read_jsonl(tmp_path / "out/predictions/seed_0/soft_ce.jsonl")
    assert len(said) == 12
    assert {row["label"] for row in said} == {0, 1}
    # The bag-of-words teacher has an easy task: "Sure" is always better
    assert accuracy(tmp_path / "out/predictions/seed_0/weak.jsonl") == 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--variants", "softce"], "'softce' is none"),
        (["--weak_models", "sklearn:forest"], "forest"),
        (["--examples_where", "split"], "`examples_where` must be a column"),
        (["--seeds", "1", "1"], "`seeds` must be"),
        (["--form", "ranking"], "task"),
        (["--weak_share", "1.5"], "`weak_share`"),
        (["--label_column", "klass"], "klass"),
        (["--weak_models", "x[2:4]"], "first 4 layers"),
    ],
)
def test_bad_settings_are_one_line(arguments, change, message, capsys):
    assert main(["w2s", "run", *arguments, *change]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error


def test_test_rows_among_the_examples_are_refused(arguments, capsys):
    arguments[arguments.index("--test_examples") + 1] = arguments[arguments.index("--examples") + 1]
    assert main(["w2s", "run", *arguments]) == 2
    assert "all 48 test examples are among `examples` too" in capsys.readouterr().err


def test_known_test_rows_are_left_out(arguments, tmp_path, caplog):
    rows = requests(16, "test") + requests(4, "train")
    arguments[arguments.index("--test_examples") + 1] = write(tmp_path / "mixed.jsonl", rows)
    assert main(["w2s", "run", *arguments, "--variants", "soft_ce"]) == 0
    assert "4 of 20 test examples are among `examples` and left out" in caplog.text
    assert len(read_jsonl(tmp_path / "out/predictions/seed_0/weak.jsonl")) == 16


def test_form_is_read_from_the_yaml(tmp_path, capsys):
    path = tmp_path / "config.yaml"
    path.write_text(
        "form: generation\nscorer: profanity\nlinear_probe: true\nuse_cpu: true\nbf16: false\noutput_dir: x\n"
    )
    assert main(["w2s", "run", "--config", str(path)]) == 2
    assert "linear_probe" in capsys.readouterr().err  # an option of the other form
    assert not os.path.exists("x")


@pytest.fixture
def unlabelled(arguments, tmp_path):
    """The same without true labels for the student's rows and the test rows."""
    texts = [{"text": row["text"]} for row in requests(48, "more")]
    held_out = [{"text": row["text"]} for row in requests(80, "test")]
    arguments[arguments.index("--test_examples") + 1] = write(tmp_path / "held_out.jsonl", held_out)
    arguments[arguments.index("--seeds") + 1 : arguments.index("--seeds") + 2] = ["0", "1"]
    checks = ["--check_models", "sklearn:tfidf-logreg", "sklearn:char-logreg", "--test_labels", "false"]
    return [*arguments, "--unlabelled", write(tmp_path / "more.jsonl", texts), *checks]


def test_a_run_without_true_labels_forecasts(unlabelled, tmp_path):
    assert main(["w2s", "run", *unlabelled, "--variants", "soft_ce"]) == 0
    out = tmp_path / "out"
    assert not list(out.glob("predictions/*/ceiling.jsonl"))
    labelled = read_jsonl(out / "seed_0" / "labels" / "stage_0" / "weak_labels.jsonl")
    assert len(labelled) == 48 and all(", more " in row["text"] for row in labelled)
    own = json.loads((out / "evaluation.json").read_text())
    assert set(own) == {"forecast"} and set(own["forecast"]["soft_ce"]["by_checker"]) == {
        "sklearn:tfidf-logreg", "sklearn:char-logreg",
    }  # fmt: skip
    teacher, student = (
        [int(np.argmax(row["probs"])) for row in read_jsonl(out / f"predictions/seed_0/{name}.jsonl")]
        for name in ("weak", "soft_ce")
    )
    assert len(teacher) == 80 and own["forecast"]["soft_ce"]["disagreement"]["value"] <= 1
    assert "Forecast without true labels" in (out / "report.md").read_text()
    # `evaluate` says the same of one seed's predictions
    said = out / "predictions" / "seed_0"
    files = ["--predictions", str(said / "soft_ce.jsonl"), "--weak_predictions", str(said / "weak.jsonl")]
    checks = [str(path) for path in said.glob("check*")]
    rest = ["--output_dir", str(tmp_path / "alone"), "--use_cpu", "true", "--bf16", "false"]
    assert main(["w2s", "evaluate", *files, "--check_predictions", *checks, *rest]) == 0
    alone = json.loads((tmp_path / "alone" / "evaluation.json").read_text())["forecast"]["w2s"]
    assert alone["disagreement"]["value"] == pytest.approx(np.mean(np.array(teacher) != student))


def test_what_a_forecast_needs(unlabelled, arguments, tmp_path, capsys):
    at = unlabelled.index("--unlabelled")
    assert main(["w2s", "run", *unlabelled[:at], *unlabelled[at + 2 :]]) == 2
    assert "`check_models` needs `unlabelled`" in capsys.readouterr().err
    assert main(["w2s", "run", *arguments, "--test_labels", "false"]) == 2
    assert "`test_labels`" in capsys.readouterr().err


def test_scores_by_subgroup(arguments, tmp_path):
    extra = ["--subgroup_column", "label", "--variants", "soft_ce", "--seeds", "0", "1"]
    assert main(["w2s", "run", *arguments, *extra]) == 0
    own = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    # Subgroups that are the classes: what is accuracy there is recall
    for name in ("safe", "unsafe"):
        assert own["by_subgroup"][name]["scores"] == own["by_class"][name]["scores"]
    assert own["class_names"] == ["safe", "unsafe"]
    report = (tmp_path / "out" / "report.md").read_text()
    assert "By subgroup" in report and "Worst subgroup" in report
