"""SubNetworks: which cuts are taken, what is refused, and which model is chosen at run time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import splitfx
from splitfx.compiler.pipeline import run_pass
from splitfx.errors import PlanError, UnsupportedError
from splitfx.frontend.trace import trace
from splitfx.ir.graph import info
from splitfx.ir.ops import text
from splitfx.passes import SubNetworks
from splitfx.subnetworks.model import SubNetworksGraph
from tests import oracle
from tests.subnetworks.networks import X, divided, small

# ---------------------------------------------------------------- which cuts


@pytest.mark.parametrize(("of", "budgets"), [("macs", ("0.8x", "0.4x")), ("peak", ("0.8x",))])
def test_a_budget_takes_the_cut_closest_below(of: str, budgets: tuple[str, ...]) -> None:
    graph = trace(small(), X)
    split, resolved = run_pass(graph, SubNetworks(budgets=budgets, of=of))  # type: ignore[arg-type]
    assert isinstance(split, SubNetworksGraph)
    figures = split.figures()
    word = {"macs": "macs", "peak": "peak_bytes"}[of]
    every = divided(cuts=(1, 2, 3)).figures()
    base = getattr(every[0], word)
    for budget, made in zip(budgets, figures[1:], strict=True):
        share = float(budget[:-1])
        fits = [getattr(m, word) for m in every[1:] if getattr(m, word) <= share * base]
        assert getattr(made, word) == max(fits)
    assert isinstance(resolved, SubNetworks)
    assert resolved.budgets == ()
    assert text(run_pass(graph, resolved)[0]) == text(split)


def test_a_budget_of_latency() -> None:
    split = divided(budgets=("0.95x",), of="latency")
    assert info(split).plan.passes[0].cuts[0] in ("3", "7", "10")


def test_without_cuts_or_budgets_at_most_half() -> None:
    split = splitfx.transform(small(), SubNetworks(), X)
    assert isinstance(split, SubNetworksGraph)
    base, sub = split.figures()
    assert sub.macs <= base.macs / 2


def test_names_and_numbers_mix_and_keep_their_order() -> None:
    split = divided(cuts=(3, "3"))
    assert [m.macs for m in split.figures()[1:]] == [m.macs for m in divided(cuts=(1, 3)).figures()[:0:-1]]


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"cuts": (2, 2)}, "cut 2 is given twice"),
        ({"cuts": (1,), "budgets": ("0.5x",)}, "cuts or budgets, not both"),
        ({"cuts": (0,)}, "1 or more; got 0"),
        ({"budgets": ("0.5",)}, "such as '0.4x'; got '0.5'"),
        ({"budgets": ("1.5x",)}, "such as '0.4x'; got '1.5x'"),
        ({"budgets": ("x",)}, "such as '0.4x'; got 'x'"),
        ({"budgets": ("0.5x", "0.5x")}, "budget '0.5x' is given twice"),
        ({"cuts": (1,), "of": "peak"}, "of='peak' goes with budgets"),
        ({"statistics": "own"}, 'option \'statistics\' must be one of "private", "shared"'),
    ],
)
def test_bad_options(options: dict[str, Any], why: str) -> None:
    with pytest.raises(PlanError, match=why.replace("(", r"\(")):
        SubNetworks(**options)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"cuts": (2, "7")}, "cuts 2 and '7' are the same: both lie at the output of 6"),
        ({"cuts": (4,)}, "cannot drop 4 convs: the model has 4"),
        ({"cuts": ("15",)}, "lies behind the head"),
        ({"budgets": ("0.01x",)}, "no cut meets 0.01x of the macs: the closest is '10' with 0."),
        ({"budgets": ("0.8x", "0.79x")}, "budgets 0.8x and 0.79x both pick the cut at"),
    ],
)
def test_refusals(options: dict[str, Any], why: str) -> None:
    with pytest.raises(PlanError) as error:
        divided(**options)
    assert why in str(error.value)


def test_a_budget_where_nothing_can_be_cut() -> None:
    with pytest.raises(PlanError, match="no cut meets 0.5x of the macs: the model has no convolution"):
        splitfx.transform(nn.Sequential(nn.Flatten(), nn.Linear(256, 4)).eval(), SubNetworks(budgets=("0.5x",)), X)


@pytest.mark.parametrize("number", [2, -1, 1.0, True, "sub0"])
def test_detach_of_an_unknown_index(number: Any) -> None:
    with pytest.raises(UnsupportedError, match="there is no sub-model .*; this model's are numbered 0 to 1, and base"):
        divided().detach(number)


# ---------------------------------------------------------------- at run time


def test_select_takes_the_largest_that_fits() -> None:
    split = divided()
    figures = split.figures()
    for made in figures:
        chosen = split.select(max_macs=made.macs)
        oracle.assert_equal(chosen(X), split.forward_all(X)[made.number + 1])
    oracle.assert_equal(split.select(max_peak=figures[2].peak_bytes)(X), split.forward_all(X)[2])
    oracle.assert_equal(split.select(max_peak="1 GiB", max_latency=60.0)(X), split(X))


def test_select_says_what_is_nearest() -> None:
    split = divided()
    with pytest.raises(
        UnsupportedError, match="no model fits: the least MACs are those of sub1 with .* 10 were allowed"
    ):
        split.select(max_macs=10)
    with pytest.raises(UnsupportedError, match="the least latency are those of"):
        split.select(max_latency=1e-9)
    with pytest.raises(UnsupportedError, match="needs a limit"):
        split.select()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_converted_model_is_measured_as_what_it_is_now(dtype: torch.dtype) -> None:
    split = divided()
    before = split.figures()
    split.to(dtype)
    after = split.figures()
    assert after == divided(small().to(dtype), X.to(dtype)).figures()
    assert after != before  # not those that were remembered: other types take other bytes
    assert all((m.seconds or 0) > 0 for m in split.figures(1))
    chosen = split.select(max_macs=after[2].macs, max_latency=60.0)
    assert info(chosen).inputs[0].dtype is dtype
    assert info(split).inputs[0].dtype is torch.float32  # the whole says what it was traced with
    oracle.assert_equal(splitfx.trace(split.detach(1), X.to(dtype))(X.to(dtype)), split.forward_all(X.to(dtype))[2])


def test_figures_of_a_model_without_memory() -> None:
    split = divided()
    before = split.figures()
    assert split.to("meta").figures() == before
    assert info(split.detach(0)).inputs[0].device == "meta"
