"""Imports go one way: no module, and no folder, reaches itself through others; imports inside functions count."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import networkx as nx

ROOT = Path(__file__).parents[1]
FOLDERS = {"splitfx": ROOT / "splitfx", "splitfx.passes": ROOT / "passes"}


def modules() -> dict[str, Path]:
    found = {}
    for name, folder in FOLDERS.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join((name, *parts)).removesuffix(".__init__")] = path
    return found


def imported(tree: ast.AST) -> Iterator[str]:
    """What a module imports, in functions too; what only type checkers read is left out."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{one.name}" for one in node.names)
        elif isinstance(node, ast.Import):
            yield from (one.name for one in node.names)
        yield from imported(node)


def arrows(sources: dict[str, str]) -> nx.DiGraph:
    graph = nx.DiGraph()
    for name, source in sources.items():
        for wanted in imported(ast.parse(source)):
            target = wanted if wanted in sources else wanted.rpartition(".")[0]
            if target in sources and target != name:
                graph.add_edge(name, target)
    return graph


def circles(graph: nx.DiGraph) -> list[list[str]]:
    return [sorted(part) for part in nx.strongly_connected_components(graph) if len(part) > 1]


def read() -> dict[str, str]:
    return {name: path.read_text(encoding="utf-8") for name, path in modules().items()}


def test_no_module_imports_itself_through_others() -> None:
    assert circles(arrows(read())) == []


def test_no_folder_imports_itself_through_others() -> None:
    """The face, ``splitfx`` itself, stands above all and is imported by none."""
    between = arrows(read())
    folders = nx.DiGraph()
    for one, other in between.edges:
        pair = [".".join(name.split(".")[:2]) for name in (one, other)]
        if pair[0] != pair[1] and "splitfx" not in pair:
            folders.add_edge(*pair)
    assert circles(folders) == []
    assert folders.number_of_nodes() > 15


def test_sabotage_a_circle_is_seen() -> None:
    sources = {"a": "def f():\n    from b import x", "b": "import c", "c": "from a import f"}
    assert circles(arrows(sources)) == [["a", "b", "c"]]
    typed = sources | {"c": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from a import f"}
    assert circles(arrows(typed)) == []


def test_no_folder_is_long() -> None:
    """About a dozen entries on a level, so that a path leads to a line."""
    for folder in [*FOLDERS.values(), *(p for p in (ROOT / "splitfx").rglob("*") if p.is_dir() and not p.is_symlink())]:
        entries = [p for p in folder.iterdir() if p.name != "__pycache__"]
        wide = {ROOT / "splitfx": 24, ROOT / "splitfx" / "train": 16}
        assert len(entries) <= wide.get(folder, 14), f"{folder.name} has {len(entries)} entries"
