import ast
import re
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest

from rtpurbo.errors import RTPurboError
from rtpurbo.serving.export import VLLM_ARCHITECTURES
from rtpurbo.serving.vllm import plugin
from rtpurbo.serving.vllm.versions import TO_INSTALL, check_version

ROOT = Path(__file__).parents[3]


def test_exports_and_plugin_name_the_same_architectures():
    assert {plugin.PREFIX + name for name in VLLM_ARCHITECTURES} == set(plugin.ARCHITECTURES)


def test_every_architecture_has_a_class():
    source = ROOT / "src" / Path(*plugin.MODELS.split(".")).with_suffix(".py")
    classes = {
        node.name for node in ast.parse(source.read_text()).body if isinstance(node, ast.ClassDef)
    }
    assert set(plugin.ARCHITECTURES) <= classes


def test_the_entry_point_is_the_function():
    tomllib = pytest.importorskip("tomllib")  # new in Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, name = project["entry-points"]["vllm.general_plugins"]["rtpurbo"].split(":")
    assert getattr(import_module(module), name) is plugin.register


@pytest.mark.parametrize("has_own", [True, False])
def test_settings_of_the_dense_architecture_apply(has_own, monkeypatch):
    calls = []

    class Dense:
        @staticmethod
        def verify_and_update_model_config(model_config):
            calls.append(("model", model_config))

        @staticmethod
        def verify_and_update_config(vllm_config):
            calls.append(("all", vllm_config))

    refusals = SimpleNamespace(check=lambda vllm_config: calls.append(("check", vllm_config)))
    monkeypatch.setitem(sys.modules, "rtpurbo.serving.vllm.refusals", refusals)
    check = plugin.config_check(Dense if has_own else None)
    check.verify_and_update_model_config(1)
    check.verify_and_update_config(2)
    assert calls == [("model", 1), ("all", 2), ("check", 2)][0 if has_own else 2 :]


def test_errors_are_logged_and_not_raised(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "vllm", None)
    plugin.register()
    assert "cannot register its sparse models" in caplog.text


@pytest.mark.parametrize("version", ["0.32.0", "0.32.7", "0.33.0", "0.33.1.dev3+gabc"])
def test_tested_versions(version):
    check_version(version)


@pytest.mark.parametrize("version", ["0.31.0", "0.34.0", "0.3.2", "1.32.0", "dev"])
def test_other_versions_are_named_with_the_one_to_install(version):
    with pytest.raises(
        RTPurboError, match=re.escape(f"vLLM {version} is installed: install {TO_INSTALL}.")
    ):
        check_version(version)
