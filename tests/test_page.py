"""The page of `inspect --html`: its tree of boxes, what is marked, tiled stages, memory; that it works in a browser."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import splitfx
from splitfx.compiler.sketch import Sketch, sketch
from splitfx.frontend.trace import trace
from splitfx.ir.graph import info
from splitfx.passes import FoldBatchNorm, Group, SubNetworks, Tile
from splitfx.report.html import inspect_svg, inspect_text
from splitfx.report.html.memory import memory_html
from splitfx.report.html.scene import Item, levels, mark_changes, open_first, plain, scene
from splitfx.report.html.stages import stage_details
from splitfx.report.profile import profile
from tests.browser import dom, needs_browser, probed
from tests.test_report import split
from tests.traced import made_once

EVIL = "<script>alert(1)</script>"
SHAPE = (1, 3, 64, 64)


class Block(nn.Module):
    """A residual block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


def residual(blocks: int = 5) -> nn.Module:
    torch.manual_seed(0)
    parts = {
        "stem": nn.Conv2d(3, 8, 3, padding=1),
        "body": nn.Sequential(*(Block(8) for _ in range(blocks))),
        "pool": nn.AdaptiveAvgPool2d(1),
        "flat": nn.Flatten(),
        "head": nn.Linear(8, 4),
    }
    model = nn.Sequential()
    for name, part in parts.items():
        model.add_module(name, part)
    return model.eval()


@made_once
def tiled():
    return splitfx.transform(residual(), [FoldBatchNorm(), Tile(rows=8)], SHAPE)


def walk(item: Item) -> Iterator[Item]:
    for one in item.items:
        yield one
        yield from walk(one)


# ---------------------------------------------------------------- the tree


def test_every_operation_is_in_one_leaf_and_edges_go_down() -> None:
    for graph in (split(), trace(residual(), SHAPE)):
        nodes = sketch(graph)
        root = scene(nodes)
        leaves = [one for item in walk(root) if item.box is not None for one in item.box.nodes]
        assert sorted(one.name for one in leaves) == sorted(one.name for one in nodes)
        for item in (root, *walk(root)):
            rows, edges, _, _ = levels(item)
            assert all(rows[a] < rows[b] for a, b in edges)


def test_branches_stand_side_by_side_and_end_in_a_fusion() -> None:
    root = scene(sketch(split()))
    rows, edges, _, _ = levels(root)
    branches = [i for i, one in enumerate(root.items) if one.kind == "branch"]
    assert [root.items[i].branch for i in branches] == [0, 1, 0, 1]
    assert len({rows[i] for i in branches}) == 2
    assert sum(one.kind == "fusion" for one in root.items) == 2
    assert not {(a, b) for a, b in map(tuple, edges)} & {(branches[0], branches[1]), (branches[1], branches[0])}
    assert [one.cells for one in walk(scene(sketch(split("grouped")))) if one.kind == "grouped"] == [2, 2]


def test_modules_and_blocks_that_are_alike_are_boxes_that_open() -> None:
    root = scene(sketch(trace(residual(), SHAPE)))
    assert [(one.kind, one.name) for one in root.items[1:]] == [
        ("layer", "stem"), ("repeat", "body.0 to 4"), ("layer", "pool"), ("layer", "head"),
    ]  # fmt: skip
    blocks = root.items[2].items
    assert [(one.name, len(one.items)) for one in blocks] == [(str(i), 3) for i in range(5)]
    assert [one.name for one in blocks[0].items] == ["conv1", "conv2", "add"]
    rows, edges, fed, feeds = levels(blocks[0])
    assert (rows, edges, fed, feeds) == ([0, 1, 2], [[0, 1], [1, 2]], [0, 2], [2])


def test_a_residual_block_is_drawn_with_its_skip(tmp_path: Path) -> None:
    inspect_svg(trace(residual(2), SHAPE), tmp_path / "a.svg")
    assert (tmp_path / "a.svg").read_text().count('class="edge skip"') == 2


