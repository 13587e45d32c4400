"""Texts and pages for people: width, units, folding, escaping, and a page that works in a browser."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn

import splitfx
from splitfx.compiler.pipeline import Figures, Step
from splitfx.compiler.protocol import Note
from splitfx.frontend.trace import trace
from splitfx.passes import Group
from splitfx.report.explain import Explanation
from splitfx.report.explanation import explanation_text, folded, ratio
from splitfx.report.html import inspect_text
from splitfx.report.html.boxes import boxes
from splitfx.report.profile import profile
from tests.traced import made_once

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
EVIL = "<script>alert(1)</script>"


def network(width: int = 8) -> nn.Module:
    block = [nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        *block,
        nn.MaxPool2d(2),
        nn.Conv2d(width, width, 3, padding=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, 4),
    )


@made_once
def split(lowering: str = "branches"):
    plan = splitfx.Plan([Group(factors=(2, 2, 2), lowering=lowering)], input_shape=(1, 3, 16, 16))  # type: ignore[arg-type]
    return splitfx.transform(network(), plan)


def step(notes: tuple[Note, ...], changed: bool = True, difference: float | None = 1e-15) -> Step:
    return Step(
        "group",
        {"factors": [2] * 40},
        "retrain",
        changed,
        notes,
        1.5,
        difference,
        Figures(10**6, 10**9, 2**20, "a" * 70),
        Figures(5 * 10**5, 10**8, 2**21, "b" * 70),
    )


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        (10, 10, "same"),
        (15.47, 7.16, "÷2.16"),
        (1, 1.3, "×1.30"),
        (100, 1, "÷100"),
        (0, 5, "-"),
        (1000, 1001, "+0.1 %"),
    ],
)
def test_ratio(before: float, after: float, words: str) -> None:
    assert ratio(before, after) == words


def test_equal_notes_are_one_line() -> None:
    notes = [Note(f"layer{i}", "left undivided: why") for i in range(12)] + [Note("x", "else")]
    assert folded(notes) == [
        ("12 layers: layer0, layer1, layer2 and 9 more", "left undivided: why"),
        ("x", "else"),
    ]


def test_explanation_fits_100_columns() -> None:
    notes = tuple(
        Note("features.denseblock1." * n + "conv", "why " * 60, k)
        for n in range(1, 6)
        for k in ("did", "declined", "info")
    )  # type: ignore[arg-type]
    text = explanation_text(Explanation("Net", "torch.export", notes, (step(notes), step(notes, False, None))))
    assert max(map(len, text.splitlines())) <= 100
    assert "all 2 passes together" in text


def test_explanation_tells_promise_oracle_and_units() -> None:
    text = str(splitfx.explain(split()))
    for part in ("promise retrain", "Verified in float64", "÷", "KiB", "fusion2", "2 branches", "declined"):
        assert part in text


def test_unverified_and_untouched_are_said() -> None:
    assert "Not verified" in explanation_text(Explanation("N", "f", (), (step((), True, None),)))
    assert "changed nothing" in explanation_text(Explanation("N", "f", (), (step((), False, None),)))
    assert "no pass has run" in explanation_text(Explanation("N", "f", (), ()))


def test_comparison_text() -> None:
    model = network().eval()
    text = str(splitfx.compare(model, split(), torch.zeros(1, 3, 16, 16)))
    assert "peak memory" in text
    assert "largest value" in text
    assert max(map(len, text.splitlines())) <= 100


def test_branches_stand_side_by_side() -> None:
    found = boxes(split())
    rows = [b.row for b in found if b.kind == "branch"]
    assert len(rows) == 4
    assert sorted(rows) == sorted([rows[0], rows[0], rows[2], rows[2]])
    assert [b.kind for b in found].count("fusion") == 2
    assert [b.cells for b in boxes(split("grouped")) if b.kind == "grouped"] == [2, 2]


@pytest.mark.parametrize("limit", [1, 3, 5, 80])
def test_every_operation_is_in_one_box_and_edges_go_down(limit: int) -> None:
    graph = split()
    found = boxes(graph, limit)
    inside = [n for b in found for n in b.nodes]
    assert len(inside) == len(set(inside)) == sum(n.op not in ("get_attr", "output") for n in graph.graph.nodes)
    assert all(one.row < box.row for box in found for one in box.before)


def evil() -> nn.Module:
    model = nn.Sequential()
    model.add_module(EVIL.replace(".", ""), nn.Conv2d(3, 4, 3))
    model.__class__ = type(EVIL, (nn.Sequential,), {})
    return model


def test_the_page_asks_for_nothing_and_escapes_everything() -> None:
    page = inspect_text(trace(evil(), torch.zeros(1, 3, 8, 8)))
    assert "<script>alert" not in page
    assert "&lt;script&gt;" in page
    assert not re.search(r"(src|href)\s*=\s*[\"']?(https?:)?//|@import|url\(", page)


def test_an_existing_page_is_kept(tmp_path: Path) -> None:
    target = tmp_path / "page.html"
    target.write_text("mine")
    with pytest.raises(splitfx.SplitfxError, match="already exists"):
        splitfx.inspect_html(split(), target)
    assert target.read_text() == "mine"


def test_a_model_that_splitfx_did_not_make_has_no_page(tmp_path: Path) -> None:
    with pytest.raises(splitfx.UnsupportedError):
        splitfx.inspect_html(network(), tmp_path / "page.html")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def dom(page: Path, browser: Path) -> str:
    assert CHROMIUM is not None
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-sync",
        "--disable-background-networking",
        "--disable-component-update",
        f"--user-data-dir={browser}",
    ]
    done = subprocess.run([CHROMIUM, *flags, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120)
    return done.stdout


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")
def test_the_page_in_a_browser(tmp_path: Path) -> None:
    graph = split()
    page = splitfx.inspect_html(graph, tmp_path / "page.html")
    most = max(row.params for row in profile(graph).rows)
    probe = """<script>document.querySelectorAll('.sortable th button')[3].click();
    var first = document.querySelector('.sortable tbody tr').cells[3].textContent;
    var page = document.documentElement;
    document.body.setAttribute('data-first', first);
    document.body.setAttribute('data-fits', page.scrollWidth <= innerWidth)</script></body>"""
    page.write_text(page.read_text().replace("</body>", probe))
    seen = dom(page, tmp_path / "browser")
    assert f'data-first="{most}"' in seen  # the most parameters come first
    assert 'data-fits="true"' in seen
    assert seen.count('<g class="box branch">') == 4
    assert "aria-sort" in seen
    assert "error" not in seen.lower().split("<body", 1)[0]


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")
def test_an_evil_name_stays_text_in_a_browser(tmp_path: Path) -> None:
    page = splitfx.inspect_html(trace(evil(), torch.zeros(1, 3, 8, 8)), tmp_path / "page.html")
    trap = "<script>window.alert=function(){document.title='hit'}</script><style>"
    page.write_text(page.read_text().replace("<style>", trap))
    seen = dom(page, tmp_path / "browser")
    assert "<h1>&lt;script&gt;" in seen
    assert "<title>hit" not in seen
