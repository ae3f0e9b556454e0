import subprocess
import sys

import pytest

from rtpurbo.conversion import convert
from rtpurbo.conversion.output_lock import OutputLock
from rtpurbo.errors import RTPurboError

HOLDER = """
import sys
from pathlib import Path
from rtpurbo.conversion.output_lock import OutputLock
lock = OutputLock(Path(sys.argv[1]))
lock.acquire()
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that is making `tmp_path / "out"`."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "out")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


@pytest.mark.parametrize("options", [{}, {"resume": True}, {"force": True}])
def test_a_second_job_is_refused_while_the_first_runs(tiny_base, tmp_path, holder, options):
    (tmp_path / "out.work").mkdir()
    with pytest.raises(RTPurboError, match="another job is writing"):
        convert(str(tiny_base), tmp_path / "out", **options)


def test_a_killed_job_holds_no_lock(tmp_path, holder):
    holder.kill()
    holder.communicate()
    lock = OutputLock(tmp_path / "out")
    lock.acquire()
    lock.release()
    assert not list(tmp_path.iterdir())


def test_the_lock_is_free_again_after_its_release(tmp_path):
    first, second = OutputLock(tmp_path / "out"), OutputLock(tmp_path / "out")
    first.acquire()
    with pytest.raises(RTPurboError, match="another job"):
        second.acquire()
    first.release()
    second.acquire()
    second.release()
    second.release()
    OutputLock(tmp_path / "other").acquire()


def test_an_output_folder_that_cannot_be_locked_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RTPurboError, match="cannot lock"):
        OutputLock(tmp_path / "file" / "out").acquire()


def test_a_refused_job_leaves_no_lock(tmp_path):
    (tmp_path / "out.work").mkdir()
    with pytest.raises(RTPurboError, match="was interrupted: pass --resume"):
        convert("a-model", tmp_path / "out", device="cpu")
    assert [path.name for path in tmp_path.iterdir()] == ["out.work"]
