import subprocess
import sys
from dataclasses import fields

import pytest
import yaml

from trl_extensions.core.generation import EngineArguments, EngineSpec, parse_engine


def test_a_name_is_a_model_of_this_process():
    for name in ("HuggingFaceTB/SmolLM2-135M-Instruct", "./models/mine", "/models/a b", "gpt2"):
        assert parse_engine(name, "strong") == EngineSpec(EngineArguments(engine="transformers", engine_model=name))


def test_an_address_is_an_endpoint():
    spec = parse_engine({"model": "m", "base_url": "http://localhost:1/v1", "concurrency": 64}, "strong")
    expected = EngineArguments(
        engine="endpoint", engine_model="m", engine_base_url="http://localhost:1/v1", engine_concurrency=64
    )
    assert spec == EngineSpec(expected, (0.0, 0.0))


def test_every_engine_argument_has_a_key():
    values = {
        "model": "m", "dtype": "float32", "batch_tokens": 7, "tensor_parallel_size": 2, "gpu_memory_utilization": 0.5,
        "base_url": "http://localhost", "api_key_env": "KEY", "concurrency": 3, "max_retries": 1, "timeout": 9.0,
        "extra_body": {"top_k": 5}, "max_tokens_field": "max_completion_tokens", "omit": ["seed"],
    }  # fmt: skip
    assert {f"engine_{key}" for key in values} | {"engine"} == {f.name for f in fields(EngineArguments)}
    arguments = parse_engine({"engine": "endpoint", **values}, "strong").arguments
    assert {key: getattr(arguments, f"engine_{key}") for key in values} == values


def test_yaml_as_a_command_line_gives_it():
    text = "{model: m, base_url: 'http://localhost:1/v1', prices: [0.5, 1.5]}"
    spec = parse_engine(text, "strong")
    assert spec == parse_engine(yaml.safe_load(text), "strong")
    assert spec.prices == (0.5, 1.5) and spec.arguments.engine == "endpoint"
    assert parse_engine({"engine": "vllm", "model": "m"}, "target").arguments.engine == "vllm"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (["m"], "`strong` must be a model's name or a dict"),
        ("[m]", "`strong` must be a model's name or a dict"),
        ("{model: m", "`strong` is neither a name nor YAML"),
        (7, "`strong` must be a model's name or a dict"),
        ({"model": "m", "url": "http://x"}, "`strong` has no key 'url'; it takes engine, prices, model, "),
        ({"model": "m", "engine": "tgi"}, "`strong`: engine must be one of transformers, vllm, endpoint, got 'tgi'"),
        ({"model": "m", "engine": "endpoint"}, "`strong`: .*needs engine_base_url"),
        ({"model": "m", "engine": "vllm", "base_url": "http://x"}, "`strong`: engine_base_url needs engine: endpoint"),
        ({"model": "m", "base_url": "http://x", "concurrency": 0}, "`strong`: `engine_concurrency`"),
        ({"model": "m", "base_url": "http://x", "concurrency": "many"}, "`strong`: `engine_concurrency`"),
        ({"model": "m", "timeout": "long", "base_url": "http://x"}, "`strong`: "),
        ({"model": "m", "prices": 3}, "`strong`: `prices` are two numbers.*got 3"),
        ({"model": "m", "prices": [1]}, "`strong`: `prices` are two numbers"),
        ({"model": "m", "prices": [1, -2]}, "`strong`: `prices` are two numbers"),
        ({"model": "m", "prices": [1, True]}, "`strong`: `prices` are two numbers"),
        ({"model": "m", "prices": ["1", "2"]}, "`strong`: `prices` are two numbers"),
        ({"model": "m", 3: "x"}, "`strong` has no key"),
    ],
)
def test_bad_setting_is_one_line(value, message):
    with pytest.raises(ValueError, match=message) as caught:
        parse_engine(value, "strong")
    assert "\n" not in str(caught.value)


def test_importing_it_imports_no_torch():
    program = (
        "import sys, trl_extensions.core.generation\n"
        "import trl_extensions.core.generation.client, trl_extensions.codeclm.pipeline.codec\n"
        "assert not {'torch', 'datasets', 'transformers', 'matplotlib'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
