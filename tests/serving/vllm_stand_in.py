"""A package named vllm that starts no engine: its server prints how it was called."""

from __future__ import annotations

from pathlib import Path

_SERVER = """
import json, sys
print(json.dumps(sys.argv[1:]))
sys.exit(3)
"""


def write_stand_in(
    folder: Path, version: str = "0.32.0", distribution: str | None = "vllm"
) -> Path:
    """A folder for `sys.path` in which such a package is installed.

    Args:
        folder: to write to.
        version: what it says of itself.
        distribution: the name that it is installed by; None leaves no trace of an installation.
    """
    server = folder / "vllm" / "entrypoints" / "openai" / "api_server.py"
    server.parent.mkdir(parents=True)
    server.write_text(_SERVER)
    (folder / "vllm" / "__init__.py").write_text(f"__version__ = '{version}'\n")
    if distribution is not None:
        information = folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
        information.mkdir()
        text = f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n"
        (information / "METADATA").write_text(text)
    return folder
