"""Settings: the old names of renamed ones work, and the YAML of an earlier version."""

import pytest

from trl_extensions.cli import codeclm
from trl_extensions.codeclm.config import CodecLMArguments, CodecLMConfig


OLD = {"near_duplicates": "dedup_threshold", "benchmarks": "decontaminate_against", "screen": "screens"}
OLD["safety_classifier"] = "screens"
VALUES = {"near_duplicates": 0.5, "benchmarks": ["a.jsonl"], "screen": ["profanity"], "safety_classifier": ["m:toxic"]}


@pytest.mark.parametrize("old", OLD)
def test_old_names_work_with_one_line_of_warning(old):
    with pytest.warns(FutureWarning, match=OLD[old]):
        config = CodecLMConfig(**{old: VALUES[old]})
    assert getattr(config, OLD[old]) == VALUES[old]
    with pytest.warns(FutureWarning, match=OLD[old]):
        assert getattr(config, old) == VALUES[old]


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_old_names_in_yaml_and_on_the_command_line(tmp_path):
    (tmp_path / "run.yaml").write_text("near_duplicates: 0.5\nbenchmarks: [a.jsonl, b.jsonl]\nstrong: some/model\n")
    argv = ["--config", str(tmp_path / "run.yaml"), "--screen", "profanity"]
    _, config, *_ = codeclm.METHOD.parser("run", argv).parse_args_and_config(argv)
    assert config.dedup_threshold == 0.5 and config.decontaminate_against == ["a.jsonl", "b.jsonl"]
    assert config.screens == ["profanity"] and config.strong == "some/model"


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"prompts": "a", "metadata": "b"}, "prompts"),
        ({"rewrite": "harder"}, "rewrite"),
        ({"num_instructions": 0}, "num_instructions"),
        ({"max_calls": 0}, "max_calls"),
        ({"dedup_threshold": 0}, "dedup_threshold"),
        ({"temperature": True}, "temperature"),
        ({"prompt_folder": "nowhere"}, "prompt_folder"),
    ],
)
def test_bad_settings_name_the_field(settings, field):
    with pytest.raises(ValueError, match=f"`{field}`") as error:
        CodecLMConfig(**settings)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("settings", [{"weight_by": "length"}, {"validation_share": 1.0}, {"num_metadata": 0}])
def test_bad_arguments_name_the_field(settings):
    with pytest.raises(ValueError, match=f"`{next(iter(settings))}`"):
        CodecLMArguments(**settings)
