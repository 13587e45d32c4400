"""The pages of `inspect_html`: how large they are, how long they take to make, and to be drawn by a browser.

Needs Chromium; ``drawn`` is from the start of the navigation to the end of the page's script.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torchvision
from torch import fx

import splitfx
from splitfx.ground.table import size
from splitfx.passes import FoldBatchNorm, Group, SubNetworks, Tile

NAME = "pages"
COLUMNS = (
    ("model", "model", str),
    ("plan", "plan", str),
    ("bytes", "page", size),
    ("made", "made in", lambda v: f"{v:.2f} s"),
    ("drawn", "drawn in", lambda v: "-" if v is None else f"{v:.0f} ms"),
)
LEFT = (0, 1)


def made(name: str, passes: Any, side: int) -> Callable[[], fx.GraphModule]:
    model = lambda: getattr(torchvision.models, name)().eval()  # noqa: E731
    return lambda: splitfx.transform(model(), passes, (1, 3, side, side), verify=False)


GRAPHS = {
    ("ResNet-18", "fold, tile"): made("resnet18", [FoldBatchNorm(), Tile(budget="20 MiB")], 1024),
    ("VGG-16", "group 8, 2, 2, 4, 4"): made("vgg16", Group(factors=(8, 2, 2, 4, 4), lowering="branches"), 224),
    ("ResNet-18", "sub-models"): made("resnet18", SubNetworks(cuts=("layer2", "layer3")), 224),
    ("ResNet-152", "fold"): made("resnet152", FoldBatchNorm(), 224),
}


def run(quick: bool) -> list[dict[str, Any]]:
    rows = []
    for (model, plan), make in list(GRAPHS.items())[: 1 if quick else None]:
        graph = make()
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            page = splitfx.inspect_html(graph, Path(folder) / "page.html")
            took = time.perf_counter() - started
            count = page.stat().st_size
            rows.append({"model": model, "plan": plan, "bytes": count, "made": took, "drawn": drawn(page)})
    return rows


def drawn(page: Path) -> float | None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        return None
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={page.parent / 'browser'}", "--dump-dom"]
    done = subprocess.run([browser, *flags, page.as_uri()], capture_output=True, text=True, timeout=120)
    found = re.search(r'data-ready="(\d+)"', done.stdout)
    return float(found[1]) if found is not None else None
