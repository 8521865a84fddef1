"""The plan of the house: which files stand where, and which room may import which. docs/design.md draws it."""

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

from utils import SUITE_FOLDER

FRONT = {"main.py", "client.py", "model.py", "dataset.py", "utils.py", "test.py", "app.py"}  # nothing else lies there
MAY_IMPORT = {  # by file of the front, or room; lower ones first
    "utils": (),
    "settings": (),
    "machine": (),
    "hub": ("settings", "utils"),
    "model": ("hub", "settings", "utils"),
    "data": ("settings", "utils"),
    "dataset": ("data", "model", "hub", "settings", "utils"),
    "exchange": ("model", "settings", "utils"),
    "runs": ("dataset", "model", "settings", "utils"),
    "learning": ("runs", "exchange", "dataset", "model", "hub", "machine", "settings", "utils"),
    "client": ("learning", "exchange", "dataset", "model", "hub", "machine", "settings", "utils"),
    "test": ("learning", "runs", "machine", "settings", "utils"),
    "server": ("client", "learning", "runs", "exchange", "dataset", "model", "hub", "machine", "settings", "utils"),
    "deployment": ("client", "learning", "runs", "exchange", "dataset", "model", "machine", "settings", "utils"),
    "app": ("deployment", "server", "runs", "exchange", "dataset", "model", "machine", "settings", "utils"),
    "main": ("server", "runs", "machine", "settings", "utils"),
}
ROOMS = sorted(name for name in MAY_IMPORT if f"{name}.py" not in FRONT)


def modules() -> dict[str, Path]:
    """Our modules by dotted name: the front, and what is in the rooms."""
    files = [*SUITE_FOLDER.glob("*.py"), *(file for room in ROOMS for file in (SUITE_FOLDER / room).rglob("*.py"))]
    return {".".join(file.relative_to(SUITE_FOLDER).with_suffix("").parts): file for file in files}


def imports(file: Path, known: dict[str, Path]) -> Iterator[str]:
    """Our modules that `file` imports, wherever in the file it does."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        named: list[str] = []
        if isinstance(node, ast.Import):
            named = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            named = [f"{node.module}.{alias.name}" for alias in node.names] + [node.module]
        yield from (name for name in named if name in known)


def test_only_the_owners_files_stand_at_the_front():
    assert {file.name for file in SUITE_FOLDER.glob("*.py")} == FRONT
    assert all((SUITE_FOLDER / room / "__init__.py").is_file() for room in ROOMS)


def test_imports_point_down():
    known = modules()
    assert len(known) > 30
    arrows = {(name.split(".")[0], other) for name, file in known.items() for other in imports(file, known)}
    assert not [(room, other) for room, other in arrows if other.split(".")[0] not in (room, *MAY_IMPORT[room])]


def test_rooms_are_in_order_so_that_no_two_import_each_other():
    order = list(MAY_IMPORT)
    assert all(order.index(lower) < order.index(room) for room, others in MAY_IMPORT.items() for lower in others)


def test_no_module_imports_itself_through_others():
    known = modules()
    graph = {name: set(imports(file, known)) for name, file in known.items()}
    assert set(TopologicalSorter(graph).static_order()) == set(known)  # a circle raises CycleError, which shows it


def defined_in(file: Path) -> set[str]:
    """Names of the functions and classes of a file, and Class.method."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    return names | {f"{c.name}.{node.name}" for c in classes for node in c.body if isinstance(node, ast.FunctionDef)}


def test_functions_that_the_plan_names_are_where_it_says():
    text = " ".join((SUITE_FOLDER / "docs/design.md").read_text(encoding="utf-8").split())
    named = re.findall(r"`([\w.]+)` \((\w+(?:/\w+)?\.py)\)", text)
    assert len(named) > 30
    assert not [(name, file) for name, file in named if name not in defined_in(SUITE_FOLDER / file)]


def test_classes_that_are_named_as_text_exist():
    text = "".join(file.read_text(encoding="utf-8") for file in (SUITE_FOLDER / "conf").rglob("*.yaml"))
    text += (SUITE_FOLDER / "settings/schema.py").read_text(encoding="utf-8")
    named = [name.split(".") for name in re.findall(rf"(?:{'|'.join(ROOMS)})\.\w+\.[A-Z]\w+", text)]
    assert len(named) >= 2
    assert not [name for name in named if name[2] not in defined_in(SUITE_FOLDER / name[0] / f"{name[1]}.py")]
