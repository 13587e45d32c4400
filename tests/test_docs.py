"""Blocks of README and docs run as a reader would run them, in an empty folder; every link leads somewhere.

Those of the README run each alone. Those of a page in docs run in their order, in one folder: Python shares its names,
`console` its files. Two comments in a page, which a reader does not see, go with them:

- ``<!-- given ... -->`` is Python for what the reader brings: a network, images, data (`tests.readers`);
- ``<!-- not run: why -->`` above a block leaves it out, for a reason: another machine, data, minutes.
"""

import re
import shlex
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from splitfx import cli

ROOT = Path(__file__).parents[1]
README, *DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "passes" / "README.md"]
SLOW = {"plan.md", "train.md"}  # half a minute each: they measure and train
_BLOCK = re.compile(
    r"^<!-- (?P<given>given)\n(?P<code>.*?)^-->"
    r"|(?:^<!-- not run: (?P<why>[^\n]+) -->\n\n?)?^```(?P<kind>[\w{}]*)\n(?P<text>.*?)^```",
    flags=re.S | re.M,
)


class Block(NamedTuple):
    kind: str
    text: str
    why: str | None  # it is not run


def blocks(page: Path) -> list[Block]:
    found = _BLOCK.finditer(page.read_text(encoding="utf-8"))
    return [Block("python", m["code"], None) if m["given"] else Block(m["kind"], m["text"], m["why"]) for m in found]


def run(block: Block, names: dict[str, Any]) -> None:
    if block.kind == "python":
        exec(compile(block.text, "block", "exec", dont_inherit=True), names)
        return
    for line in block.text.splitlines():
        assert line.startswith("$ splitfx "), f"{line!r}: `console` shows commands alone"
        assert cli.main([*shlex.split(line, comments=True)[2:], "--quiet"]) == 0, line


def runnable(page: Path) -> list[Block]:
    return [block for block in blocks(page) if block.kind in ("python", "console") and block.why is None]


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_readme_is_short() -> None:
    assert len(README.read_bytes()) <= 7168
    assert len(runnable(README)) >= 6


@pytest.mark.parametrize("number", range(len(runnable(README))))
def test_a_block_of_the_readme_runs_alone(number: int) -> None:
    run(runnable(README)[number], {"__name__": "block"})


@pytest.mark.parametrize(
    "page",
    [pytest.param(p, id=p.name, marks=[pytest.mark.slow] * (p.name in SLOW)) for p in DOCS if runnable(p)],
)
def test_a_page_runs_from_top_to_bottom(page: Path) -> None:
    names: dict[str, Any] = {"__name__": "block"}
    for block in runnable(page):
        run(block, names)


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_a_block_is_run_or_says_why_not(page: Path) -> None:
    """Fences without a language, or with an unknown one, would slip by."""
    for block in blocks(page):
        assert block.kind in ("python", "console", "text", "toml", "{toctree}", "{include}"), block.text
        assert block.why is None or len(block.why.split()) >= 3
        if block.kind == "python":
            compile(block.text, page.name, "exec")


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("<!-- given\nx = 1\n-->\n\n```python\nx\n```\n", ["python", "python"]),
        ("<!-- not run: it takes a GPU -->\n\n```python\n1 / 0\n```\n```console\n$ splitfx doctor\n```\n", ["console"]),
        ("```python\n1 / 0\n```\n", ["python"]),
    ],
)
def test_blocks_are_found(text: str, kinds: list[str], tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text(text)
    assert [block.kind for block in runnable(tmp_path / "page.md")] == kinds


def test_a_false_block_is_red() -> None:
    with pytest.raises(ZeroDivisionError):
        run(Block("python", "1 / 0", None), {})
    with pytest.raises(AssertionError, match="explain nowhere"):
        run(Block("console", "$ splitfx explain nowhere\n", None), {})


@pytest.mark.parametrize("page", [README, *DOCS], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)|src=\"([^\"]+)\"", text):
        place = next(filter(None, target))
        assert place.startswith("http") or (page.parent / place).exists(), place
