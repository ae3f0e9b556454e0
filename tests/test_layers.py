"""Imports never run up the floors of the house, nor across to a neighbour."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "rtpurbo"

# From the ground up. Parts of one floor do not import each other, except on the ground floor and
# on the top-level one, which are single files.
FLOORS = (
    {
        "config",
        "devices",
        "errors",
        "formats",
        "files",
        "interruption",
        "launch",
        "output_lock",
        "processes",
        "speed_records",
        "strict_json",
        "validation",
        "version",
        "visible",
    },
    {"ops"},
    {"data"},
    {"defaults", "lengths", "renamed_settings", "settings"},
    {"models"},
    {"training", "evaluation"},
    {"calibration"},
    {"benchmarks"},
    {"reporting", "serving"},
    {
        "__init__",
        "assembly",
        "conversion",
        "demo",
        "estimates",
        "job",
        "job_options",
        "job_plan",
        "plan",
        "publishing",
    },
    {"cli"},
    {"__main__"},
)
FLOOR_OF = {part: floor for floor, parts in enumerate(FLOORS) for part in parts}
NEIGHBOURLY_FLOORS = {FLOOR_OF["config"], FLOOR_OF["settings"], FLOOR_OF["__init__"]}
FORBIDDEN_PACKAGES = {"ops": {"transformers"}}
FORBIDDEN_PARTS = {"models": {"data"}}


def imported_modules(module: str, source: str) -> set[str]:
    """Absolute dotted names of everything that `module` imports, wherever in it."""
    modules = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".")[: -node.level]
                base = ".".join([*package, *filter(None, [node.module])])
            if base == "rtpurbo":
                # `from rtpurbo import ops` imports a part; other names come from __init__.
                for alias in node.names:
                    part = alias.name if alias.name in FLOOR_OF else "__init__"
                    modules.add(f"rtpurbo.{part}")
            else:
                modules.add(base)
    return modules


def violations(module: str, source: str) -> list[str]:
    """What is wrong with the imports of a module, whose package is named with `.__init__`."""
    part = module.split(".")[1]
    if part not in FLOOR_OF:
        return [f"{module} has no floor: add {part} to FLOORS"]
    floor, found = FLOOR_OF[part], []
    for name in sorted(imported_modules(module, source)):
        package, *rest = name.split(".")
        if package in FORBIDDEN_PACKAGES.get(part, ()):
            found.append(f"{module} imports {package}")
        if package != "rtpurbo":
            continue
        other = rest[0] if rest else "__init__"
        if other not in FLOOR_OF:
            found.append(f"{module} imports {name}, which has no floor")
        elif other in FORBIDDEN_PARTS.get(part, ()):
            found.append(f"{module} imports {name}")
        elif FLOOR_OF[other] > floor:
            found.append(f"{module} imports {name}, from a floor above")
        elif FLOOR_OF[other] == floor and other != part and floor not in NEIGHBOURLY_FLOORS:
            found.append(f"{module} imports {name}, its neighbour")
    return found


def test_imports_never_run_up():
    files = sorted(SOURCE.rglob("*.py"))
    assert files
    found = []
    for path in files:
        module = ".".join(["rtpurbo", *path.relative_to(SOURCE).with_suffix("").parts])
        found += violations(module, path.read_text(encoding="utf-8"))
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("module", "source", "is_wrong"),
    [
        ("rtpurbo.ops.api", "from rtpurbo.models.cache import HeadwiseCache", True),
        ("rtpurbo.ops.api", "import rtpurbo.data.texts", True),
        ("rtpurbo.ops.api", "from rtpurbo.ops.eager import attend", False),
        ("rtpurbo.ops.api", "from rtpurbo.config import AttentionRule", False),
        ("rtpurbo.ops.eager.local", "def f():\n    import transformers.utils", True),
        ("rtpurbo.models.base", "import transformers", False),
        ("rtpurbo.models.base", "from rtpurbo.data import texts", True),
        ("rtpurbo.data.texts", "from ..models import base", True),
        ("rtpurbo.data.texts", "from ..errors import RTPurboError", False),
        ("rtpurbo.data.texts", "from . import words", False),
        ("rtpurbo.data.__init__", "from .texts import load_texts", False),
        ("rtpurbo.training.stage1", "from rtpurbo.calibration import calibrate", True),
        ("rtpurbo.training.stage1", "from rtpurbo import models, data", False),
        ("rtpurbo.training.stage1", "from rtpurbo import __version__", True),
        ("rtpurbo.reporting.html", "from rtpurbo.evaluation import results", False),
        ("rtpurbo.reporting.html", "from rtpurbo import convert", True),
        ("rtpurbo.config", "from rtpurbo.errors import RTPurboError", False),
        ("rtpurbo.config", "import rtpurbo", True),
        ("rtpurbo.conversion", "from rtpurbo.reporting import html", False),
        ("rtpurbo.__init__", "from rtpurbo.conversion import convert", False),
        ("rtpurbo.__init__", "from .cli import main", True),
        ("rtpurbo.cli.convert", "import rtpurbo\nfrom rtpurbo import demo", False),
        ("rtpurbo.attic.old", "", True),
        ("rtpurbo.cli.main", "import rtpurbo.attic", True),
    ],
)
def test_the_check_can_fail(module, source, is_wrong):
    assert bool(violations(module, source)) == is_wrong


def type_checking_nodes(tree: ast.AST) -> set[ast.AST]:
    """Nodes inside `if TYPE_CHECKING:`, which never run."""
    blocks = (node for node in ast.walk(tree) if isinstance(node, ast.If))
    return {
        inner
        for block in blocks
        if isinstance(block.test, ast.Name) and block.test.id == "TYPE_CHECKING"
        for statement in block.body
        for inner in ast.walk(statement)
    }


def import_graph(sources: dict[str, str]) -> dict[str, set[str]]:
    """Modules among `sources` that each module imports, in functions too.

    Args:
        sources: source text by module name; packages are named without `.__init__`.
    """
    graph = {}
    for module, source in sources.items():
        tree = ast.parse(source)
        ignored = type_checking_nodes(tree)
        imported = set()
        for node in ast.walk(tree):
            if node in ignored:
                continue
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"{module} has a relative import"
                for alias in node.names:
                    submodule = f"{node.module}.{alias.name}"
                    imported.add(submodule if submodule in sources else node.module)
        graph[module] = imported & sources.keys() - {module}
    return graph


def import_cycle(sources: dict[str, str]) -> list[str]:
    """One import cycle as a list of modules, empty if there is none."""
    try:
        TopologicalSorter(import_graph(sources)).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_no_import_cycles():
    sources = {}
    for path in SOURCE.rglob("*.py"):
        module = ".".join(["rtpurbo", *path.relative_to(SOURCE).with_suffix("").parts])
        sources[module.removesuffix(".__init__")] = path.read_text(encoding="utf-8")
    assert import_cycle(sources) == []


@pytest.mark.parametrize(
    ("statement", "is_cycle"),
    [
        ("import rtpurbo.a", True),
        ("from rtpurbo import a", True),
        ("def f():\n    from rtpurbo.a import f", True),
        ("if TYPE_CHECKING:\n    from rtpurbo.a import f", False),
        ("import rtpurbo.c", False),
    ],
)
def test_import_cycles_are_found(statement, is_cycle):
    sources = {"rtpurbo.a": "from rtpurbo.b import g", "rtpurbo.b": statement, "rtpurbo.c": ""}
    assert bool(import_cycle(sources)) == is_cycle
