"""Imports go one way: no module, and no folder, reaches itself through others; imports inside functions count."""

from __future__ import annotations

from tests.layers import PAGE, ROOT, arrows, circles, folders, modules, placed, sources


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


def test_no_folder_is_long() -> None:
    """About a dozen entries on a level, so that a path leads to a line."""
    wide = {ROOT / "splitfx": 22, ROOT / "splitfx" / "cli" / "commands": 16}
    for folder in {path.parent for path in modules().values()}:
        entries = [p for p in folder.iterdir() if p.name != "__pycache__"]
        assert len(entries) <= wide.get(folder, 14), f"{folder.name} has {len(entries)} entries"
