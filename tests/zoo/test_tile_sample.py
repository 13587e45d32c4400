"""A few tiled models in every test run, all of them in the slow ones; the sweep's own table."""

from __future__ import annotations

import pytest

from tests.zoo import tile_sweep
from tests.zoo.tile_sweep import STATUS, Row, examine, in_own_process, names, parse, render

OVER = {"timm:efficientformerv2_s0", "timm:sequencer2d_s"}  # 3 % and 8 % more than predicted; equal (docs/tile.md)
SAMPLE = ("resnet18", "mobilenet_v3_small", "squeezenet1_1")


@pytest.mark.parametrize("name", SAMPLE)
def test_sample_is_ok(name: str) -> None:
    row = examine(f"torchvision:{name}")
    assert row.word == "ok", row
    assert float(row.after) < 0.62 * float(row.before)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", names())
def test_every_model_is_equal(name: str) -> None:
    word = in_own_process(name).word
    assert word.startswith(("ok", "not tiled", "skipped", *(["over its prediction"] if name in OVER else []))), name


def test_a_wrong_result_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tile_sweep, "STRICT", 0.0)
    monkeypatch.setattr(tile_sweep, "_error", lambda *_: 1e-11)
    assert examine("torchvision:squeezenet1_1").word.startswith("differs")


def test_a_failure_is_one_line() -> None:
    assert examine("torchvision:no_such_model").word.startswith("failed: ")


def test_table_round_trips() -> None:
    rows = [
        Row("torchvision:a", "32x32", "ok", "4.00", "2.00", "0.50", "2.00", "1e-16", "3 of 4", "1", "0.1", "0.2"),
        Row("b"),
    ]
    assert list(parse(render(rows)).values()) == rows


def test_committed_table_covers_the_zoo() -> None:
    """Every model has a row and none differs; nine of ten are tiled."""
    known = parse(STATUS.read_text())
    assert set(known) == set(names())
    assert all(r.word.startswith(("ok", "not tiled", "skipped")) for r in known.values() if r.model not in OVER)
    assert sum(r.word == "ok" for r in known.values()) >= 0.8 * len(known)
