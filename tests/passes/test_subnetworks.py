"""SubNetworks: what it makes, what it shares, what it refuses, and that its oracle turns red."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import fx, nn

import splitfx
from splitfx.analysis import Facts, facts
from splitfx.errors import PlanError, UnsupportedError, VerificationError
from splitfx.graph import copy_graph, info
from splitfx.ops import text
from splitfx.passes import DropIdentity, FoldBatchNorm, Group, SubNetworks, Tile
from splitfx.pipeline import run_pass
from splitfx.plan import Plan
from splitfx.subnetworks.entry import entries
from splitfx.subnetworks.model import SubNetworksGraph
from splitfx.subnetworks.oracle import require_models
from splitfx.subnetworks.sites import Sites
from splitfx.tracing import trace
from tests import oracle
from tests.strategies import networks
from tests.subnetworks.networks import residual, small, vgg

X = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(3))


def divided(model: nn.Module | None = None, x: torch.Tensor = X, **options: Any) -> SubNetworksGraph:
    options = options or {"cuts": (1, 3)}
    split = splitfx.transform(model if model is not None else small(), SubNetworks(**options), x)
    assert isinstance(split, SubNetworksGraph)
    return split


# ---------------------------------------------------------------- what it makes


def test_the_paper_s_table() -> None:
    """MACs of Table 1 in both counts, as printed and as computed in the notes on semantics."""
    split = splitfx.transform(vgg(), SubNetworks(cuts=(2, 7)), torch.zeros(1, 3, 32, 32), verify=False)  # 15 M weights
    assert isinstance(split, SubNetworksGraph)
    figures = split.figures()
    assert [m.name for m in figures] == ["base", "sub0", "sub1"]
    assert [m.macs for m in figures] == [313_201_664, 273_880_064, 123_474_944]
    assert [m.ops for m in figures] == [314_432_522, 274_586_634, 123_624_458]
    assert [round(m.ops / 1e9, 3) for m in figures] == [0.314, 0.275, 0.124]
    assert [round(m.macs / 1e9, 4) for m in figures] == [0.3132, 0.2739, 0.1235]
    downs = [entry.step_down.get_submodule("conv") for _, entry in entries(split)]
    assert [(c.in_channels, c.out_channels, c.kernel_size, c.stride, c.padding) for c in downs] == [
        (3, 64, (2, 2), (2, 2), (0, 0)),
        (3, 256, (8, 8), (8, 8), (0, 0)),
    ]


def test_golden() -> None:
    split = divided()
    assert 'entry "sub0"' in text(split)
    assert text(split.detach(1)) == (
        "%input_1 = input\n"
        '%conv = conv2d[1->8 2x2 stride 2] "step_down.conv" (%input_1)\n'
        '%norm = batch_norm[8] "step_down.norm" (%conv)\n'
        "%relu_default = relu (%norm)\n"
        '%_10 = conv2d[8->10 3x3 pad 1] "10" (%relu_default)\n'
        '%_11 = batch_norm[10] "11" (%_10)\n'
        "%relu_3 = relu (%_11)\n"
        "%_13 = max_pool2d[[2, 2] [2, 2]] (%relu_3)\n".replace("%_13 = ", "%max_pool2d_1 = ")
        + "%flatten = flatten[1] (%max_pool2d_1)\n"
        '%_15 = linear[160->10] "15" (%flatten)\n'
        "return %_15\n"
    )


def test_forward_is_the_base_model_and_forward_all_gives_every_one() -> None:
    model = small()
    split = divided(model)
    outputs = split.forward_all(X)
    assert len(outputs) == 3
    oracle.assert_equal(split(X), model(X))
    oracle.assert_equal(outputs[0], model(X))
    for number in (0, 1):
        oracle.assert_equal(outputs[number + 1], split.detach(number)(X))
        oracle.assert_equal(split.forward_one(number, X), outputs[number + 1])
    oracle.assert_equal(split.base()(X), model(X))


def test_a_sub_model_by_hand() -> None:
    """The second sub-model written out with torch's functions, from the tensors of the whole."""
    split = divided()
    state = {k: v.double() for k, v in split.state_dict().items()}
    x, f = X.double(), torch.nn.functional

    def norm(x: torch.Tensor, path: str) -> torch.Tensor:
        w = [state[f"{path}.{k}"] for k in ("running_mean", "running_var", "weight", "bias")]
        return f.batch_norm(x, *w)

    y = f.conv2d(x, state["sub1.step_down.conv.weight"], state["sub1.step_down.conv.bias"], stride=2)
    y = norm(y, "sub1.step_down.norm").relu()
    y = norm(f.conv2d(y, state["10.weight"], state["10.bias"], padding=1), "11").relu()
    y = f.linear(f.max_pool2d(y, 2).flatten(1), state["15.weight"], state["15.bias"])
    oracle.assert_equal(copy.deepcopy(split).double().forward_all(x)[2], y)


