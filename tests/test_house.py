"""The layout of the package: small folders, imports that point one way, no circles, no module hidden by a name."""

import ast
import importlib
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from types import ModuleType

import pytest

import torch_eft

ROOT = Path(torch_eft.__file__).parent
FOLDERS = [folder for folder in (ROOT, *ROOT.rglob("*")) if folder.is_dir() and folder.name != "__pycache__"]
BELOW = {
    "results": set(),
    "theory": {"results"},
    "measure": {"results", "theory"},
    "forecast": {"results", "theory", "measure"},
    "diagnosis": {"results", "theory", "measure"},
    "tensorboard": {"results", "diagnosis"},
    "live": {"results", "theory", "measure", "forecast", "diagnosis", "tensorboard"},
    "callbacks": {"results", "theory", "measure", "live", "tensorboard"},
}
"""Rooms, and the rooms that each may import; the command line may import all."""
LIGHTNING = {"lightning", "pytorch_lightning"}
NOT_IMPORTED = {
    "theory": LIGHTNING | {"tensorboard"},
    "measure": LIGHTNING | {"tensorboard"},
    "tensorboard": LIGHTNING,
    "live": LIGHTNING,
}
"""Other projects that a room does not import; ``live`` may inside functions."""


def imported(file: Path) -> set[str]:
    """Dotted names of the modules that a file imports, those for type checkers included."""
    return imported_by(ast.parse(file.read_text("utf-8")))


def imported_by(tree: ast.Module) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:  # ``from package import module`` imports the module
                path = ROOT.parent / node.module.replace(".", "/") / alias.name
                inner = path.with_suffix(".py").exists() or path.is_dir()
                names.add(f"{node.module}.{alias.name}" if inner else node.module)
    return names


def entries(folder: Path) -> list[Path]:
    return [
        path
        for path in folder.iterdir()
        if path.name not in ("__init__.py", "__main__.py", "__pycache__", "py.typed") and not path.name.startswith(".")
    ]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.relative_to(ROOT.parent).as_posix())
def test_a_folder_has_at_most_nine_entries(folder):
    assert len(entries(folder)) <= 9, sorted(path.name for path in entries(folder))


@pytest.mark.parametrize("room", BELOW)
def test_imports_point_down(room):
    for file in (ROOT / room).rglob("*.py"):
        for name in imported(file):
            if name.startswith("torch_eft."):
                assert name.split(".")[1] in BELOW[room] | {room}, f"{file.relative_to(ROOT)} imports {name}"
        tree = ast.parse(file.read_text("utf-8"))
        names = imported_by(_without_functions(tree) if room == "live" else tree)
        wrong = {name for name in names if name.split(".")[0] in NOT_IMPORTED.get(room, set())}
        assert not wrong, f"{file.relative_to(ROOT)} imports {wrong}"


def _without_functions(tree: ast.Module) -> ast.Module:
    """Return what runs, or is read by type checkers, when the file is imported."""

    class Removed(ast.NodeTransformer):
        def visit_FunctionDef(self, node):
            return None

        visit_AsyncFunctionDef = visit_FunctionDef

    return Removed().visit(tree)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("import lightning.pytorch as pl", True),
        ("if True:\n    from pytorch_lightning import Trainer", True),
        ("class A:\n    import lightning", True),
        ("class A:\n    def f(self):\n        import lightning", False),
        ("import light", False),
    ],
)
def test_imports_inside_functions_are_told_apart(text, found):
    names = imported_by(_without_functions(ast.parse(text)))
    assert any(name.split(".")[0] in LIGHTNING for name in names) == found


def test_theory_knows_no_module():
    for file in (ROOT / "theory").rglob("*.py"):
        assert not re.search(r"from torch import .*\bnn\b|import torch\.nn|import Module", file.read_text("utf-8")), (
            file
        )


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.relative_to(ROOT.parent).as_posix())
def test_entries_of_a_folder_import_each_other_in_one_direction(folder):
    prefix = folder.relative_to(ROOT.parent).as_posix().replace("/", ".") + "."
    graph: dict[str, set[str]] = {}
    for entry in entries(folder):
        files = [entry] if entry.suffix == ".py" else list(entry.rglob("*.py"))
        names = {name for file in files for name in imported(file) if name.startswith(prefix)}
        graph[entry.stem] = {name.removeprefix(prefix).split(".")[0] for name in names} - {entry.stem}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"{prefix} has a circle: {' -> '.join(error.args[1])}")


def test_no_module_is_hidden_by_a_name():
    """Where a package exports ``f`` and has a module ``f``, ``package.f`` would be the one or the other by luck."""
    for folder in FOLDERS:
        if not (folder / "__init__.py").exists():
            continue
        package = importlib.import_module(folder.relative_to(ROOT.parent).as_posix().replace("/", "."))
        for entry in entries(folder):
            value = getattr(package, entry.stem, None)
            assert value is None or isinstance(value, ModuleType), f"{package.__name__}.{entry.stem}"
