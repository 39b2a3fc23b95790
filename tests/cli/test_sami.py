"""`trl-ext sami`: strict arguments, the single commands, and launching through accelerate."""

import json
import os
import subprocess
import sys

import yaml

from tests.sami.test_run import arguments, files  # noqa: F401 (fixtures)
from trl_extensions.cli.main import main
from trl_extensions.cli.method import split_launch_arguments
from trl_extensions.cli.sami import METHOD


def error_of(capsys, argv) -> str:
    assert main(["sami", *map(str, argv)]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("trl-ext: error:")]
    assert len(lines) == 1
    return lines[0]


class TestStrictness:
    def test_unknown_option(self, arguments, capsys):  # noqa: F811
        assert "--no_such_option" in error_of(capsys, ["run", *arguments(), "--no_such_option", "1"])

    def test_unknown_key_in_yaml(self, files, capsys):  # noqa: F811
        (files / "c.yaml").write_text("no_such_key: 1\nuse_cpu: true\nbf16: false\n")
        assert "no_such_key" in error_of(capsys, ["run", "--config", files / "c.yaml"])

    def test_yaml_value_outside_its_choices(self, files, capsys):  # noqa: F811
        # argparse does not check choices of defaults, and YAML values become defaults
        (files / "c.yaml").write_text("logp_reduction: median\nuse_cpu: true\nbf16: false\n")
        message = error_of(capsys, ["run", "--config", files / "c.yaml"])
        assert "`logp_reduction` must be one of mean, sum" in message

    def test_missing_config_file(self, files, capsys):  # noqa: F811
        assert "no_such.yaml" in error_of(capsys, ["run", "--config", files / "no_such.yaml"])

    def test_missing_model(self, arguments, files, capsys):  # noqa: F811
        message = error_of(capsys, ["run", *arguments(model_name_or_path=files / "nowhere")])
        assert "nowhere" in message

    def test_template_with_an_unknown_field(self, arguments, capsys):  # noqa: F811
        message = error_of(capsys, ["run", *arguments(sampling_template="{question} {constitution}")])
        assert (
            "`sampling_template` must have the fields {query} and {constitution}" in message
            and "{question}" in message
        )

    def test_unknown_command(self, capsys):
        assert "choose from sample, train, evaluate, principles, run" in error_of(capsys, ["frobnicate"])

    def test_yaml_and_command_line_agree(self, arguments, files):  # noqa: F811
        given = arguments()
        pairs = dict(zip(given[::2], given[1::2], strict=True))
        config = {name[2:]: value if value == "no" else yaml.safe_load(value) for name, value in pairs.items()}
        (files / "c.yaml").write_text(yaml.safe_dump(config))
        by_yaml, by_line = METHOD.parse("run", ["--config", str(files / "c.yaml")]), METHOD.parse("run", given)
        assert by_yaml.args == by_line.args and by_yaml.model_args == by_line.model_args
        assert by_yaml.config.to_dict() == by_line.config.to_dict()
        # the command line wins over the file
        assert METHOD.parse("run", ["--config", str(files / "c.yaml"), "--rounds", "5"]).args.rounds == 5


def test_sample_train_evaluate(arguments, files, capsys):  # noqa: F811
    common = arguments("parts")
    assert main(["sami", "sample", *common]) == 0
    rows = files / "parts" / "samples.jsonl"
    assert len(rows.read_text().splitlines()) == 20  # the training queries; 4 are held out
    assert main(["sami", "train", *common, "--dataset_name", str(rows), "--max_steps", "2"]) == 0
    model = files / "parts" / "model"
    assert (model / "adapter_model.safetensors").exists()
    assert "model saved to" in capsys.readouterr().out
    # a finished model is not overwritten
    assert "exists already" in error_of(capsys, ["train", *common, "--dataset_name", rows, "--max_steps", "2"])
    evaluation = arguments("evaluation", model_name_or_path=model)
    assert main(["sami", "evaluate", *evaluation]) == 0
    result = json.loads((files / "evaluation" / "evaluation.json").read_text())
    assert result["num_queries"] + result["num_empty"] == 4 and result["kl"]["mean"] > 0


def test_train_without_rows(arguments, files, capsys):  # noqa: F811
    assert "`train` needs `dataset_name`" in error_of(capsys, ["train", *arguments()])
    message = error_of(capsys, ["train", *arguments(), "--dataset_name", files / "none.jsonl"])
    assert "no such file" in message


class TestLaunching:
    def test_arguments_are_divided(self, arguments, files):  # noqa: F811
        (files / "accelerate.yaml").write_text("distributed_type: MULTI_GPU\n")
        own = arguments()
        extra = ["--accelerate_config", str(files / "accelerate.yaml"), "--num_processes", "2"]
        launch, rest = split_launch_arguments(METHOD.parser("train", []), own[:4] + extra + own[4:])
        assert rest == own
        assert launch == ["--config_file", str(files / "accelerate.yaml"), "--num_processes", "2"]

    def test_trl_names_are_known(self, arguments):  # noqa: F811
        launch, _ = split_launch_arguments(METHOD.parser("train", []), [*arguments(), "--accelerate_config", "fsdp2"])
        assert launch[0] == "--config_file" and launch[1].endswith("fsdp2.yaml")

    def test_nothing_to_launch(self, arguments):  # noqa: F811
        assert split_launch_arguments(METHOD.parser("train", []), arguments()) == ([], arguments())

    def test_two_processes_train_every_round(self, arguments, files):  # noqa: F811
        (files / "accelerate.yaml").write_text(
            "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_CPU\nnum_machines: 1\nmachine_rank: 0\n"
            "use_cpu: true\nmixed_precision: 'no'\n"
        )
        command = [sys.executable, "-m", "trl_extensions", "sami", "run", *arguments(rounds=1)]
        command += ["--accelerate_config", str(files / "accelerate.yaml"), "--num_processes", "2"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TRL_EXT_DEBUG": "1"}
        result = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert result.returncode == 0, result.stderr[-3000:]
        state = json.loads((files / "run" / "round_1" / "train" / "trainer_state.json").read_text())
        assert state["global_step"] == 1  # 2 processes x 1 query make the step of 2 queries
        assert (files / "run" / "report.md").exists()

    def test_run_is_not_launched_itself(self, arguments, capsys, monkeypatch):  # noqa: F811
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert "pass --accelerate_config" in error_of(capsys, ["run", *arguments()])