def test_closed_forms_fit_other_sizes_too() -> None:
    model = nn.Sequential(
        *list(small().children())[:-2], nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(10, 4)
    ).eval()
    split = divided(model, cuts=(1, 2, 3))
    for size in ((16, 16), (23, 18), (37, 41)):
        x = torch.randn(3, 1, *size)
        assert [tuple(y.shape) for y in split.forward_all(x)] == [(3, 4)] * 4


# ---------------------------------------------------------------- what it shares


def shared(split: SubNetworksGraph) -> None:
    own = {id(t) for ts in (split.parameters(), split.buffers()) for t in ts}
    for made in (split.base(), *(split.detach(i) for i in range(len(split.names) - 1))):
        assert {id(p) for p in made.parameters()} <= own
        assert {id(b) for b in made.buffers()} <= own


@pytest.mark.parametrize("statistics", ["shared", "private"])
def test_parameters_are_the_same_objects_after_save_load_to_and_copies(statistics: str, tmp_path: Path) -> None:
    split = divided(cuts=(1, 3), statistics=statistics)
    splitfx.save(split, tmp_path / "split")
    wanted = split.forward_all(X)
    for again in (
        splitfx.load(tmp_path / "split"),
        splitfx.load(tmp_path / "split", small(9)),
        copy.deepcopy(split),
        trace(split, X),
    ):
        assert isinstance(again, SubNetworksGraph)
        shared(again)
        oracle.assert_equal(again.forward_all(X), wanted)
    shared(copy.deepcopy(split).to(torch.float64))


def test_what_is_detached_moves_with_the_whole() -> None:
    split = divided()
    sub = split.detach(1)
    split.to(torch.float64)
    assert {t.dtype for t in (*sub.parameters(), *sub.buffers()) if t.is_floating_point()} == {torch.float64}
    sub.to(torch.float32)
    split.to(torch.float32)
    oracle.assert_equal(split.forward_all(X)[2], sub(X))
    with torch.no_grad():
        sub.get_parameter("10.weight").add_(1)
    oracle.assert_equal(split.detach(1)(X), sub(X))
    assert sub.get_parameter("10.weight") is split.get_parameter("10.weight")


def test_training_one_moves_the_other_and_a_copy_stands_alone() -> None:
    split = divided()
    sub, alone = split.detach(0), split.detach(0, copy=True)
    before = split(X).detach()
    kept = alone(X).detach()
    optimizer = torch.optim.SGD(sub.parameters(), lr=0.1)
    sub.train()(X).square().mean().backward()
    optimizer.step()
    assert float((split(X) - before).abs().max()) > 1e-3
    oracle.assert_equal(alone(X), kept)
    assert not {id(p) for p in alone.parameters()} & {id(p) for p in split.parameters()}


def test_modes_are_each_model_s_own() -> None:
    split = divided().train()
    sub = split.detach(0)
    assert all(m.training for m in sub.modules())
    sub.eval()
    assert all(m.training for m in split.modules())


def test_statistics_of_their_own() -> None:
    split = divided(cuts=(1, 3), statistics="private").train()
    before = {k: v.clone() for k, v in split.state_dict().items() if "running_mean" in k}
    split.detach(1)(X + 1)
    moved = {k for k, v in split.state_dict().items() if k in before and not torch.equal(v, before[k])}
    assert moved == {"sub1.step_down.norm.running_mean", "sub1.norms.norm0.running_mean"}
    both = divided(cuts=(1, 3)).train()
    both.detach(1)(X + 1)
    assert not torch.equal(both.get_buffer("11.running_mean"), small().get_buffer("11.running_mean"))
    assert split.get_parameter("sub1.norms.norm0.weight") is split.get_parameter("11.weight")


def test_shared_statistics_are_one() -> None:
    split = divided()
    assert split.detach(1).get_buffer("11.running_mean") is split.get_buffer("11.running_mean")


# ---------------------------------------------------------------- which cuts


