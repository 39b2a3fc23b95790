"""Every private name is really there, and a TRL outside the range is refused once and clearly."""

import subprocess
import sys

import pytest

from trl_extensions import _compat


@pytest.mark.parametrize("name", sorted(_compat.PRIVATE_NAMES))
def test_every_private_name_exists(name):
    value = getattr(_compat, name)
    assert callable(value) or (isinstance(value, dict) and value)


@pytest.mark.parametrize("version", ["1.15.2", "2.0.0", "0.29.0"])
def test_other_versions_are_refused(version):
    with pytest.raises(ImportError, match=rf"trl>=1.16,<2, but trl {version} is installed"):
        _compat.check_trl_version(version)


@pytest.mark.parametrize("version", ["1.16.0", "1.16.0.dev0", "1.99.1"])
def test_supported_versions_pass(version):
    _compat.check_trl_version(version)


def test_a_moved_name_is_one_clear_error(monkeypatch):
    monkeypatch.setitem(_compat.PRIVATE_NAMES, "moved", "trl.trainer.utils")
    with pytest.raises(ImportError, match=r"needs `moved` from `trl.trainer.utils`.*Supported: trl>=1.16,<2"):
        _compat.moved  # noqa: B018


def test_importing_the_package_loads_nothing_heavy():
    code = (
        "import sys, trl_extensions; "
        "heavy = {'torch', 'transformers', 'trl', 'datasets', 'numpy'} & set(sys.modules); "
        "sys.exit(str(heavy) if heavy else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_public_names_are_offered():
    import trl_extensions

    assert {"SAMIConfig", "SAMITrainer"} <= set(dir(trl_extensions))
    with pytest.raises(AttributeError, match="it offers"):
        trl_extensions.NoSuchTrainer  # noqa: B018
