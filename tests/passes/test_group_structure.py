"""What Group's graph looks like: branches apart, fusions read by all, what is chosen and what is left."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import fx, nn

import splitfx
from splitfx.carving.division import Masked
from splitfx.compiler.pipeline import run_pass
from splitfx.frontend.trace import trace
from splitfx.ir.ops import text
from splitfx.passes import Group
from tests import oracle
from tests.models import image
from tests.passes.grouping import assert_masked_dense, chain, grouped, in_double
from tests.rewrites import rewritten


class _Between(fx.Interpreter):
    """A graph from the output of one node to the input of another."""

    def __init__(self, graph: fx.GraphModule, first: fx.Node, last: fx.Node) -> None:
        super().__init__(graph, garbage_collect_values=False)
        self.first, self.last = first, last

    def run_node(self, n: fx.Node) -> Any:
        if n is self.first:
            return self.given
        if n is self.last:
            self.found = self.fetch_args_kwargs_from_env(n)[0][0]
        return super().run_node(n)

    def __call__(self, given: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        self.given = given
        self.run(x)
        return self.found


@pytest.mark.parametrize("lowering", ["grouped", "branches"])
@pytest.mark.parametrize("factor", [2, 3])
def test_branches_are_apart(factor: int, lowering: Any) -> None:
    """Between two fusions the Jacobian from one branch's channels to another's is exactly zero."""
    model, x = chain()
    x = x[:1]
    graph = trace(model, x)
    split, _ = grouped(graph, Group(factors=(2, factor, 1), fusion="keep", lowering=lowering))
    nodes = {str(n.target): n for n in split.graph.nodes}
    between = _Between(split, nodes["fusion1"], nodes["fusion2"])
    given = torch.rand(1, 8, 6, 6, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda z: between(z, x), given)
    assert isinstance(jacobian, torch.Tensor)
    reach = jacobian.abs().sum((0, 2, 3, 4, 6, 7))  # [12 out, 8 in]
    for g, outs in enumerate(np.array_split(np.arange(12), factor)):
        for h, ins in enumerate(np.array_split(np.arange(8), factor)):
            part = reach[np.ix_(outs, ins)]
            assert bool((part > 0).any()) if g == h else bool((part == 0).all())


def test_two_branches_into_twice_the_width_keep_the_dense_function() -> None:
    """Each branch has room for every channel, so the first conv of the block loses nothing."""
    first, second = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1)
    with torch.no_grad():
        for rows, columns in ((slice(4), slice(4, 8)), (slice(4, 8), slice(4))):
            first.weight[rows, columns] = 0  # block 1 is in two branches already
    layers = [
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        first,
        nn.MaxPool2d(2),
        second,
        nn.ReLU(),
        nn.MaxPool2d(2),
    ]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * 9, 5)).double().eval()
    x = image(2, 3, 12, 12).double()
    for lowering in ("grouped", "branches"):
        split = splitfx.transform(model, Group(factors=(2, 2), costly="split", lowering=lowering), x)  # type: ignore[arg-type]
        oracle.assert_equal_outputs(split, model, x)
        assert split.state_dict()["fusion1.weight"].shape[:2] == (16, 8)


def test_factor_one_changes_nothing() -> None:
    model, x = chain()
    graph = trace(model, x)
    split, _ = run_pass(graph, Group(factors=(1, 1, 1)))
    assert text(split) == text(graph)
    oracle.assert_equal_outputs(split, model, x)


def test_residual_writers_split_alike_and_the_fusion_feeds_both_paths() -> None:
    graph, x = in_double("residual")
    split, _ = assert_masked_dense(graph, Group(factors=(2, 2), fusion="keep", lowering="branches"), x)
    fusion = next(n for n in split.graph.nodes if n.target == "fusion1")
    readers = {str(n.target).split(".branch")[0] for n in fusion.users}
    seen = set()
    for n in fusion.users:  # slices for branches
        seen |= {str(r.target).split(".branch")[0] for r in n.users}
    assert {"body.2.main.0", "body.2.short"} <= readers | seen


def test_select_exclude_share() -> None:
    model, x = chain()
    graph = trace(model, x)
    some = Group(factors=(2, 2, 2), select=("body.3.*", "body.4.*"), exclude=("body.4.0",), lowering="branches")
    split, _ = assert_masked_dense(graph, some, x)
    divided = {n.partition(".branch")[0] for n in dict(split.named_modules()) if ".branch" in n}
    assert divided & {"body.1.0", "body.4.0", "body.6.0"} == set()
    assert "body.3.0" in divided
    shared, _ = assert_masked_dense(graph, Group(factors=(2, 2, 2), share=2, lowering="branches"), x)
    assert "body.1.0.branch0" not in dict(shared.named_modules())


def test_a_module_called_again_is_split_once() -> None:
    graph, x = in_double("shared_module")
    model = nn.Sequential(graph, nn.Conv2d(6, 4, 1)).double().eval()
    split, _ = assert_masked_dense(trace(model, x), Group(factors=(2,), fusion="none", lowering="branches"), x)
    calls = [n for n in split.graph.nodes if str(n.target).endswith("0.branch0")]
    assert len(calls) == 3


def test_energy_order_keeps_more() -> None:
    """Planted blocks under a random permutation of the channels come back whole."""
    model, x = chain()
    rng = np.random.default_rng(0)
    hidden = rng.permutation(12) % 2
    with torch.no_grad():
        conv = model.get_submodule("body.4.0")
        assert isinstance(conv, nn.Conv2d)
        conv.weight.mul_(torch.tensor(hidden[:, None] == hidden[None])[:, :, None, None])
    graph = trace(model, x)
    kept = []
    for order in ("given", "energy"):
        _, outcome = grouped(graph, Group((1, 2, 1), "keep", lowering="branches", order=order))  # type: ignore[arg-type]
        assert outcome.reference is not None
        kept.append(sum(float(m.weight().square().sum()) for m in outcome.reference.modules() if isinstance(m, Masked)))
    assert kept[1] > kept[0]


# ---------------------------------------------------------------- before and after, as text

BEFORE = """\
%x = input(2, 3, 8, 8)
%first = Conv2d(3, 4, 3, padding=1) "first" (%x)
%relu = relu(%first)
%second = Conv2d(4, 8, 3, padding=1, bias=False) "second" (%relu)
%norm = BatchNorm2d(8) "norm" (%second)
%pool = max_pool2d(%norm, [2, 2])
%last = Conv2d(8, 2, 1) "last" (%pool)
return %last
"""
AFTER = {
    "grouped": """\