@pytest.mark.parametrize(("of", "budgets"), [("macs", ("0.8x", "0.4x")), ("peak", ("0.8x",))])
def test_a_budget_takes_the_cut_closest_below(of: str, budgets: tuple[str, ...]) -> None:
    graph = trace(small(), X)
    split, settled = run_pass(graph, SubNetworks(budgets=budgets, of=of))  # type: ignore[arg-type]
    assert isinstance(split, SubNetworksGraph)
    figures = split.figures()
    word = {"macs": "macs", "peak": "peak_bytes"}[of]
    every = divided(cuts=(1, 2, 3)).figures()
    base = getattr(every[0], word)
    for budget, made in zip(budgets, figures[1:], strict=True):
        share = float(budget[:-1])
        fits = [getattr(m, word) for m in every[1:] if getattr(m, word) <= share * base]
        assert getattr(made, word) == max(fits)
    assert isinstance(settled, SubNetworks)
    assert settled.budgets == ()
    assert text(run_pass(graph, settled)[0]) == text(split)


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
        ({"statistics": "own"}, 'option \'statistics\' must be one of "shared", "private"'),
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


# ---------------------------------------------------------------- with the other passes


def test_group_then_subnetworks() -> None:
    plan = [Group(factors=(2, 2), lowering="branches"), SubNetworks(budgets=("0.9x",))]
    split = splitfx.transform(small(), Plan(plan), X)
    assert isinstance(split, SubNetworksGraph)
    assert [s.name for s in info(split).steps] == ["group", "subnetworks"]
    shared(split)


def test_subnetworks_then_tile_on_each() -> None:
    split = divided()
    for made, wanted in zip((split.base(), split.detach(0), split.detach(1)), split.forward_all(X), strict=True):
        tiled = splitfx.transform(made, Tile(rows=2))
        assert "tiled" in text(tiled)
        oracle.assert_equal(tiled(X), wanted)


@pytest.mark.parametrize("step", [Tile(rows=4), FoldBatchNorm(), DropIdentity()], ids=lambda s: s.name)
def test_a_pass_behind_it_keeps_the_sub_models(step: Any) -> None:
    split = divided()
    after = splitfx.transform(split, step)
    assert isinstance(after, SubNetworksGraph)
    oracle.assert_equal(after.forward_all(X), split.forward_all(X))


def test_twice_adds_sub_models() -> None:
    split = splitfx.transform(divided(cuts=(1,)), SubNetworks(cuts=(3,)))
    assert isinstance(split, SubNetworksGraph)
    assert split.names == ("base", "sub0", "sub1")
    assert [m.macs for m in split.figures()] == [m.macs for m in divided().figures()]


def test_folding_behind_statistics_of_their_own_is_refused() -> None:
    after = splitfx.transform(divided(cuts=(1,), statistics="private"), FoldBatchNorm())
    assert isinstance(after, SubNetworksGraph)
    with pytest.raises(UnsupportedError, match="sub0 has statistics of its own for 4, which a later pass has replaced"):
        after.forward_all(X)


# ---------------------------------------------------------------- tokens


