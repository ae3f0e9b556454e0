"""Calls of kernels agree with their signatures, as the compiler would find on a GPU."""

import ast
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3] / "src"
PACKAGE = ROOT / "rtpurbo" / "ops" / "triton"
# Options of a launch rather than parameters of a kernel.
LAUNCH_OPTIONS = {"num_warps", "num_stages", "maxnreg", "launch_pdl"}
# Parameters in the mappings that launches unpack: of `pdl.dependent_launch` and `TileSizes.launch`.
UNPACKED = {"dependent_launch": {"PDL"}, "launch": set()}


@dataclass(frozen=True)
class Kernel:
    """Parameters of a compiled function, in order."""

    name: str
    parameters: tuple[str, ...]
    optional: frozenset[str]
    not_specialized: frozenset[str]


def module_name(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def decorator_of(function):
    """The `jit` decorator of a function, or None."""
    for decorator in function.decorator_list:
        target = decorator.func if isinstance(decorator, ast.Call) else decorator
        if isinstance(target, ast.Attribute) and target.attr == "jit":
            return decorator
    return None


def names_of(expression, tree):
    """Strings of a list that is written out or assigned to a name of the module."""
    if isinstance(expression, ast.Name):
        expression = next(
            node.value
            for node in tree.body
            if isinstance(node, ast.Assign) and node.targets[0].id == expression.id
        )
    return frozenset(ast.literal_eval(expression))


def kernels_in(tree):
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and (decorator := decorator_of(node)):
            options = decorator.keywords if isinstance(decorator, ast.Call) else []
            parameters = [argument.arg for argument in node.args.args]
            optional = parameters[len(parameters) - len(node.args.defaults) :]
            not_specialized = frozenset()
            for option in options:
                assert option.arg == "do_not_specialize"
                not_specialized = names_of(option.value, tree)
            yield Kernel(node.name, tuple(parameters), frozenset(optional), not_specialized)


TREES = {
    module_name(path): ast.parse(path.read_text(encoding="utf-8"))
    for path in sorted(PACKAGE.rglob("*.py"))
}
KERNELS = {
    (module, kernel.name): kernel for module, tree in TREES.items() for kernel in kernels_in(tree)
}


def visible_kernels(module):
    """Kernels by the name that they have in a module: its own ones, and those that it imports."""
    found = {name: kernel for (owner, name), kernel in KERNELS.items() if owner == module}
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if kernel := KERNELS.get((node.module, alias.name)):
                    found[alias.asname or alias.name] = kernel
    return found


def calls(module):
    """Calls of kernels: the kernel, the node, and whether it is a launch (`kernel[grid](...)`)."""
    kernels = visible_kernels(module)
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Call):
            is_launch = isinstance(node.func, ast.Subscript)
            target = node.func.value if is_launch else node.func
            if isinstance(target, ast.Name) and target.id in kernels:
                yield kernels[target.id], node, is_launch


def disagreement(kernel, call, is_launch):
    """The first way in which a call does not fit the signature, or None."""
    keywords = [keyword.arg for keyword in call.keywords if keyword.arg]
    given = set(keywords)
    for keyword in call.keywords:
        if keyword.arg is None:
            function = keyword.value.func
            given |= UNPACKED[function.attr if isinstance(function, ast.Attribute) else function.id]
    if is_launch:
        given -= LAUNCH_OPTIONS
    if unknown := given - set(kernel.parameters):
        return f"unknown keywords {sorted(unknown)}"
    if any(isinstance(argument, ast.Starred) for argument in call.args):
        # Lengths of unpacked tuples are not known here: keywords must lie behind all of them.
        count = min((kernel.parameters.index(name) for name in given), default=0)
    else:
        count = len(call.args)
    positional = set(kernel.parameters[:count])
    if twice := positional & given:
        return f"given twice: {sorted(twice)}"
    missing = set(kernel.parameters) - positional - given - kernel.optional
    return f"missing: {sorted(missing)}" if missing or count > len(kernel.parameters) else None


@pytest.mark.parametrize("module", TREES)
def test_calls_fit_the_signatures_of_kernels(module):
    wrong = [
        f"line {call.lineno}: {kernel.name}: {complaint}"
        for kernel, call, is_launch in calls(module)
        if (complaint := disagreement(kernel, call, is_launch))
    ]
    assert not wrong


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=lambda kernel: kernel.name)
def test_parameters_that_are_not_specialized_exist(kernel):
    # Triton ignores names that are no parameters, and would compile a kernel for every size.
    assert kernel.not_specialized <= set(kernel.parameters)


def test_every_kernel_is_launched():
    launched = {kernel.name for module in TREES for kernel, _, launch in calls(module) if launch}
    assert launched >= {name for _, name in KERNELS if name.endswith("_kernel")}


def test_a_call_that_does_not_fit_is_found():
    kernel = Kernel("f", ("x", "y", "WIDTH"), frozenset(), frozenset())

    def complaint(text):
        return disagreement(kernel, ast.parse(text).body[0].value, is_launch=True)

    assert complaint("f[g](1, 2, WIDTH=3, num_warps=4)") is None
    assert "unknown" in complaint("f[g](1, 2, WIDE=3)")
    assert "missing" in complaint("f[g](1, WIDTH=3)")
    assert "twice" in complaint("f[g](1, 2, 3, WIDTH=3)")
