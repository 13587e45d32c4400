"""What people type: plans, inputs and results in the forms that come to mind first."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import splitfx
from splitfx import ExportError, Plan, PlanError, TraceError, UnsupportedError
from splitfx.frontend.example_inputs import split_inputs
from splitfx.ir.graph import info
from splitfx.passes import FoldBatchNorm, Group, Tile
from tests.traced import made_once

SHAPE = (1, 3, 32, 32)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 8, 3, padding=1),
    ).eval()


@made_once
def tiled():
    return splitfx.transform(network(), Tile(rows=8), SHAPE)


# ---------------------------------------------------------------- plans


@pytest.mark.parametrize(
    "given",
    [
        Tile(rows=8),
        [Tile(rows=8)],
        (Tile(rows=8),),
        Plan([Tile(rows=8)]),
        {"name": "tile", "rows": 8},
        [{"name": "tile", "rows": 8}],
        {"pass": [{"name": "tile", "rows": 8}]},
        {"format": 1, "pass": [{"name": "tile", "rows": 8}]},
    ],
)
def test_one_plan_in_many_forms(given: Any) -> None:
    assert Plan.of(given) == Plan([Tile(rows=8)])


def test_a_plan_file_by_its_path(tmp_path: Path) -> None:
    plan = Plan([FoldBatchNorm(), Tile(rows=8)], SHAPE)
    plan.save(tmp_path / "plan.toml")
    assert Plan.of(tmp_path / "plan.toml") == Plan.of(str(tmp_path / "plan.toml")) == plan
    split = splitfx.transform(network(), str(tmp_path / "plan.toml"))
    assert [one.name for one in info(split).steps] == ["fold_batchnorm", "tile"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (3, "a plan is a splitfx.Plan, a pass, a list of passes, a dict or the path of a file; got 3"),
        ("no.toml", "no.toml: there is no such plan file"),
        ("tile", "The pass of that name is Tile"),
        (Tile, "Tile is the class of a pass: give Tile"),
        ({"name": "tyle"}, "pass 1 of the plan: no pass is named 'tyle'. Did you mean 'tile'?"),
        ([Tile(rows=8), {"rows": 8}], "pass 2 of the plan has no name"),
        ([Tile(rows=8), 8], "pass 2 of the plan is not a pass: 8"),
        ({"pass": [{"name": "tile"}], "shape": [1]}, "a plan has no key 'shape'"),
        ({}, "a plan needs at least one pass"),
    ],
)
def test_what_is_no_plan(given: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message.replace("?", "\\?")):
        splitfx.transform(network(), given, SHAPE)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("1x3x24x20", "arrays or shapes, such as (1, 3, 224, 224); got '1x3x24x20'"),
        (24, "arrays or shapes, such as (1, 3, 224, 224); got 24"),
        (None, "arrays or shapes, such as (1, 3, 224, 224); there are none"),
    ],
)
def test_what_are_no_example_inputs(given: Any, message: str) -> None:
    with pytest.raises(UnsupportedError, match=re.escape(message)):
        splitfx.trace(network(), given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (network().state_dict(), "not OrderedDict: these are weights; load them into the model"),
        ("resnet18", "not str: names and files of models are for the command line"),
        (network, "not function: give what network() returns"),
        (3, "a model is a torch.nn.Module, not int"),
    ],
)
def test_what_is_no_model(given: Any, message: str) -> None:
    with pytest.raises(TraceError, match=re.escape(message)):
        splitfx.profile(given, SHAPE)


def test_a_file_before_the_model() -> None:
    with pytest.raises(ExportError, match="takes the model first, then the file"):
        splitfx.check_onnx("split.onnx", network())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "same"), [(1 << 16, "64 KiB"), ("0.75x", "57 KiB"), ("75%", "57 KiB"), ("0.75 ×", "57 KiB")]
)
def test_a_budget_in_bytes_or_as_a_share(given: Any, same: str) -> None:
    one, other = (splitfx.transform(network(), Tile(budget=b), SHAPE, verify=False) for b in (given, same))
    assert splitfx.profile(one).peak_bytes == splitfx.profile(other).peak_bytes
    (found,) = info(one).plan.passes
    assert Plan.from_toml(info(one).plan.to_toml()).passes == (found,)


@pytest.mark.parametrize("given", [0, -5, "0x", "x", True, 0.5])
def test_what_is_no_budget(given: Any) -> None:
    with pytest.raises(PlanError, match="budget"):
        Tile(budget=given)


def test_one_factor_is_for_every_block() -> None:
    split = splitfx.transform(network(), Group(factors=2, lowering="grouped"), SHAPE)
    listed = splitfx.transform(network(), Group(factors=(2, 2), lowering="grouped"), SHAPE)
    x = torch.randn(SHAPE)
    assert torch.equal(split(x), listed(x))
    with pytest.raises(PlanError, match="1 or more; got 0"):
        Group(factors=0)


def test_one_factor_with_a_measured_lowering_is_kept_block_by_block() -> None:
    """The plan of the split says for each block what it became, and gives the same graph again."""
    split = splitfx.transform(network(), Group(factors=2), SHAPE)
    resolved = info(split).plan.passes[0]
    assert isinstance(resolved, Group)
    assert resolved.factors == (2, 2)
    assert len(resolved.lowering) == 2


# ---------------------------------------------------------------- inputs


def test_a_shape_stands_for_a_tensor_of_it() -> None:
    (x,), named = split_inputs(SHAPE)
    assert (tuple(x.shape), x.dtype, named) == (SHAPE, torch.float32, {})
    assert x.std() > 0.5  # values that tell a wrong trace from a right one
    assert torch.equal(x, split_inputs(list(SHAPE))[0][0])
    (half,), _ = split_inputs(torch.Size(SHAPE), network().double())
    assert half.dtype == torch.float64


def test_shapes_of_several_inputs() -> None:
    args, _ = split_inputs((SHAPE, (1, 4)))
    assert [tuple(a.shape) for a in args] == [SHAPE, (1, 4)]
    args, named = split_inputs({"x": SHAPE, "scale": 2.0})
    assert (args, tuple(named["x"].shape), named["scale"]) == ((), SHAPE, 2.0)


def test_beside_a_tensor_numbers_are_values() -> None:
    args, named = split_inputs(((torch.zeros(SHAPE), (7, 7)), {"size": (8, 8)}))
    assert (args[1], named) == ((7, 7), {"size": (8, 8)})


def test_arrays_take_the_model_s_type() -> None:
    (x, i), _ = split_inputs((np.zeros(SHAPE), np.zeros((1, 4), np.int64)), network())
    assert (x.dtype, i.dtype) == (torch.float32, torch.int64)
    assert tuple(info(splitfx.trace(network(), np.zeros(SHAPE))).inputs[0].shape) == SHAPE


def test_a_shape_that_no_machine_holds() -> None:
    with pytest.raises(UnsupportedError, match="give sizes that fit into memory"):
        splitfx.trace(network(), (1, 3, 10**9, 10**9))


def test_a_split_knows_its_inputs() -> None:
    assert splitfx.compare(network(), tiled()).max_rel < 1e-5
    assert splitfx.measure(tiled(), runs=1).peak_bytes > 0
    assert splitfx.compare(network(), tiled(), SHAPE).max_rel < 1e-5
    with pytest.raises(UnsupportedError, match="Sequential is no traced graph: give its example_inputs"):
        splitfx.compare(network(), network())


# ---------------------------------------------------------------- results


def test_torch_save_keeps_the_record(tmp_path: Path) -> None:
    torch.save(tiled(), tmp_path / "m.pt")
    again = torch.load(tmp_path / "m.pt", weights_only=False)
    assert str(splitfx.explain(again)) == str(splitfx.explain(tiled()))
    assert splitfx.compare(network(), again).max_rel < 1e-5


def test_results_show_themselves_in_a_notebook() -> None:
    profile = splitfx.profile(tiled())
    for one in (profile, splitfx.explain(tiled())):
        shown = one._repr_html_()
        assert shown.startswith("<pre")
        assert shown.count("\n") == str(one).count("\n")
    sharp = splitfx.report.explain.Explanation("<script>", "torch.export", (), ())
    assert "<script>" not in sharp._repr_html_()


def test_the_package_lists_its_own_names_only() -> None:
    assert not {"Any", "TYPE_CHECKING", "importlib", "annotations"} & set(dir(splitfx))