class Tokens(nn.Module):
    """A vision transformer in small: patch embedding, class token, position."""

    def __init__(self, width: int = 12, depth: int = 3) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, width, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.position = nn.Parameter(torch.randn(1, 17, width))
        block = lambda: nn.TransformerEncoderLayer(width, 3, 20, 0.0, batch_first=True, norm_first=True)  # noqa: E731
        self.blocks = nn.ModuleList(block() for _ in range(depth))
        self.head = nn.Linear(width, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(x[:, 0])


def test_token_models_enter_by_patch_embedding() -> None:
    torch.manual_seed(0)
    split = divided(Tokens().eval(), cuts=("blocks.1", "blocks.2"))
    shared(split)
    sub = split.detach(1)
    assert sub.get_parameter("step_down.token") is split.get_parameter("token")
    assert sub.get_parameter("step_down.position") is split.get_parameter("position")
    assert sub.get_parameter("step_down.patch.weight") is not split.get_parameter("patch.weight")
    assert [e.form for _, e in entries(split)] == ["embedding"] * 2
    # It starts with the model's own patch weights, so by hand: the model without its first two blocks.
    short = Tokens().eval()
    short.load_state_dict(split.state_dict(), strict=False)
    short.blocks = short.blocks[2:]
    short.blocks[0].load_state_dict({k[9:]: v for k, v in split.state_dict().items() if k.startswith("blocks.2")})
    oracle.assert_equal(sub(X), short(X))
    macs = [m.macs for m in split.figures()]
    assert macs[0] > macs[1] > macs[2]


# ---------------------------------------------------------------- the oracle


@settings(max_examples=12)
@given(networks())
def test_random_networks_keep_the_promise_at_every_cut(network: tuple[nn.Module, torch.Tensor]) -> None:
    """Every site of a drawn network: the pipeline's oracle runs, and what runs in place is what is detached."""
    model, x = network
    graph = trace(model, x)
    found = Sites(facts(graph))
    if not found.found:
        return
    split, _ = run_pass(graph, SubNetworks(cuts=tuple(s.enters for s in found.found), statistics="private"))
    assert isinstance(split, SubNetworksGraph)
    shared(split)
    outputs = split.forward_all(x)
    for number in range(len(found.found)):
        assert outputs[number + 1].shape == outputs[0].shape
        oracle.assert_equal(outputs[number + 1], split.detach(number)(x))


def rewritten(**options: Any) -> tuple[fx.GraphModule, SubNetworksGraph]:
    before = trace(residual(), torch.zeros(1, 3, 16, 16))
    after = copy_graph(before)
    SubNetworks(**options).run(after, Facts(after))
    assert isinstance(after, SubNetworksGraph)
    return before, after


def test_the_oracle_accepts_what_is_right() -> None:
    for statistics in ("shared", "private"):
        before, after = rewritten(cuts=("body.2", "body.3"), statistics=statistics)
        assert require_models("subnetworks", before, after) <= 1e-10


def moved_entry(after: SubNetworksGraph) -> None:
    """The second sub-model enters one layer late: behind the first conv of its block."""
    node, _ = entries(after)[1]
    late = next(n for n in after.graph.nodes if str(n.target) == "body.3.main.0")
    operand = node.all_input_nodes[0]
    node.replace_all_uses_with(operand)
    node.args = (late,)
    late.append(node)
    for user in [u for u in late.users if u is not node]:
        user.replace_input_with(late, node)


def other_base(after: SubNetworksGraph) -> None:
    after.get_parameter("fc.weight").data.mul_(1.01)


def own_weights(after: SubNetworksGraph) -> None:
    """What is detached has a copy of a layer instead of the layer."""
    made = after.detach

    def copied(number: int, copy: bool = False) -> fx.GraphModule:
        return made(number, copy=True)

    vars(after)["detach"] = copied


def step_down_of_other_rows(after: SubNetworksGraph) -> None:
    conv = entries(after)[0][1].step_down.get_submodule("conv")
    conv.stride = (conv.stride[0] + 1, conv.stride[1])  # type: ignore[operator, index, assignment]


def skipped_layer(after: SubNetworksGraph) -> None:
    """The sub-models lose an activation that the base model has: their making is at fault, not the graph."""
    made = after.detach

    def without(number: int, copy: bool = False) -> fx.GraphModule:
        found = made(number)
        relu = next(n for n in reversed(found.graph.nodes) if "relu" in str(n.target))
        relu.replace_all_uses_with(relu.all_input_nodes[0])
        found.graph.erase_node(relu)
        found.recompile()
        return found

    vars(after)["detach"] = without


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        (moved_entry, "sub1 enters at body.3.main.0, and the image reaches the output around it"),
        (other_base, "broke its promise: outputs differ"),
        (own_weights, "sub0 does not share"),
        (step_down_of_other_rows, "the step-down of sub0 gives .* the cut"),
        (skipped_layer, "sub0 differs from the model's own layers fed by its step-down"),
    ],
)
def test_sabotage_turns_the_oracle_red(fault: Any, why: str) -> None:
    before, after = rewritten(cuts=("body.2", "body.3"))
    fault(after)
    after.graph.lint()
    after.recompile()
    with pytest.raises(VerificationError, match=why):
        require_models("subnetworks", before, after)


def test_sabotaged_statistics_are_seen() -> None:
    """A sub-model that uses the base model's statistics where it has its own."""
    before, after = rewritten(cuts=("body.2",), statistics="private")
    entry = entries(after)[0][1]
    norm = entry.norms["norm0"]
    norm.get_buffer("running_mean").add_(1)
    require_models("subnetworks", before, after)  # its own, and used
    entry.private.clear()
    found = after.detach(0)
    entry.private["body.2.main.1"] = "norm0"
    vars(after)["detach"] = lambda number, copy=False: found
    with pytest.raises(VerificationError, match="sub0 differs"):
        require_models("subnetworks", before, after)


def test_the_plan_makes_the_trip() -> None:
    plan = Plan([SubNetworks(cuts=(2, "features.24"), statistics="private", seed=3)], (1, 3, 32, 32))
    assert Plan.from_toml(plan.to_toml()) == plan
    assert 'cuts = [2, "features.24"]' in plan.to_toml()
    other = Plan([SubNetworks(budgets=("0.9x", "0.4x"), of="peak")])
    assert Plan.from_toml(other.to_toml()) == other
