"""Imports go one way: no module, and no folder, reaches itself through others; imports inside functions count."""

from __future__ import annotations

import ast

from tests.layers import PAGE, ROOT, arrows, circles, folders, modules, placed, sources

LONG_FILE, LONG_FUNCTION, WIDE_FOLDER = 400, 40, 14  # lines, lines without signature and docstring, entries
WIDE = {
    ROOT / "splitfx": 22,  # the subjects themselves
    ROOT / "splitfx" / "cli" / "commands": 16,  # a file for each command, found by its name
}


def test_no_module_imports_itself_through_others() -> None:
    assert circles(arrows(sources())) == []


def test_no_folder_imports_itself_through_others() -> None:
    between = folders(arrows(sources()))
    assert circles(between) == []
    assert between.number_of_nodes() > 15


def test_sabotage_a_circle_is_seen() -> None:
    given = {"a": "def f():\n    from b import x", "b": "import c", "c": "from a import f"}
    assert circles(arrows(given)) == [["a", "b", "c"]]
    typed = given | {"c": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from a import f"}
    assert circles(arrows(typed)) == []


def test_the_drawing_is_of_these_imports() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert placed(page) == page, "run python -m tests.layers"


def test_no_folder_is_wide() -> None:
    """About a dozen entries on a level, so that a path leads to a line."""
    for folder in {path.parent for path in modules().values()}:
        entries = [p for p in folder.iterdir() if p.is_file() or list(p.glob("**/*.py"))]
        assert len(entries) <= WIDE.get(folder, WIDE_FOLDER), f"{folder.name} has {len(entries)} entries"


def too_long(given: dict[str, str]) -> list[str]:
    """Files and functions of sources that nobody reads in one go. What is too complex is ruff's to say (C901)."""
    found = [name for name, source in given.items() if len(source.splitlines()) > LONG_FILE]
    for name, source in given.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                has_words = ast.get_docstring(node) is not None and len(node.body) > 1
                lines = (node.end_lineno or 0) - node.body[has_words].lineno + 1
                found += [f"{name}.{node.name}"] * (lines > LONG_FUNCTION)
    return found


def test_no_file_and_no_function_is_long() -> None:
    assert too_long(sources()) == []


def test_sabotage_a_long_function_and_a_long_file_are_seen() -> None:
    body = '"""Many\n\nwords."""\n' + "    x = 1\n" * LONG_FUNCTION
    assert too_long({"a": f"def f():\n    {body}"}) == []
    assert too_long({"a": f"def f():\n    {body}    x = 2\n"}) == ["a.f"]
    assert too_long({"a": "x = 1\n" * (LONG_FILE + 1)}) == ["a"]
