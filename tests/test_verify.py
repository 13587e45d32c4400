"""The oracle: what it calls equal, what it refuses, and that it sees faults of every size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

import splitfx
from splitfx.analysis.oracle import (
    Exact,
    Misfit,
    Pair,
    acts_as_in_eval,
    difference,
    in_double,
    random_flat,
    require_equal,
    run_exact,
)
from splitfx.errors import VerificationError
from splitfx.frontend.trace import trace
from splitfx.ir.graph import TensorSpec, copy_graph, info
from splitfx.passes import Tile
from tests.models import ZOO, conv_bn, image
from tests.oracle import assert_equal, leaves, run
from tests.sampled import sampled
from tests.traced import odd

GROUP_BY = "name"  # one worker does all that is asked of a model, so that it is traced once


def graph(name: str = "residual") -> fx.GraphModule:
    return odd(name)[2]


@pytest.mark.parametrize("name", sampled(sorted(ZOO), 3))
def test_a_graph_equals_itself(name: str) -> None:
    assert difference(graph(name), graph(name)) == 0.0


@pytest.mark.parametrize("name", sorted(ZOO))
def test_exact_is_the_graph_in_float64(name: str) -> None:
    """Interpreted from float32 weights, and run as a float64 copy."""
    made = graph(name)
    inputs = random_flat(made, 0, small=False)
    args, kwargs = pytree.tree_unflatten(inputs, info(made).in_spec)
    with torch.no_grad():
        wanted = [t for t in leaves(run(in_double(made), (tuple(args), kwargs))) if isinstance(t, torch.Tensor)]
    assert_equal(run_exact(made, inputs), wanted)


def test_nothing_is_changed() -> None:
    made = graph().train()
    state = {k: v.clone() for k, v in made.state_dict().items()}
    modes = [m.training for m in made.modules()]
    difference(made, made)
    assert_equal(dict(made.state_dict()), state)
    assert [m.training for m in made.modules()] == modes
    assert next(made.parameters()).dtype == torch.float32


@pytest.mark.parametrize(
    "fault",
    [
        lambda g: g.get_submodule("body.fc").weight.data[0, 0].mul_(1.01),
        lambda g: g.get_submodule("body.body.0.0").weight.data.copy_(
            g.get_submodule("body.body.0.0").weight.roll(1, 0)
        ),
        lambda g: g.get_submodule("body.fc").weight.data.mul_(2),
        lambda g: g.get_submodule("body.fc").bias.data.add_(1e-7),
        lambda g: g.get_submodule("body.fc").bias.data[0].fill_(float("nan")),
        lambda g: g.get_submodule("body.fc").bias.data[0].fill_(float("inf")),
    ],
    ids=["one weight by one percent", "a channel off", "doubled", "a tiny shift", "nan", "inf"],
)
def test_faults_are_seen(fault: Callable[[fx.GraphModule], object]) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = ZOO["residual"]()[0]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.body(x)

    before = trace(Named().eval(), image())
    after = copy_graph(before)
    fault(after)
    with pytest.raises(VerificationError, match="pass 'wrong' broke its promise: outputs differ by"):
        require_equal("wrong", before, after)


def test_a_fault_in_any_output_is_seen() -> None:
    before = graph("dataclass_output")
    after = copy_graph(before)
    after.get_submodule("boxes").bias.data.add_(1)  # type: ignore[union-attr, operator]
    assert difference(before, after) > 0.1


def test_other_shapes_are_an_error() -> None:
    x = image()
    before, after = trace(nn.Conv2d(3, 4, 1), x), trace(nn.Conv2d(3, 5, 1), x)
    with pytest.raises(VerificationError, match="returns .*5, 16, 16.*4, 16, 16.* was promised"):
        difference(before, after)


def test_a_graph_that_does_not_run_is_an_error() -> None:
    before = graph("plain")
    after = copy_graph(before)
    after.get_submodule("body.2.0").weight = nn.Parameter(torch.zeros(12, 7, 3, 3))
    with pytest.raises(VerificationError, match="the rewritten graph does not run: body.2.0"):
        difference(before, after)


def test_large_images_are_checked_small_where_the_model_allows() -> None:
    model = nn.Sequential(conv_bn(3, 4), nn.AdaptiveAvgPool2d(1))
    big = trace(model.eval(), torch.zeros(1, 3, 301, 300))
    assert random_flat(big, 0, small=True)[0].shape == (1, 3, 65, 64)
    flat = trace(nn.Sequential(nn.Conv2d(3, 2, 1), nn.Flatten(), nn.Linear(2 * 70 * 70, 2)), torch.zeros(1, 3, 70, 70))
    assert difference(flat, copy_graph(flat)) == 0.0  # sizes are part of this model


class Casts(nn.Module):
    """Casts to a given type, as models do around softmax and norms."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x).float()
        return self.head(x.to(torch.float32) * torch.ones(4, 1, 1, dtype=torch.float32))