%second = Conv2d(4, 8, 3, padding=1, groups=2, bias=False) "second" (%relu)
%norm = BatchNorm2d(8) "norm" (%second)
%pool = max_pool2d(%norm, [2, 2])
%fusion1 = Conv2d(8, 8, 1) "fusion1" (%pool)
""",
    "branches": """\
%slice_tensor = slice(%relu, 1, 0, 2)
%second_branch0 = Conv2d(2, 4, 3, padding=1, bias=False) "second.branch0" (%slice_tensor)
%norm_branch0 = BatchNorm2d(4) "norm.branch0" (%second_branch0)
%pool = max_pool2d(%norm_branch0, [2, 2])
%slice_tensor_1 = slice(%relu, 1, 2, 4)
%second_branch1 = Conv2d(2, 4, 3, padding=1, bias=False) "second.branch1" (%slice_tensor_1)
%norm_branch1 = BatchNorm2d(4) "norm.branch1" (%second_branch1)
%pool_1 = max_pool2d(%norm_branch1, [2, 2])
%cat_default = cat([%pool, %pool_1], 1)
%fusion1 = Conv2d(8, 8, 1) "fusion1" (%cat_default)
""",
}


@pytest.mark.parametrize("lowering", AFTER)
def test_the_text_before_and_after(lowering: Any) -> None:
    lines = BEFORE.splitlines(keepends=True)
    last = lines[-2].replace("%pool", "%fusion1") + lines[-1]
    after = rewritten(BEFORE, Group(factors=(2, 1), lowering=lowering)).partition("# ")[0]
    assert after == "".join(lines[:3]) + AFTER[lowering] + last
