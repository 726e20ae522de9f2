"""Dependencies run one way, and every public name is documented."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import pkgutil
from pathlib import Path

import pytest

import perexample

ROOT = Path(perexample.__file__).parent
# A module may import from its own layer and from those before it; what is named by nothing here counts as the last.
LAYERS = [
    ["_extension", "_info"],
    ["ops"],
    ["_triton"],
    ["moments", "autograd"],
    ["nn", "optim"],
    ["convert", "noise"],
    ["testing", "__main__", "__init__"],
]
PUBLIC = {"perexample", "perexample.nn", "perexample.noise", "perexample.optim", "perexample.ops", "perexample.testing"}
MODULES = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py"))


def layer_of(part: str) -> int:
    return next((i for i, names in enumerate(LAYERS) if part in names), len(LAYERS) - 1)


def imported_parts(path: Path) -> set[str]:
    """The top-level parts of perexample that the module at `path` imports, itself included where it does."""
    package = ["perexample", *path.parent.parts]
    parts = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names] if module == "perexample" else [module]
        for name in names:
            first, _, rest = name.partition(".")
            if first == "perexample" and rest:
                parts.add(rest.split(".")[0])
    return parts


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_go_down_only(path):
    own = path.parts[0].removesuffix(".py")
    upward = {part for part in imported_parts(path) if part != own and layer_of(part) > layer_of(own)}
    assert not upward, f"{path} imports {upward}"


def test_the_ops_and_kernels_know_nothing_of_the_rest():
    for path in MODULES:
        if path.parts[0] == "ops":
            assert imported_parts(path) <= {"ops"}, path


def test_optimizers_know_no_layers_and_layers_no_optimizers():
    for path in MODULES:
        if path.parts[0] in ("nn", "optim"):
            assert not imported_parts(path) & ({"nn", "optim"} - {path.parts[0]}), path


def module_names():
    """Every Python module of the package that can be imported."""
    triton = importlib.util.find_spec("triton") is not None
    for info in pkgutil.walk_packages(perexample.__path__, "perexample."):
        if "triton_kernels." in info.name and not triton:
            continue
        if info.name.rsplit(".")[-1] not in ("__main__", "_info", "_kernels"):
            yield info.name


def public_objects():
    """Name and value of every module, of what it exports, and of the methods of the classes that users meet."""
    for module_name in module_names():
        module = importlib.import_module(module_name)
        yield module_name, module
        for name in getattr(module, "__all__", ()):
            value = getattr(module, name)
            if inspect.isclass(value) or inspect.isfunction(value):
                yield f"{module_name}.{name}", value
            if inspect.isclass(value) and module_name in PUBLIC:
                for member, function in vars(value).items():
                    if not member.startswith("_") and member != "forward" and inspect.isfunction(function):
                        yield f"{module_name}.{name}.{member}", function


@pytest.mark.parametrize(
    ("name", "value"), list(public_objects()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_every_public_name_has_a_docstring(name, value):
    assert (value.__doc__ or "").strip(), f"{name} has no docstring"


def test_everything_that_is_exported_exists():
    for module_name in module_names():
        module = importlib.import_module(module_name)
        assert all(hasattr(module, name) for name in getattr(module, "__all__", ())), module_name
