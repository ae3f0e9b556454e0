import resource
import subprocess
import sys
from pathlib import Path

import pytest

import rtpurbo


@pytest.mark.parametrize("name", rtpurbo.__all__)
def test_every_public_name_is_there(name):
    assert getattr(rtpurbo, name) is not None
    assert name in dir(rtpurbo)


def test_lazy_names_have_static_types():
    source = Path(rtpurbo.__file__).read_text()
    for name, home in rtpurbo._HOMES.items():
        assert f"    from {home} import {name} as {name}\n" in source
    assert Path(rtpurbo.__file__).with_name("py.typed").is_file()


def test_unknown_names_raise_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'sparse'"):
        rtpurbo.sparse  # noqa: B018


ARTIFACT = Path(__file__).parents[1] / "artifacts" / "smollm2-135m-instruct"


@pytest.mark.parametrize(
    "statement",
    [
        "import rtpurbo",
        "import rtpurbo.cli",
        f"from rtpurbo.reporting.inspection import inspect_artifact as show; show(Path({str(ARTIFACT)!r}))",
    ],
    ids=["import", "cli", "inspect"],
)
def test_light_imports_leave_torch_out(statement):
    code = f"""
import sys
from pathlib import Path
{statement}
print({{'torch', 'transformers', 'peft'}} & set(sys.modules))
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["convert", "--nope"], 2),
        (["convert", "M", "-o", "out", "--set", "stage1.step=3"], 1),
        (["calibrate", "M", "-o", "out", "--ratio", ".2", "--count", "3"], 1),
        (["convert", "M"], 1),
        (["inspect", str(ARTIFACT)], 0),
    ],
    ids=["help", "wrong-option", "wrong-setting", "two-choices", "no-folder", "inspect"],
)
def test_light_commands_take_less_than_a_second_of_cpu_time(arguments, code):
    def seconds():
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    before = seconds()
    result = subprocess.run(
        [sys.executable, "-m", "rtpurbo", *arguments], capture_output=True, text=True
    )
    assert result.returncode == code
    assert seconds() - before < 1
