"""Every block of the README runs alone, in an empty folder, as a reader would run it; every link leads somewhere."""

import re
import shlex
from pathlib import Path

import pytest

from splitfx import cli

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README = PAGES[0].read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(python|console)\n(.*?)^```", README, flags=re.S | re.M)


def test_the_readme_is_short() -> None:
    assert len(README.encode()) <= 7168
    assert len(BLOCKS) >= 6


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_a_block_runs_alone(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    kind, text = BLOCKS[number]
    if kind == "python":
        exec(compile(text, f"README block {number}", "exec"), {"__name__": "block"})
        return
    for line in text.splitlines():
        words = shlex.split(line.removeprefix("$ "))
        assert words[0] == "splitfx"
        assert cli.main([*words[1:], "--quiet"]) == 0, line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)|src=\"([^\"]+)\"", text):
        place = next(filter(None, target))
        assert place.startswith("http") or (page.parent / place).exists(), place


@pytest.mark.parametrize("page", PAGES[1:], ids=lambda page: page.name)
def test_python_of_the_docs_is_python(page: Path) -> None:
    for text in re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.S | re.M):
        compile(text, page.name, "exec")


def test_the_block_on_operators_runs() -> None:
    (text,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "operators.md").read_text(), flags=re.S | re.M)
    exec(compile(text, "operators.md", "exec"), {"__name__": "block"})
