"""Group with calibration: the split solved against what the dense model computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import splitfx
from splitfx.errors import PlanError, VerificationError
from splitfx.frontend.trace import trace
from splitfx.ir.graph import info
from splitfx.passes import Group
from tests.models import Head
from tests.passes.grouping import chain, grouped, notes


def test_a_reconstruction_is_nearer_to_the_dense_model() -> None:
    """On inputs that it did not see, in every form; and the more so, the more it sees."""
    model, _ = chain()
    batch, others = torch.randn(2, 64, 3, 12, 12, dtype=torch.float64)
    graph = trace(model, batch[:2])
    for fusion in ("keep", "widen", "none"):
        steps = [
            Group((2, 2, 2), fusion, lowering="branches", calibration=given)  # type: ignore[arg-type]
            for given in (None, batch[:4], batch)
        ]
        wanted = model(others)
        far = [float((grouped(graph, step)[0](others) - wanted).detach().norm()) for step in steps]
        assert far[2] < 0.6 * far[0], far
        assert far[2] < far[1], far
        _, outcome = grouped(graph, steps[2])
        said = [n for n in notes(outcome, "info") if "relative error on held-out inputs" in n]
        assert said


def test_what_is_lost_in_no_layer_is_lost_nowhere() -> None:
    """A network that is split in two already, behind a mix of channels: solved, the split computes just the same."""
    torch.manual_seed(0)
    model = with_norms(torch.randn(64, 3, 12, 12, dtype=torch.float64))
    with torch.no_grad():
        for conv in [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.in_channels > 3]:
            half = conv.out_channels // 2, conv.in_channels // 2
            conv.weight[: half[0], half[1] :] = 0
            conv.weight[half[0] :, : half[1]] = 0
    batch, others = torch.randn(2, 64, 3, 12, 12, dtype=torch.float64)
    for fusion in ("keep", "widen", "none"):
        step = Group((2, 2), fusion, lowering="grouped", calibration=batch)  # type: ignore[arg-type]
        split = splitfx.transform(model, step, batch[:2])
        torch.testing.assert_close(split(others), model(others), rtol=1e-4, atol=1e-5)


def test_an_order_for_the_solved_layers_finds_hidden_branches() -> None:
    """Channels of the two halves are shuffled: in the given order much is lost, in the found one nothing."""
    torch.manual_seed(0)
    batch, others = torch.randn(2, 64, 3, 12, 12, dtype=torch.float64)
    model = halves(batch)
    far = {}
    for order in ("given", "energy", "solved"):
        step = Group((1, 2), order=order, lowering="grouped", calibration=batch)  # type: ignore[arg-type]
        split = splitfx.transform(model, step, batch[:2])
        far[order] = float((split(others) - model(others)).detach().norm() / model(others).detach().norm())
    assert far["solved"] < 1e-5 < 0.01 < far["given"], far


def test_what_an_order_decided_is_in_the_plan() -> None:
    batch = torch.randn(64, 3, 12, 12, dtype=torch.float64)
    model = halves(batch)
    split = splitfx.transform(model, Group((1, 2), order="solved", lowering="grouped", calibration=batch), batch[:2])
    plan = splitfx.Plan.from_toml(info(split).plan.to_toml())
    again = splitfx.transform(model, plan, batch[:2])  # without calibration: the same channels in the same branches
    again.load_state_dict(split.state_dict())
    assert torch.equal(again(batch), split(batch))
    with pytest.raises(PlanError, match="order='solved' needs calibration"):
        splitfx.transform(model, Group((1, 2), order="solved"), batch[:2])
    with pytest.raises(PlanError, match="branches has 3 channels in 2 branches for block 2, which .* another model"):
        splitfx.transform(model, Group((1, 2), order="solved", branches={"2": (0, 1, 1)}), batch[:2])


def halves(batch: torch.Tensor) -> nn.Module:
    """The second block's second conv has two halves that see nothing of each other, in shuffled channels."""
    model = with_norms(batch)
    order, rows = torch.randperm(12), torch.randperm(12)
    with torch.no_grad():
        conv: Any = model.get_submodule("body.10")
        for one, own in ((order[:6], rows[6:]), (order[6:], rows[:6])):
            conv.weight[own[:, None], one] = 0
    return model


