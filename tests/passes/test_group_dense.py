"""Group equals the dense network with weights set to zero: odd models, real ones, any network and options."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn

import splitfx
from splitfx.analysis import facts
from splitfx.analysis.blocks import blocks
from splitfx.compiler.pipeline import run_pass
from splitfx.frontend.trace import trace
from splitfx.ir.ops import text
from splitfx.passes import Group
from tests.passes.grouping import assert_masked_dense, chain, grouped, in_double, notes, per_block
from tests.sampled import sampled
from tests.strategies import networks

SMALL = ["plain", "residual", "concats", "squeeze_excite", "depthwise", "grouped", "channel_shuffle", "norms"]


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize(
    ("lowering", "order"),
    sampled([(how, order) for how in ("grouped", "branches") for order in ("given", "energy")], 3),
)
def test_odd_models(name: str, lowering: Any, order: Any) -> None:
    graph, x = in_double(name)
    for factor, fusion in ((2, "widen"), (3, "none")):
        options: dict[str, Any] = {"fusion": fusion, "lowering": lowering, "order": order, "costly": "split"}
        step = Group(factors=per_block(graph, factor), **options)
        split, outcome = grouped(graph, step)
        if outcome.reference is None:
            assert notes(outcome, "declined")
            continue
        assert_masked_dense(graph, step, x)
        assert text(split) != text(graph)


@pytest.mark.parametrize("gating", ["strict", "relaxed"])
def test_gates(gating: Any) -> None:
    graph, x = in_double("squeeze_excite")
    split, _ = assert_masked_dense(graph, Group(factors=(2, 2), costly="split", gating=gating, lowering="branches"), x)
    names = set(dict(split.named_modules()))
    assert ("body.1.up.branch0" in names) == (gating == "strict")


def test_one_dimensional_networks() -> None:
    body = [
        nn.Conv1d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv1d(8, 8, 3),
        nn.MaxPool1d(2),
        nn.Conv1d(8, 6, 3),
        nn.Flatten(),
    ]
    model = nn.Sequential(*body, nn.Linear(18, 4)).double().eval()
    x = torch.randn(2, 3, 12, dtype=torch.float64)
    graph = trace(model, x)
    assert_masked_dense(graph, Group(factors=per_block(graph, 2), fusion="none", lowering="grouped"), x)
    split, _ = assert_masked_dense(graph, Group(factors=per_block(graph, 2), lowering="branches"), x)
    assert isinstance(split.get_submodule("fusion1"), nn.Conv1d)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    model, x = chain()
    split = splitfx.transform(model.to(dtype), Group(factors=(2, 2, 2), lowering="branches"), x.to(dtype))
    assert split(x.to(dtype)).dtype == dtype


REAL: dict[str, tuple[int, Any]] = {
    "resnet18": (6, "widen"),
    "mobilenet_v2": (2, "keep"),
    "shufflenet_v2_x0_5": (2, "none"),
}
LARGE = [
    "resnet50",
    "densenet121",
    "googlenet",
    "efficientnet_b0",
    "regnet_y_400mf",
    "mobilenet_v2",
    "resnext50_32x4d",
]


def real(name: str, size: int = 64) -> tuple[fx.GraphModule, torch.Tensor]:
    import torchvision

    options = {"init_weights": False, "aux_logits": False} if name == "googlenet" else {}
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, **options).double().eval()
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    return trace(model, x), x


@pytest.mark.parametrize("name", sorted(REAL))
def test_real_models(name: str) -> None:
    graph, x = real(name)
    factor, fusion = REAL[name]
    _, outcome = assert_masked_dense(
        graph,
        Group(factors=per_block(graph, factor), fusion=fusion, lowering="branches"),
        x,
    )
    assert outcome.reference is not None


@pytest.mark.slow
@pytest.mark.parametrize("gating", ["strict", "relaxed"])
@pytest.mark.parametrize("lowering", ["grouped", "branches"])
@pytest.mark.parametrize("name", LARGE)
def test_large_models(name: str, lowering: Any, gating: Any) -> None:
    graph, x = real(name)
    for factor, fusion, order in ((2, "widen", "given"), (3, "none", "energy")):
        step = Group(per_block(graph, factor), fusion, gating=gating, order=order, lowering=lowering)  # type: ignore[arg-type]
        assert_masked_dense(graph, step, x)


def run_law(network: tuple[nn.Module, torch.Tensor], data: st.DataObject) -> None:
    """Any factors, fusions and orders on any network keep the promise, or the pass says why not."""
    model, x = network
    graph = trace(model, x)
    count = len(blocks(facts(graph)))
    factors = tuple(data.draw(st.lists(st.integers(1, 5), min_size=count, max_size=count), label="factors"))
    step = Group(
        factors,
        data.draw(st.sampled_from(("widen", "keep", "none")), label="fusion"),
        data.draw(st.integers(0, 2), label="share"),
        gating=data.draw(st.sampled_from(("strict", "relaxed")), label="gating"),
        order=data.draw(st.sampled_from(("given", "energy")), label="order"),
        lowering=data.draw(st.sampled_from(("grouped", "branches")), label="lowering"),
    )
    run_pass(graph, step)
    _, outcome = grouped(graph, step)
    if outcome.reference is not None:
        assert_masked_dense(graph, step, x)


@settings(max_examples=8)
@given(networks(), st.data())
def test_random_networks(network: tuple[nn.Module, torch.Tensor], data: st.DataObject) -> None:
    run_law(network, data)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@settings(max_examples=120)
@given(networks(10), st.data())
def test_larger_random_networks(network: tuple[nn.Module, torch.Tensor], data: st.DataObject) -> None:
    run_law(network, data)
