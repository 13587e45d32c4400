"""A few models of the zoo in every test run, and the sweep's own table; `make zoo` runs them all."""

from __future__ import annotations

import pytest

pytest.importorskip("timm")

from tests.zoo.models import create, names
from tests.zoo.sweep import STATUS, Row, examine, lost, parse, render

SAMPLE = {
    "torchvision:resnet18": "ok",
    "torchvision:googlenet": "ok (heads: aux1, aux2)",
    "torchvision:shufflenet_v2_x0_5": "ok",
    "torchvision:lraspp_mobilenet_v3_large": "ok",
    "timm:mobileone_s0": "ok",
    "timm:resnetv2_50": "ok",
}


LONG = ("timm:mobileone_s0",)  # a quarter of all


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in LONG else n for n in SAMPLE])
def test_sample_is_ok(name: str) -> None:
    row = examine(name)
    assert row.trace == SAMPLE[name]
    assert row.also == "45x58"


def test_a_wrong_graph_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    from splitfx.frontend import raising

    monkeypatch.setattr(raising.Raiser, "batch_norm", lambda *_: None)
    assert examine("torchvision:resnet18").trace.startswith("differs: train")


def test_a_failure_is_one_line() -> None:
    assert examine("timm:no_such_model").trace.startswith("failed: ")


def test_fresh_models_hide_nothing() -> None:
    """No scale is left at zero: whatever stands before it could be wrong unseen."""
    for parameter in create("timm:resnet10t").parameters():
        assert bool(parameter.any())


def test_table_round_trips_and_tells_what_was_lost() -> None:
    rows = [
        Row("timm:a", "32x32", "free", "45x58", "ok", {"group": "ok"}),
        Row("timm:b", "8x8", "fixed", "-", "failed: why"),
    ]
    known = parse(render(rows))
    assert [known[r.name] for r in rows] == rows
    worse = {"timm:a": Row("timm:a", "32x32", "free", "refused: y", "ok", {"group": "refused: x"}), "timm:b": rows[1]}
    assert lost(known, worse) == [
        "timm:a: group was 'ok', is 'refused: x'",
        "timm:a: was equal at 45x58, is 'refused: y'",
    ]
    assert lost(known, known) == []


def test_committed_table_covers_the_zoo() -> None:
    """Every model has a row; all of torchvision and 95 of 100 of timm are ok."""
    known = parse(STATUS.read_text())
    assert set(known) == set(names())
    for library, share in (("torchvision", 1.0), ("timm", 0.95)):
        rows = [r for r in known.values() if r.name.startswith(library)]
        assert sum(r.trace.startswith("ok") for r in rows) >= share * len(rows)
    assert sum(n.startswith("timm") for n in known) >= 70
    assert sum(n.startswith("torchvision") for n in known) >= 86
