"""Code blocks of the documentation run on a tiny model, and its commands are accepted by the command line.

A block that cannot be run has `<!-- example: not run: REASON -->` on the line before it.
"""

import gzip
import json
import random
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer
from typer.main import get_command

from rtpurbo.cli import app
from tests.tiny_artifact import save_tiny_artifact

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(path for path in (ROOT / "docs").rglob("*.md") if path.name != "experiment-log.md"),
    *sorted((ROOT / "recipes").glob("*/README.md")),
]
BLOCK = re.compile(
    r"(?:^<!-- example: not run: (?P<reason>.+?) -->\n)?^```(?P<language>\w+)\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
# typer may bring its own copy of click, so that click's class is not always the right one.
UsageError = typer.BadParameter.__base__
# Programs whose arguments are not checked here.
OTHER_PROGRAMS = {"pip", "pytest", "curl", "docker", "ray", "lm_eval", "tensorboard", "git"}


@dataclass(frozen=True)
class Block:
    """A fenced block of code."""

    page: Path
    number: int
    language: str
    code: str
    reason: str | None

    def __str__(self):
        return f"{self.page.relative_to(ROOT)}-{self.number}"


def blocks_of(page):
    text = page.read_text(encoding="utf-8")
    return [
        Block(page, number, match["language"], match["code"], match["reason"])
        for number, match in enumerate(BLOCK.finditer(text), 1)
    ]


def blocks(language):
    return [
        block
        for page in PAGES
        for block in blocks_of(page)
        if block.language == language and block.reason is None
    ]


def commands(block):
    """The commands of a block as lists of words, without comments and assignments of variables."""
    for line in block.code.replace("\\\n", " ").splitlines():
        for part in re.split(r"\s(?:&&|\|)\s|\s&$", line):
            words = shlex.split(part, comments=True)
            while words and re.fullmatch(r"\w+=.*", words[0]):
                del words[0]
            if words:
                yield words


def check_rtpurbo(arguments):
    """Parses a command line as `rtpurbo` does, without running it."""
    group = get_command(app)
    context = group.make_context("rtpurbo", list(arguments[:1]))
    name, command, _ = group.resolve_command(context, list(arguments))
    rest = list(arguments[1:])
    while hasattr(command, "resolve_command") and rest:
        context = command.make_context(name, rest[:1], parent=context)
        name, command, rest = command.resolve_command(context, rest)
    with command.make_context(name, rest, parent=context):
        pass


def check_command(words):
    program, *arguments = words
    if program == "rtpurbo":
        check_rtpurbo(_without_redirections(arguments))
    elif program == "torchrun" and "-m" in arguments:
        module = arguments.index("-m")
        assert arguments[module + 1] == "rtpurbo"
        check_rtpurbo(arguments[module + 2 :])
    elif program in ("python", "torchrun"):
        script = next((one for one in arguments if one.endswith(".py")), None)
        assert script is None or (ROOT / script).is_file(), f"there is no {script}"
    elif program == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        for target in arguments:
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"no target {target}"
    else:
        assert program in OTHER_PROGRAMS or program == "."


def _without_redirections(arguments):
    for number, argument in enumerate(arguments):
        if argument.startswith(("<", ">")):
            return arguments[:number]
    return arguments


@pytest.mark.parametrize("block", blocks("bash"), ids=str)
def test_commands_are_accepted(block, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    found = list(commands(block))
    assert found
    for words in found:
        check_command(words)


def test_wrong_options_and_choices_are_found():
    with pytest.raises(UsageError):
        check_rtpurbo(["convert", "MODEL", "-o", "OUT", "--no-such-option"])
    with pytest.raises(UsageError):
        check_rtpurbo(["convert", "MODEL", "-o", "OUT", "--effort", "enormous"])
    with pytest.raises(UsageError):
        check_rtpurbo(["transmogrify"])


@pytest.fixture(scope="module")
def names(tiny_base, tmp_path_factory):
    """Replacements of the names in the examples."""
    folder = tmp_path_factory.mktemp("examples")
    artifact = save_tiny_artifact(folder / "artifact", tiny_base)
    words = [
        "the",
        "lighthouse",
        "keeper",
        "sea",
        "ship",
        "wind",
        "light",
        "stone",
        "night",
        "over",
    ]
    generator = random.Random(0)
    with gzip.open(folder / "books.jsonl.gz", "wt") as file:
        for _ in range(4):
            text = ". ".join(" ".join(generator.choices(words, k=9)) for _ in range(600))
            file.write(json.dumps({"text": text}) + "\n")
    return {
        "Qwen/Qwen2.5-Coder-1.5B-Instruct": str(tiny_base),
        "books.jsonl.gz": str(folder / "books.jsonl.gz"),
        "smollm2-sparse": str(artifact),
        "qwen3-sparse": str(artifact),
        "artifacts/smollm2-64k-sparse": str(artifact),
    }


def substituted(code, names):
    """The code with other models, and short answers."""
    for name, place in names.items():
        code = code.replace(f'"{name}"', repr(place))
    return re.sub(r"max_new_tokens=\d+", "max_new_tokens=4", code)


PYTHON_PAGES = [page for page in PAGES if any(one.page == page for one in blocks("python"))]


@pytest.mark.parametrize("page", PYTHON_PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_runs(page, names, monkeypatch, tmp_path, capsys):
    """The blocks of a page in their order: later ones use the names of earlier ones."""
    monkeypatch.chdir(tmp_path)
    namespace = {}
    for block in blocks_of(page):
        if block.language == "python" and block.reason is None:
            code = compile(substituted(block.code, names), str(block), "exec")
            exec(code, namespace)


def test_blocks_that_are_not_run_say_why():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for reason in re.findall(r"<!-- example: not run:(.*?)-->", text):
            assert len(reason.split()) > 2, f"{page}: no reason"
        # A marker that no block follows would hide a typing mistake.
        markers = text.count("<!-- example: not run:")
        assert markers == sum(block.reason is not None for block in blocks_of(page)), page