def test_a_name_that_says_the_operation_is_told_by_its_shape() -> None:
    class Net(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            small = F.max_pool2d(x, 2)
            return F.interpolate(small, scale_factor=2) + F.interpolate(F.relu(small), scale_factor=2)

    items = scene(sketch(trace(Net(), SHAPE))).items
    assert {one.name: one.label for one in items} == {
        "x": "1×3×64×64",
        "max_pool2d": "1×3×32×32",
        "upsample_nearest2d": "1×3×64×64",
        "relu": "relu upsample_nearest2d",
        "add": "1×3×64×64",
    }


def test_layers_inside_a_stage_tell_their_strips() -> None:
    graph = tiled()
    stage = stage_details(graph)["tiled"]
    root = scene(sketch(graph), {"tiled": stage})
    leaf = next(item for item in walk(root) if item.path == "body.0.conv1")
    conv, relu = (one for one in stage.strips if one.name in {node.name for node in leaf.sketches})
    assert leaf.strip == f"{conv.rows} rows · ≤ {splitfx.ground.table.size(conv.held + relu.held)} kept"
    assert not any(item.strip for item in walk(root) if item.box is None or item.kind == "tiled")
    assert leaf.strip in json.dumps(plain(root, {}), ensure_ascii=False)


def test_what_a_pass_changed_is_marked_and_nothing_else() -> None:
    graph = tiled()
    before, after = scene(info(graph).origin), scene(sketch(graph), stage_details(graph))
    mark_changes(after, before)
    mark_changes(before, after)
    told = {item.path: item.changed for root in (before, after) for item in walk(root) if item.box is not None}
    assert told["body.0.conv1"]  # its norm is gone
    assert not told["head"]
    assert not told["stem"]
    assert any(item.changed for item in walk(after) if item.kind == "tiled")


def test_few_boxes_are_open_at_first() -> None:
    root = scene(sketch(trace(residual(40), SHAPE)))
    open_first(root)
    repeat = next(item for item in walk(root) if item.kind == "repeat")
    assert not repeat.open


def test_notes_stand_at_their_layers() -> None:
    root = scene(sketch(tiled()))
    made = json.dumps(plain(root, {"head": ["tile: why"]}))
    assert made.count('"t": ["tile: why"]') == 1


# ---------------------------------------------------------------- stages and memory


def test_a_stage_tells_its_strips_and_its_peak() -> None:
    graph = tiled()
    ((path, stage),) = stage_details(graph).items()
    program = graph.get_submodule("tiled").program((torch.zeros(SHAPE),))  # type: ignore[operator, union-attr]
    assert (path, stage.peak_bytes) == ("tiled", program.peak)
    strip = {one.layer: one for one in stage.strips}["body.0.conv1"]
    assert 1 <= strip.rows <= 16 < strip.of == 64
    assert strip.runs >= 7
    assert strip.held == pytest.approx(strip.rows * 8 * 64 * 4, rel=1)  # rows x channels x columns x bytes
    assert max(count for count, _ in stage.live) == stage.peak_bytes
    given = 3 * 64 * 64 * 4  # the stage's input, which lies outside
    assert sum(count for *_, count in stage.at_peak) + given == stage.peak_bytes


def test_the_chart_has_axes_both_curves_and_the_peak() -> None:
    graph = tiled()
    text = memory_html(sketch(graph), stage_details(graph), info(graph).origin)
    assert 'polygon class="before"' in text
    assert 'polygon class="after"' in text
    assert "KiB</text>" in text
    was = profile(trace(residual(), SHAPE)).peak_bytes
    assert f"peak before {splitfx.ground.table.size(was)}" in text
    assert re.search("alive at the peak, while [a-z0-9.]+, inside tiled, runs", text)


def test_alive_at_the_peak_adds_up_to_it() -> None:
    graph = trace(residual(), SHAPE)
    text = memory_html(sketch(graph), {}, ())
    listed = re.findall(r"<td>([\d.]+) KiB</td></tr>", text)
    assert sum(map(float, listed)) * 1024 == pytest.approx(profile(graph).peak_bytes, rel=0.01)


def test_alive_at_the_peak_of_branches_and_of_a_stage_adds_up_to_it() -> None:
    """Branches that are alike are one line, and what an operation needs while it runs is another."""
    conv = lambda width: [nn.Conv2d(width, 32, 3, padding=1), nn.ReLU(inplace=True)]  # noqa: E731
    model = nn.Sequential(*conv(3), *conv(32), nn.MaxPool2d(2), *conv(32), nn.MaxPool2d(2), *conv(32)).eval()
    branches = splitfx.transform(model, Group(factors=4, lowering="branches"), SHAPE)
    for graph in (branches, tiled()):
        text = memory_html(sketch(graph), stage_details(graph), ())
        listed = re.findall(r"<td>([\d.]+) KiB</td></tr>", text)
        more = sum(map(float, re.findall(r"smaller ones, ([\d.]+) KiB", text)))
        assert (sum(map(float, listed)) + more) * 1024 == pytest.approx(profile(graph).peak_bytes, rel=0.01)
    assert "of them)" in memory_html(sketch(branches), {}, ())
    assert "while it runs" in memory_html(sketch(branches), {}, ())


def test_the_sketch_survives_a_folder(tmp_path: Path) -> None:
    splitfx.save(tiled(), tmp_path / "saved")
    again = splitfx.load(tmp_path / "saved")
    assert info(again).origin == info(tiled()).origin
    assert all(isinstance(one, Sketch) for one in info(again).origin)
    assert "before</text>" not in inspect_text(again)  # drawn by the script, from the data
    assert '"before":{' in inspect_text(again)


def test_models_and_their_entries() -> None:
    graph = splitfx.transform(residual(), SubNetworks(cuts=("body.2",)), SHAPE, verify=False)
    text = inspect_text(graph)
    assert "<h2>Models</h2>" in text
    assert "sub0 enters: " in text
    assert "in place of all up to" in text


# ---------------------------------------------------------------- the file


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


def test_the_drawing_alone_is_a_picture_without_script(tmp_path: Path) -> None:
    inspect_svg(split(), tmp_path / "a.svg")
    text = (tmp_path / "a.svg").read_text()
    assert text.count('class="box branch') == 4
    assert "<script" not in text


def test_an_existing_page_is_kept(tmp_path: Path) -> None:
    target = tmp_path / "page.html"
    target.write_text("mine")
    with pytest.raises(splitfx.SplitfxError, match="already exists"):
        splitfx.inspect_html(split(), target)
    assert target.read_text() == "mine"


def test_a_model_that_splitfx_did_not_make_has_no_page(tmp_path: Path) -> None:
    with pytest.raises(splitfx.UnsupportedError):
        splitfx.inspect_html(residual(), tmp_path / "page.html")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- in a browser


@needs_browser
def test_the_page_in_a_browser(tmp_path: Path) -> None:
    most = max(row.params for row in profile(split()).rows)
    found = probed(
        split(),
        """document.querySelectorAll('.layers table.sortable th button')[3].click();
        found.first=document.querySelector('.layers .sortable tbody tr').cells[3].dataset.v;
        found.sorted=document.querySelectorAll('[aria-sort]').length;
        found.fits=document.documentElement.scrollWidth<=innerWidth;
        var count=()=>document.querySelectorAll('#graph .box.branch').length;
        found.both=count();
        document.querySelector('[data-which=before]').click();found.before=count();
        document.querySelector('[data-which=after]').click();found.after=count();""",
        tmp_path,
    )
    assert found == {
        "first": str(most), "sorted": 1, "fits": True, "both": 4, "before": 0, "after": 4, "errors": [],
    }  # fmt: skip


@needs_browser
def test_search_and_opening_in_a_browser(tmp_path: Path) -> None:
    found = probed(
        trace(residual(40), SHAPE),
        """var count=()=>document.querySelectorAll('#graph .box').length, find=document.getElementById('find');
        found.first=count();
        find.value='body.17.conv2';find.dispatchEvent(new Event('input'));
        found.hits=document.querySelectorAll('#graph .hit').length;
        found.told=document.getElementById('found').textContent;
        find.dispatchEvent(new KeyboardEvent('keydown',{key:'Enter'}));
        found.side=document.querySelector('#side h3').textContent;
        document.getElementById('close').click();found.closed=count();
        var body=Array.from(document.querySelectorAll('#graph .box')).find(g=>g.item.n.startsWith('body'));
        body.dispatchEvent(new KeyboardEvent('keydown',{key:'Enter',bubbles:true}));found.opened=count();
        var place=()=>document.querySelector('#graph>g').getAttribute('transform'),at=place();
        document.getElementById('graph').dispatchEvent(new KeyboardEvent('keydown',{key:'ArrowDown'}));
        found.moved=place()!==at;at=place();document.getElementById('plus').click();found.zoomed=place()!==at;
        document.getElementById('open').click();found.all=count();
        found.skips=document.querySelectorAll('#graph .skip').length;""",
        tmp_path,
    )
    assert found.pop("first") < 60
    assert found.pop("skips") == 40
    assert found.pop("all") > 120
    assert found == {
        "hits": 1, "told": "1 found", "side": "body.17.conv2", "closed": 5, "opened": 45, "moved": True,
        "zoomed": True, "errors": [],
    }  # fmt: skip


@needs_browser
def test_a_tiled_stage_opens_to_its_layers_in_a_browser(tmp_path: Path) -> None:
    found = probed(
        tiled(),
        """document.querySelector('[data-which=after]').click();
        var names=Array.from(document.querySelectorAll('#graph .box')).map(g=>g.item.p);
        found.inside=names.includes('stem')&&names.some(n=>n.startsWith('body'));
        found.rows=document.querySelectorAll('.short tbody tr').length>8;
        found.strips=document.getElementById('graph').textContent.includes('rows · ≤');
        var stage=()=>Array.from(document.querySelectorAll('#graph .box')).find(g=>g.item.k==='tiled');
        var click=()=>stage().dispatchEvent(new MouseEvent('click',{bubbles:true}));
        var told=()=>document.querySelectorAll('#side tbody tr').length;
        click();found.once=told();click();found.twice=told()-found.once;""",
        tmp_path,
    )
    assert found.pop("once") > 10
    assert found == {"inside": True, "rows": True, "strips": True, "twice": 0, "errors": []}


@needs_browser
def test_an_evil_name_stays_text_in_a_browser(tmp_path: Path) -> None:
    page = splitfx.inspect_html(trace(evil(), torch.zeros(1, 3, 8, 8)), tmp_path / "page.html")
    trap = "<script>window.alert=function(){document.title='hit'}</script><style>"
    page.write_text(page.read_text().replace("<style>", trap))
    seen = dom(page, tmp_path / "browser")
    assert "<h1>&lt;script&gt;" in seen
    assert "data-ready" in seen
    assert "<title>hit" not in seen
