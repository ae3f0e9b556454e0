"""Imports go down the layers of the package, and not between the parts of one layer."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "rtpurbo"

# From the lowest up. Parts of one layer do not import each other, except in the layers of single files.
LAYERS = (
    {
        "config",
        "devices",
        "errors",
        "formats",
        "files",
        "interruption",
        "launch",
        "processes",
        "speed_records",
        "strict_json",
        "validation",
        "version",
        "visible",
    },
    {"ops"},
    {"data"},
    {"lengths", "renamed_settings", "settings"},
    {"models"},
    {"training", "evaluation"},
    {"calibration"},
    {"benchmarks"},
    {"reporting", "serving"},
    {"__init__", "conversion", "demo", "publishing"},
    {"cli"},
    {"__main__"},
)
LAYER_OF = {part: layer for layer, parts in enumerate(LAYERS) for part in parts}
LAYERS_OF_FILES = {LAYER_OF["config"], LAYER_OF["settings"], LAYER_OF["__init__"]}
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
                    part = alias.name if alias.name in LAYER_OF else "__init__"
                    modules.add(f"rtpurbo.{part}")
            else:
                modules.add(base)
    return modules


def violations(module: str, source: str) -> list[str]:
    """Forbidden imports of a module; a package is named with `.__init__`."""
    part = module.split(".")[1]
    if part not in LAYER_OF:
        return [f"{module} has no layer: add {part} to LAYERS"]
    layer, found = LAYER_OF[part], []
    for name in sorted(imported_modules(module, source)):
        package, *rest = name.split(".")
        if package in FORBIDDEN_PACKAGES.get(part, ()):
            found.append(f"{module} imports {package}")
        if package != "rtpurbo":
            continue
        other = rest[0] if rest else "__init__"
        if other not in LAYER_OF:
            found.append(f"{module} imports {name}, which has no layer")
        elif other in FORBIDDEN_PARTS.get(part, ()):
            found.append(f"{module} imports {name}")
        elif LAYER_OF[other] > layer:
            found.append(f"{module} imports {name}, from a higher layer")
        elif LAYER_OF[other] == layer and other != part and layer not in LAYERS_OF_FILES:
            found.append(f"{module} imports {name}, of the same layer")
    return found


def test_imports_go_down_the_layers():
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


MOST_POSITIONAL = 9
"""Fields of a record that may be given by position."""


def classes_of_records(sources: list[str]) -> set[str]:
    """Names of the dataclasses in some source texts."""
    return {
        node.name
        for source in sources
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ClassDef)
        and any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list)
    }


def long_positional_calls(source: str, records: set[str]) -> list[int]:
    """Lines that build a record from more than `MOST_POSITIONAL` positional values."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and len(node.args) > MOST_POSITIONAL
        and ast.unparse(node.func).split(".")[-1] in records
    ]


def test_records_are_not_built_from_many_positional_values():
    texts = {path: path.read_text(encoding="utf-8") for path in SOURCE.rglob("*.py")}
    records = classes_of_records(list(texts.values()))
    assert "CapturedHeads" in records
    found = {
        str(path.relative_to(SOURCE)): lines
        for path, source in texts.items()
        if (lines := long_positional_calls(source, records))
    }
    assert found == {}


def test_the_check_finds_positional_values():
    values = ", ".join(map(str, range(MOST_POSITIONAL)))
    source = f"@dataclass\nclass A:\n    pass\nA({values}, 1)\nA({values}, last=1)"
    assert classes_of_records([source]) == {"A"}
    assert long_positional_calls(source, {"A"}) == [4]
