"""What nobody set follows from the machine; what was set does not."""

import os

import pytest
import torch

from trl_extensions import (
    SAMIConfig,
    TNTConfig,
    WeakToStrongConfig,
    WeakToStrongRewardConfig,
    WeakToStrongSFTConfig,
)
from trl_extensions.codeclm.training import CodecLMTrainingConfig
from trl_extensions.core.training import load


CONFIGS = [
    SAMIConfig, TNTConfig, WeakToStrongConfig, WeakToStrongRewardConfig, WeakToStrongSFTConfig, CodecLMTrainingConfig,
]  # fmt: skip


@pytest.fixture
def machine(monkeypatch):
    def of(*, accelerator: bool, amx: bool) -> None:
        monkeypatch.setattr(torch.accelerator, "is_available", lambda *_, **__: accelerator)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": amx}, raising=False)

    return of


@pytest.mark.parametrize("config_class", CONFIGS)
@pytest.mark.parametrize("amx", [True, False])
def test_nothing_set_trains_on_the_cpu(config_class, amx, machine):
    machine(accelerator=False, amx=amx)
    config = config_class("out")
    assert (config.use_cpu, config.bf16, config.device.type) == (True, amx, "cpu")


@pytest.mark.parametrize("amx", [True, False])
def test_what_is_set_wins(amx, machine):
    machine(accelerator=False, amx=amx)
    assert SAMIConfig("out", bf16=not amx).bf16 is not amx
    half = TNTConfig("out", fp16=True)
    assert (half.fp16, half.bf16) == (True, False)


def test_a_launcher_that_says_cpu_is_heard_on_a_machine_with_a_gpu(machine, monkeypatch):
    machine(accelerator=True, amx=False)
    monkeypatch.setitem(os.environ, "ACCELERATE_USE_CPU", "true")
    assert SAMIConfig("out").bf16 is False


def test_where_is_said_once(machine, caplog):
    machine(accelerator=False, amx=False)
    load.say_once.cache_clear()
    for _ in range(2):
        load.as_config(SAMIConfig("out"), SAMIConfig, "model", "SAMI")
    assert [record.args for record in caplog.records] == [("float32",)]