def test_calibration_that_fits_nothing_is_refused() -> None:
    model, x = chain()
    graph = trace(model, x)
    batch = torch.randn(8, 3, 12, 12, dtype=torch.float64)
    for given, message in (
        (torch.randn(2, 5, 12, 12, dtype=torch.float64), "do not fit the model"),
        ((x, x), "calibration has 2 inputs"),
        (x[:1], "calibration is a single input; give several"),
        (batch.index_fill(0, torch.tensor(3), float("nan")), "not finite"),
    ):
        with pytest.raises(PlanError, match=message):
            grouped(graph, Group((2, 2, 2), calibration=given))
    said = notes(grouped(graph, Group((2, 2, 2), calibration=batch[:2]))[1], "info")
    assert any("calibration is 2 inputs only" in note for note in said)


def test_calibration_of_another_range_is_refused() -> None:
    batch = torch.randn(64, 3, 12, 12, dtype=torch.float64)
    graph = trace(with_norms(batch), batch[:2])
    for scale, shift in ((255.0, 0.0), (0.05, 0.0), (1.0, 30.0)):
        with pytest.raises(PlanError, match="another range .* batch norm body.1 reads values of .* times the spread"):
            grouped(graph, Group((2, 2), calibration=batch * scale + shift))
    grouped(graph, Group((2, 2), calibration=batch * 1.5))


def test_the_model_keeps_its_weights() -> None:
    batch = torch.randn(64, 3, 12, 12, dtype=torch.float64)
    graph = trace(with_norms(batch), batch[:2])
    before = {key: value.clone() for key, value in graph.state_dict().items()}
    splitfx.transform(graph, Group((2, 2), calibration=batch))
    assert all(torch.equal(before[key], value) for key, value in graph.state_dict().items())


def test_a_solved_split_is_held_to_the_dense_form_of_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oracle is red where the carved graph is not what was solved."""
    from splitfx.carving import narrow

    batch = torch.randn(64, 3, 12, 12, dtype=torch.float64)
    graph = trace(with_norms(batch), batch[:2])
    plain = narrow.weighted

    def off(module: nn.Module, *others: Any) -> nn.Module:
        made: Any = plain(module, *others)
        made.weight = nn.Parameter(made.weight * 1.01)
        return made

    monkeypatch.setattr(narrow, "weighted", off)
    with pytest.raises(VerificationError):
        splitfx.transform(graph, Group((2, 2), lowering="branches", calibration=batch))


def test_calibration_in_half_precision_is_solved_in_float64() -> None:
    model, x = chain()
    step = Group(factors=(2, 2, 2), lowering="branches", calibration=torch.randn(32, 3, 12, 12).bfloat16())
    split = splitfx.transform(model.bfloat16(), step, x.bfloat16())
    assert bool(split(x.bfloat16()).isfinite().all())


def test_norms_behind_divided_layers_take_the_statistics_of_the_batch() -> None:
    """In train mode, which uses a batch's own statistics, the split then gives the same; without, it does not."""
    batch = torch.randn(64, 3, 12, 12, dtype=torch.float64)
    model = with_norms(batch)
    graph = trace(model, batch[:2])

    def far(calibration: torch.Tensor | None) -> float:
        split = splitfx.transform(graph, Group((2, 2), lowering="branches", calibration=calibration))
        with torch.no_grad():
            exact = split.eval()(batch)
            return float((split.train()(batch) - exact).norm() / exact.norm())

    assert far(batch) < 0.01  # a variance of n values and one of n - 1
    assert far(None) > 0.05
    split = splitfx.transform(graph, Group((2, 2), lowering="branches", calibration=batch))
    first = "body.1"  # reads what is not divided
    assert torch.equal(split.get_submodule(first).running_mean, model.get_submodule(first).running_mean)  # type: ignore[arg-type]


def with_norms(batch: torch.Tensor) -> nn.Module:
    """Its running statistics are those of ``batch``."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    channels = 3
    for width in (8, 12):
        for _ in range(2):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        layers.append(nn.MaxPool2d(2))
    body = nn.Sequential(*layers)
    model = Head(body, channels).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        model.train()(batch)
    return model.eval()
