"""The modules of splitfx and their imports, read from the sources; ``python -m tests.layers`` draws the folders.

Writes the drawing into CONTRIBUTING.md, between its two marks, as a Mermaid graph: an arrow says "imports"; one that
follows from others is left out.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import networkx as nx

ROOT = Path(__file__).parents[1]
FOLDERS = {"splitfx": ROOT / "splitfx", "splitfx.passes": ROOT / "passes"}
PAGE = ROOT / "CONTRIBUTING.md"
MARKS = ("<!-- layers: python -m tests.layers -->\n", "<!-- end of layers -->")


def modules() -> dict[str, Path]:
    """Dotted name -> file."""
    found = {}
    for name, folder in FOLDERS.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join((name, *parts)).removesuffix(".__init__")] = path
    return found


def sources() -> dict[str, str]:
    return {name: path.read_text(encoding="utf-8") for name, path in modules().items()}


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


def arrows(given: dict[str, str]) -> nx.DiGraph:
    """Module -> module that it imports, of sources by dotted name."""
    graph = nx.DiGraph()
    for name, source in given.items():
        for wanted in imported(ast.parse(source)):
            target = wanted if wanted in given else wanted.rpartition(".")[0]
            if target in given and target != name:
                graph.add_edge(name, target)
    return graph


def folders(graph: nx.DiGraph) -> nx.DiGraph:
    """The same between the folders and files of splitfx/; the face, ``splitfx`` itself, is left out."""
    found = nx.DiGraph()
    for one, other in graph.edges:
        pair = [".".join(name.split(".")[1:2]) for name in (one, other)]
        if pair[0] != pair[1] and all(pair):
            found.add_edge(*pair)
    return found


def circles(graph: nx.DiGraph) -> list[list[str]]:
    return [sorted(part) for part in nx.strongly_connected_components(graph) if len(part) > 1]


def drawing() -> str:
    few = nx.transitive_reduction(folders(arrows(sources())))
    lines = [f"  {one} --> {other}" for one, other in sorted(few.edges) if one != "__main__"]
    return "\n".join(["```mermaid", "graph TD", *lines, "```", ""])


def placed(page: str) -> str:
    """A page with the drawing between its marks."""
    before, _, rest = page.partition(MARKS[0])
    return before + MARKS[0] + drawing() + MARKS[1] + rest.partition(MARKS[1])[2]


if __name__ == "__main__":
    PAGE.write_text(placed(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