def test_a_model_that_casts_runs_exactly() -> None:
    made = trace(Casts().eval(), image())
    assert difference(made, copy_graph(made)) == 0.0


def test_integer_inputs_stay_in_range() -> None:
    made = trace(nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(6, 2)), torch.tensor([[0, 4], [2, 1]]))
    assert info(made).inputs == (TensorSpec((2, 2), torch.int64, "cpu", 5),)
    assert difference(made, copy_graph(made)) == 0.0


def test_a_model_that_draws_is_equal_to_itself() -> None:
    class Noisy(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.rand(3, 1, 1)

    made = trace(Noisy(), image())
    state = torch.get_rng_state()
    assert difference(made, copy_graph(made)) == 0.0
    assert torch.equal(torch.get_rng_state(), state)


def test_in_eval() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    assert acts_as_in_eval(model)
    model[1].train()
    assert not acts_as_in_eval(model)
    assert acts_as_in_eval(nn.Sequential(nn.Conv2d(3, 4, 1)).train())  # it acts alike in both modes


def test_exact_names_the_layer() -> None:
    made = graph("plain")
    with pytest.raises(Exception, match="body.0.0: "):
        Exact(made).run(torch.zeros(1, 5, 8, 8, dtype=torch.float64))


@pytest.mark.parametrize(
    ("outs", "kernel", "options"),
    [
        (6, 3, {"padding": 1}),
        (6, (3, 5), {"stride": (2, 1), "padding": (0, 2), "bias": False}),
        (12, 3, {"dilation": 2, "padding": 2}),
        (18, 1, {}),
    ],
)
def test_depthwise_convs_tap_by_tap(outs: int, kernel: Any, options: dict[str, Any]) -> None:
    conv = nn.Sequential(nn.Conv2d(6, outs, kernel, groups=6, **options))
    x = torch.randn(2, 6, 11, 9, dtype=torch.float64)
    with torch.no_grad():
        found = run_exact(trace(conv.eval(), image(2, 6, 11, 9)), [x])
        assert_equal(found, [conv.double()(x)])


def test_a_depthwise_conv_that_does_not_fit() -> None:
    made = trace(nn.Sequential(nn.Conv2d(6, 6, 5, groups=6)).eval(), image(2, 6, 9, 9))
    with pytest.raises(Misfit, match="does not fit"):
        run_exact(made, [torch.randn(2, 6, 4, 9, dtype=torch.float64)])


def test_a_float64_stage_is_not_written_to() -> None:
    """Its copy in the oracle takes other weights, and shares no memory with the user's."""
    before = odd("residual", double=True)[2]
    after = splitfx.transform(before, Tile(rows=3))
    kept = {key: value.clone() for key, value in after.state_dict().items()}
    pair = Pair(before, after)
    assert pair.difference() == pytest.approx(0, abs=1e-12)
    other = {id(t): t + 1 for t in after.parameters()}
    assert pair.difference(other=other) > 1e-3  # only one of the two has these weights
    assert pair.difference() == pytest.approx(0, abs=1e-12)
    assert all(torch.equal(value, kept[key]) for key, value in after.state_dict().items())
