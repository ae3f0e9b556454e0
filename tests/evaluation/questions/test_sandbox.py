"""Generated code cannot run for ever, fill the memory, use the network or write elsewhere."""

import os
import time

import pytest

from rtpurbo.evaluation.questions.sandbox import passes


def test_programs_that_end_without_an_error_pass():
    assert passes("assert 1 + 1 == 2")
    assert passes("import re, math, typing, collections\nprint('a' * 10**6)")
    assert passes("class A: pass\nassert A.__module__ == '__main__'")


@pytest.mark.parametrize(
    "program",
    [
        "assert 1 + 1 == 3",
        "this is no Python",
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
        "x = bytearray(3 * 2**30)",
    ],
)
def test_failing_programs_do_not_pass(program):
    assert not passes(program)


@pytest.mark.parametrize("program", ["while True: pass", "import time; time.sleep(60)"])
def test_endless_programs_are_killed(program):
    start = time.monotonic()
    assert not passes(program, seconds=0.5)
    assert time.monotonic() - start < 20


@pytest.mark.parametrize(
    "attempt",
    [
        "import socket; socket.socket()",
        "import _socket; _socket.socket()",
        "import socket; socket.getaddrinfo('localhost', 80)",
        "import urllib.request; urllib.request.urlopen('http://127.0.0.1:9')",
        "import subprocess; subprocess.run(['true'])",
        "import os; os.system('true')",
        "import os; os.fork()",
        "import os; os.execv('/bin/true', ['true'])",
        "import ctypes; ctypes.CDLL(None)",
        "open(OUTSIDE, 'w')",
        "import os; os.open(OUTSIDE, os.O_CREAT | os.O_WRONLY)",
        "import os; os.remove(OUTSIDE)",
        "import os; os.mkdir(OUTSIDE)",
        "import shutil; shutil.rmtree(OUTSIDE)",
    ],
)
def test_network_processes_and_other_files_are_refused(attempt, tmp_path):
    outside = tmp_path / "outside"
    program = f"OUTSIDE = {str(outside)!r}\ntry:\n    {attempt}\nexcept PermissionError: pass\n"
    assert passes(program + "else: raise SystemExit('it was possible')")
    assert not outside.exists()


def test_the_temporary_folder_can_be_used_and_is_empty(tmp_path):
    assert passes(
        "import os, tempfile\nassert os.listdir() == []\n"
        "open('a', 'w').write('b')\nassert open('a').read() == 'b'\nos.remove('a')\n"
        "with tempfile.NamedTemporaryFile() as file: file.write(b'c')"
    )


def test_programs_do_not_see_the_environment(monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "abc")
    assert passes("import os; assert 'SECRET_TOKEN' not in os.environ")
    assert os.environ["SECRET_TOKEN"] == "abc"
