"""A disk that is full, in every writer: one `SplitfxError`, what was there stays, and nothing is left beside it.

The operating system refuses to let any file grow beyond a few bytes, so that each writer's own code meets it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import splitfx
from splitfx.errors import SplitfxError
from splitfx.export.bundles.branches import export_branches
from splitfx.export.bundles.submodels import export_bundle
from splitfx.passes import SubNetworks, Tile
from splitfx.report.html import inspect_html, inspect_svg
from splitfx.report.plots.picture import chart
from splitfx.train import checkpoint
from tests.splitnet.carved import Chain, carved
from tests.subnetworks.networks import vgg

resource = pytest.importorskip("resource")
pytest.importorskip("onnxruntime")

IMAGE = torch.zeros(1, 3, 16, 16)


@contextlib.contextmanager
def full(most: int) -> Iterator[None]:
    """No file grows beyond ``most`` bytes; Python ignores the signal that says so, and a write fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)).eval()


def about() -> checkpoint.About:
    return checkpoint.About({}, {}, {}, {}, {})


def draw(path: Path) -> None:
    with chart(path, True, "x") as axes:
        axes.plot([1, 2], [3, 4], label="a")


@functools.cache
def writers() -> dict[str, tuple[Callable[[], Any], Callable[[Any, Path], Any]]]:
    """Name -> what is written, and how. The name's suffix is that of the file; a folder has none."""
    graph = functools.cache(lambda: splitfx.trace(small(), IMAGE))
    tiled = functools.cache(lambda: splitfx.transform(small(), Tile(rows=4), IMAGE))
    models = lambda: splitfx.transform(vgg((8, 8, 0, 8), 16), SubNetworks(cuts=(2,)), IMAGE)  # noqa: E731
    tree = lambda: carved(Chain(), {"stage*": 2, "fc": 2}, ragged=True)  # noqa: E731
    profile = lambda: splitfx.profile(small(), IMAGE)  # noqa: E731
    nothing = lambda: None  # noqa: E731
    return {
        "plan.toml": (nothing, lambda _, p: splitfx.Plan([Tile()]).save(p, overwrite=True)),
        "folder": (tiled, lambda s, p: splitfx.save(s, p, overwrite=True)),
        "bundle": (models, lambda s, p: export_bundle(s, p, runs=1, overwrite=True)),
        "branches": (tree, lambda s, p: export_branches(s, p, overwrite=True)),
        "m.onnx": (graph, lambda s, p: splitfx.export_onnx(s, p, overwrite=True)),
        "big.onnx": (graph, lambda s, p: splitfx.export_onnx(s, p, overwrite=True, external_data=True)),
        "page.html": (tiled, lambda s, p: inspect_html(s, p, overwrite=True)),
        "page.svg": (tiled, lambda s, p: inspect_svg(s, p, overwrite=True)),
        "profile.png": (profile, lambda s, p: s.plot(p, overwrite=True)),
        "profile.pdf": (profile, lambda s, p: s.plot(p, overwrite=True)),
        "trend.svg": (nothing, lambda _, p: draw(p)),
        "map.npy": (tiled, lambda s, p: splitfx.stream(s, IMAGE[0].numpy(), p, overwrite=True)),
        "metrics.csv": (nothing, lambda _, p: checkpoint.write_metrics(p.parent, "a,b\n" * 100, 1)),
        "checkpoint.pt": (nothing, lambda _, p: checkpoint.write(p.parent, about(), 1, {"w": torch.zeros(9999)})),
        "result.json": (nothing, lambda _, p: checkpoint.write_text(p, "{}" * 100)),
    }


NAMES = tuple(writers())


def content(place: Path) -> dict[str, bytes]:
    return {str(one.relative_to(place)): one.read_bytes() for one in sorted(place.rglob("*")) if one.is_file()}


@pytest.mark.parametrize("name", NAMES)
def test_a_full_disk_is_one_error_and_keeps_what_was_there(name: str, tmp_path: Path):
    make, write = writers()[name]
    what, path = make(), tmp_path / name
    with full(10), pytest.raises(SplitfxError) as caught:
        write(what, path)
    assert list(tmp_path.iterdir()) == []
    assert name in str(caught.value)
    write(what, path)
    before = content(tmp_path)
    with full(max(map(len, before.values())) // 2), pytest.raises(SplitfxError) as caught:  # in the midst of it
        write(what, path)
    assert name in str(caught.value)
    assert content(tmp_path) == before


def test_sabotage_a_writer_of_its_own_is_seen(tmp_path: Path):
    with pytest.raises(OSError, match="File too large"), full(10):
        (tmp_path / "careless.txt").write_text("x" * 100)
