"""Pages of real models as a reader sees them: pictures, size and time to load, search, opening, before and after.

The pictures stay in the folder that SPLITFX_SCREENSHOTS names, to be looked at.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torchvision
from PIL import Image
from torch import fx, nn

import splitfx
from benchmarks.networks import WideResNet
from benchmarks.plans import UNet
from splitfx.compiler.sketch import sketch
from splitfx.ground.table import size
from splitfx.passes import FoldBatchNorm, Group, SplitNet, SubNetworks, Tile
from splitfx.report.html.scene import levels, scene
from tests.browser import needs_browser, picture, probed
from tests.test_report import split as small

BYTES, MS = 3 << 20, 5000  # the most that a page of a real model may take; the time with much to spare
SCRIPT = """var boxes=()=>document.querySelectorAll('#graph .box').length, find=document.getElementById('find');
found.ready=+document.body.dataset.ready;
found.fits=document.documentElement.scrollWidth<=innerWidth;
document.querySelector('[data-which=before]').click();found.before=boxes();
document.querySelector('[data-which=after]').click();found.after=boxes();
document.getElementById('close').click();found.closed=boxes();
document.getElementById('open').click();found.open=boxes();
find.value='conv';find.dispatchEvent(new Event('input'));found.hits=document.querySelectorAll('#graph .hit').length;"""


def made(model: nn.Module, passes: Any, side: int) -> fx.GraphModule:
    return splitfx.transform(model.eval(), passes, (1, 3, side, side), verify=False)


def carved() -> fx.GraphModule:
    levels = {"stage2.*": 2, "stage3.*": 4, "fc": 4}
    return made(WideResNet(16, 2, 20), SplitNet(levels=levels, source="weights", lowering="branches"), 32)


MODELS: dict[str, Callable[[], fx.GraphModule]] = {
    "VGG-16 split": lambda: made(torchvision.models.vgg16(), Group(factors=(8, 2, 2, 4, 4), lowering="branches"), 224),
    "ResNet-18 tiled": lambda: made(torchvision.models.resnet18(), [FoldBatchNorm(), Tile(budget="8 MiB")], 512),
    "U-Net tiled": lambda: made(UNet(16), [FoldBatchNorm(), Tile(budget="0.5x")], 256),
    "WRN carved": carved,
    "ResNet-18 sub-models": lambda: made(torchvision.models.resnet18(), SubNetworks(cuts=("layer2", "layer3")), 224),
    "ResNet-152": lambda: made(torchvision.models.resnet152(), FoldBatchNorm(), 224),
}


def look(name: str, graph: fx.GraphModule, folder: Path) -> str:
    """What is said of a page that is right: it works, is small, and its picture is not blank."""
    found = probed(graph, SCRIPT, folder)
    assert found["errors"] == []
    assert found["fits"]
    assert found["before"] > 0
    assert found["after"] > 0
    assert found["open"] >= found["closed"] > 0
    assert found["hits"] > 0
    page = folder / "page.html"
    assert page.stat().st_size <= BYTES
    assert 0 < found["ready"] <= MS
    kept = Path(os.environ.get("SPLITFX_SCREENSHOTS", folder))
    kept.mkdir(parents=True, exist_ok=True)
    png = kept / f"{name.lower().replace(' ', '-')}.png"
    picture(page, png, folder / "browser")
    with Image.open(png) as shown:
        colours = shown.convert("RGB").getcolors(maxcolors=1 << 22) or []
    most = max(count for count, _ in colours)
    assert len(colours) > 50
    assert most < 0.97 * 1280 * 1600, "the page is nearly blank"
    return f"{name}: {size(page.stat().st_size)}, drawn after {found['ready']} ms, {png}"


@needs_browser
def test_a_small_page(tmp_path: Path) -> None:
    assert "drawn after" in look("small split", small(), tmp_path)


PAPER = """
const graph = document.querySelector('#graph');
dispatchEvent(new Event('beforeprint'));
const [x, y, w, h] = graph.getAttribute('viewBox').split(' ').map(Number), drawn = graph.getBBox();
found.whole = drawn.x >= x && drawn.y >= y && drawn.x + drawn.width <= x + w && drawn.y + drawn.height <= y + h;
found.share = drawn.height / h;
dispatchEvent(new Event('afterprint'));
found.back = !graph.hasAttribute('viewBox');
"""


@needs_browser
def test_paper_holds_the_whole_graph(tmp_path: Path) -> None:
    found = probed(small(), PAPER, tmp_path)
    assert found["errors"] == []
    assert found["whole"]
    assert found["share"] > 0.8
    assert found["back"]


@needs_browser
def test_a_broken_script_is_red(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests import test_screenshots as module

    monkeypatch.setattr(module, "SCRIPT", "nothing_of_that_name()")
    with pytest.raises(AssertionError, match="nothing_of_that_name"):
        look("broken", small(), tmp_path)


def test_groups_are_lanes_that_never_merge() -> None:
    """Two groups that are divided further read one norm: it stands apart, and no lane reads another."""
    root = scene(sketch(carved()))
    _, edges, _, _ = levels(root)
    lanes = [(root.items[a], root.items[b]) for a, b in edges if root.items[a].items and root.items[b].items]
    third = [one for one in root.items if one.name == "stage3" and one.items]
    assert sorted(one.branch for one in third if one.branch is not None) == [0, 1, 2, 3]
    assert all(None in (a.branch, b.branch) or a.name != b.name for a, b in lanes)


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize("name", MODELS)
def test_pages_of_real_models(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = look(name, MODELS[name](), tmp_path)
    with capsys.disabled():
        print(f"\n{told}")
