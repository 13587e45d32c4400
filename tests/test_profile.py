"""Profiles: the figures, the table as a person reads it, the picture, the JSON."""

from __future__ import annotations

import builtins
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import nn

from splitfx.errors import MissingExtraError, SplitfxError, UnsupportedError
from splitfx.frontend.trace import trace
from splitfx.ground.table import dims, number, seconds, shorten, size, table
from splitfx.report.fold import fold
from splitfx.report.profile import Profile, profile


@pytest.fixture(scope="module")
def resnet() -> Profile:
    return profile(torchvision.models.resnet18(weights=None).eval(), torch.zeros(1, 3, 224, 224))


def small() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 5)).eval()


def test_the_figures_of_resnet18(resnet: Profile) -> None:
    assert resnet.params == 11_689_512
    assert resnet.macs == 1_814_073_344
    assert resnet.flops == 2 * resnet.macs
    assert resnet.ops > resnet.macs
    assert (resnet.peak_node, f"{resnet.peak_bytes / 2**20:.2f}") == ("bn1", "6.70")
    assert not resnet.uncounted
    conv = next(row for row in resnet.rows if row.layer == "layer1.0.conv1")
    assert (conv.op, conv.shape, conv.params) == ("conv2d", (1, 64, 56, 56), 36864)
    assert conv.bytes == 64 * 56 * 56 * 4
    assert sum(row.params for row in resnet.rows) == resnet.params
    assert sum(row.macs for row in resnet.rows) == resnet.macs
    assert max(row.live_bytes for row in resnet.rows) == resnet.peak_bytes


@pytest.mark.parametrize("rows", [60, 20, 5, None])
def test_tables_fit_and_say_what_they_left_out(resnet: Profile, rows: int | None) -> None:
    text = resnet.table(rows)
    assert max(map(len, text.splitlines())) <= 100
    assert "6.70 MiB <" in text
    assert "1.81 G MACs" in text
    assert "11.69 M parameters" in text
    assert ("folded" in text or "sums up" in text) == (rows is not None)
    lines, _ = fold(resnet.rows, rows)
    assert sum(line.params for line in lines) == resnet.params
    assert sum(line.macs for line in lines) == resnet.macs


def test_a_small_model_prints_like_this() -> None:
    assert (
        str(profile(small(), torch.zeros(1, 3, 8, 8)))
        == """\
Sequential on 1×3×8×8 float32

layer    operation   output  params    MACs    result     alive
-------  ---------  -------  ------  ------  --------  ----------
input_1  input      1×3×8×8       -       -     768 B     768 B
0        conv2d     1×8×6×6     224  7.78 k  1.12 KiB  1.88 KiB
1        relu       1×8×6×6       -       -  1.12 KiB  3.00 KiB <
2        flatten      1×288       -       -  1.12 KiB  1.88 KiB
3        linear         1×5  1.45 k  1.44 k      20 B  1.89 KiB

1.67 k parameters, 9.22 k MACs, 18.43 k FLOPs, 9.80 k operations with the elementwise ones
< memory peaks at 3.00 KiB in 1, 768 B of it inputs; parameters are apart"""
    )


def test_json_holds_everything(resnet: Profile) -> None:
    found = json.loads(resnet.to_json())
    assert found["format"] == 1
    assert found["peak_node"] == "bn1"
    assert len(found["rows"]) == len(resnet.rows)
    assert found["rows"][1]["layer"] == "conv1"


def test_a_graph_needs_no_inputs_and_takes_other_ones() -> None:
    graph = trace(small(), torch.zeros(2, 3, 8, 8))
    assert profile(graph).macs == 2 * profile(graph, torch.zeros(1, 3, 8, 8)).macs
    assert profile(graph).macs == profile(graph, torch.zeros(2, 3, 8, 8)).macs


def test_what_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="give profile its example_inputs"):
        profile(small())
    graph = trace(small(), torch.zeros(2, 3, 8, 8))
    with pytest.raises(UnsupportedError, match="do not fit"):
        profile(graph, torch.zeros(2, 4, 8, 8))
    with pytest.raises(UnsupportedError, match="another structure"):
        profile(graph, (torch.zeros(1), torch.zeros(1)))


def test_uncounted_operators_are_in_the_table() -> None:
    class Odd(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.special.bessel_j0(torch.special.bessel_j0(x))

    assert "not counted: special_bessel_j0 in" in str(profile(Odd(), torch.zeros(4)))


def test_the_picture(resnet: Profile, tmp_path: Path) -> None:
    resnet.plot(tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SplitfxError, match="already exists"):
        resnet.plot(tmp_path / "a.png")
    with pytest.raises(SplitfxError, match="png, svg or pdf"):
        resnet.plot(tmp_path / "a.txt")
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_no_picture_without_matplotlib(resnet: Profile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtraError, match=r"splitfx\[plot\]"):
        resnet.plot(tmp_path / "a.png")


def test_units() -> None:
    sizes = (None, 12, 2048, 6.7 * 2**20, 3 * 2**30)
    assert [size(b) for b in sizes] == ["-", "12 B", "2.00 KiB", "6.70 MiB", "3.00 GiB"]
    assert [number(n) for n in (0, 12, 1500, 15_470_264_320)] == ["-", "12", "1.50 k", "15.47 G"]
    assert [seconds(s) for s in (None, 2.5, 0.0123, 45e-6)] == ["-", "2.5 s", "12.3 ms", "45 µs"]
    assert dims((1, 3, 4)) == "1×3×4"
    assert shorten("features.denseblock1.norm", 13) == "featur…1.norm"


def test_long_names_lose_their_middle() -> None:
    text = table(("layer", "n"), [("a" * 150 + ".conv1", 1), (None, 22)])
    assert max(map(len, text.splitlines())) == 100
    assert "….conv1" not in text
    assert ".conv1" in text
    assert text.splitlines()[-1].split() == ["-", "22"]


def test_a_trace_for_perfetto(resnet: Profile, tmp_path: Path) -> None:
    resnet.save_trace(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    spans = [one for one in events if one["ph"] == "X"]
    alive = [one["args"]["bytes"] for one in events if one["ph"] == "C"]
    assert [one["name"] for one in spans] == [row.layer for row in resnet.rows]
    assert all(a["ts"] + a["dur"] == b["ts"] for a, b in itertools.pairwise(spans))
    assert max(alive) == resnet.peak_bytes
    with pytest.raises(SplitfxError, match="already exists"):
        resnet.save_trace(tmp_path / "trace.json")


def test_a_line_per_module_at_a_depth(resnet: Profile) -> None:
    for depth, lines in ((1, 12), (2, 16)):
        text = resnet.table(depth=depth)
        body = text.split("\n\n")[1].splitlines()[2:]
        body = body[: next((i for i, line in enumerate(body) if "operations are folded" in line), None)]
        assert len(body) == lines, text
    with pytest.raises(UnsupportedError, match="depth counts levels"):
        resnet.table(depth=0)
