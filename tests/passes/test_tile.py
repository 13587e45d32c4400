"""Tile: what its options do, that a saved plan gives the same graph, and every way to ask for nonsense."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import splitfx
from splitfx.analysis import facts
from splitfx.compiler.pipeline import run_pass
from splitfx.compiler.plan import Plan
from splitfx.errors import PlanError, SplitfxError, UnsupportedError, VerificationError
from splitfx.frontend.trace import trace
from splitfx.ground.amounts import parse_bytes
from splitfx.ir.graph import info
from splitfx.ir.ops import op_name
from splitfx.passes.tile import Tile, TileStage
from splitfx.tiling.run.execution import Execution
from splitfx.tiling.run.executor import Tiled
from tests import oracle
from tests.models import ZOO, Head, Residual, conv_bn, image
from tests.traced import made_once


class Net(nn.Module):
    """Named layers, a residual, running sums over the last map: the end is no stage."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.down = conv_bn(3, 8), Residual(8, 8), Residual(8, 12, 2)
        self.last, self.fc = nn.Conv2d(12, 6, 3, padding=1), nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.last(self.down(self.block(self.stem(x))))
        return self.fc(x.flatten(2).cumsum(2)[:, :, -3:].mean(2))


@made_once
def net(size: tuple[int, int] = (48, 40)) -> tuple[fx.GraphModule, torch.Tensor]:
    x = image(1, 3, *size)
    return trace(Net().eval(), x), x


def tiles(split: fx.GraphModule) -> list[Tiled]:
    found = [split.get_submodule(str(n.target)) for n in split.graph.nodes if op_name(n) == "tiled"]
    return [m for m in found if isinstance(m, Tiled)]


def inside(split: fx.GraphModule) -> set[str]:
    return {str(n.target) for n in tiles(split)[0].stage.graph.nodes if n.op == "call_module"}


def notes(split: fx.GraphModule, kind: str) -> list[str]:
    return [f"{n.where}: {n.what}" for n in info(split).steps[-1].notes if n.kind == kind]


# ---------------------------------------------------------------- what it does


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"budget": "least"},
        {"rows": 1},
        {"rows": 4, "firing_intervals": (2, 1)},
        {"rows": 0, "grid": (2, 2)},
        {"rows": 3, "grid": (1, 2)},
        {"mode": "grid", "budget": "least"},
        {"mode": "stream", "budget": "least"},
        {"rows": 2, "until": "block.main.0"},
    ],
)
def test_equal_and_smaller(options: dict[str, Any]) -> None:
    graph, _ = net()
    split, resolved = run_pass(graph, Tile(**options))
    assert tiles(split)
    for batch in (1, 3):
        oracle.assert_equal_outputs(split, graph, image(batch, 3, 48, 40))
    step = info(split).steps[-1]
    assert step.difference is not None
    assert step.difference <= 1e-12
    less = 0 if "until" in options else 1  # there the peak is in what stays outside
    assert step.after.peak_bytes <= step.before.peak_bytes - less
    assert facts(split).cost.macs >= facts(graph).cost.macs * 0.99
    again, _ = run_pass(graph, resolved)
    assert [t.schedule for t in tiles(again)] == [t.schedule for t in tiles(split)]
    assert Plan.from_toml(Plan([resolved]).to_toml()) == Plan([resolved])


def test_the_stage_ends_where_whole_maps_are_read() -> None:
    split, _ = run_pass(net()[0], Tile(rows=4))
    assert "last" in inside(split)
    assert "fc" not in inside(split)
    assert any("cumsum" in n for n in notes(split, "declined")), notes(split, "declined")


def test_a_plan_says_what_it_predicts() -> None:
    split, _ = run_pass(net()[0], Tile(budget="least"))
    assert any("predicted peak" in n and "strips of" in n for n in notes(split, "did"))


def test_half_the_peak_by_default() -> None:
    graph, _ = net((160, 128))
    split, _ = run_pass(graph, Tile())
    assert facts(split).memory.peak_bytes <= facts(graph).memory.peak_bytes / 2


def test_a_budget_is_kept() -> None:
    graph, _ = net((160, 128))
    before = facts(graph).memory.peak_bytes
    for share in (0.3, 0.6):
        split, _ = run_pass(graph, Tile(budget=f"{int(before * share)} B"))
        assert facts(split).memory.peak_bytes <= before * share


def test_a_large_budget_leaves_the_model_alone() -> None:
    split, _ = run_pass(net()[0], Tile(budget="1 GiB"))
    assert not tiles(split)
    assert not info(split).steps[-1].changed
    assert any("left as it is" in n for n in notes(split, "info"))


def test_parameters_keep_their_names_and_are_the_users_own() -> None:
    model = Net().eval()
    split = splitfx.transform(model, Tile(rows=4), image(1, 3, 48, 40))
    own = model.state_dict()
    found = {key.replace("tiled.stage.", ""): value for key, value in split.state_dict().items()}
    assert found.keys() == own.keys()
    for key, value in found.items():
        assert torch.equal(value, own[key])


def test_until_inside_a_residual_has_two_outputs() -> None:
    """The first conv of the block and the block's input, which the sum behind the stage reads."""
    graph, x = net()
    split, _ = run_pass(graph, Tile(rows=2, until="block.main.0"))
    assert inside(split) >= {"stem.0", "block.main.0"}
    assert "block.main.3" not in inside(split)
    assert len(tiles(split)[0](x)) == 2


def test_until_a_split_takes_its_parts_along() -> None:
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.part = nn.Conv2d(3, 6, 3), nn.Module()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            a, b = self.conv(x).chunk(2, 1)
            return torch.cat([b.relu(), a], 1).flatten(1).cumsum(1)

    graph = trace(Halves().eval(), image())
    for node in graph.graph.nodes:
        if op_name(node) == "chunk":
            node.meta["layer"] = "part"
    split, _ = run_pass(graph, Tile(rows=2, until="part"))
    oracle.assert_equal_outputs(split, graph, image())


def test_what_follows_can_still_be_written_to() -> None:
    """An in-place layer behind the stage overwrites what the stage gives, not what it holds."""

    class Ends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.conv(x)
            z = y.cumsum(2)
            y.add_(1)
            return y.flip(2) + z

    graph = trace(Ends().eval(), image())
    split, _ = run_pass(graph, Tile(rows=2))
    oracle.assert_equal_outputs(split, graph, image())


def test_train_mode_is_refused_when_it_runs() -> None:
    graph, x = net()
    split, _ = run_pass(graph, Tile(rows=4))
    with pytest.raises(UnsupportedError, match="train mode"):
        split.train()(x)
    with pytest.raises(UnsupportedError, match="eval mode"):
        run_pass(trace(Net().train(), x), Tile(rows=4))


# ---------------------------------------------------------------- nonsense

BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no number": ({"budget": "small"}, "a budget is bytes with their unit"),
    "no unit": ({"budget": "64"}, "with their unit, such as '64 MiB'"),
    "nothing": ({"budget": "0 MiB"}, "more than 0 bytes"),
    "negative": ({"budget": "-2 MiB"}, "a budget is bytes with their unit"),
    "rows below zero": ({"rows": -1}, "counts"),
    "an empty grid": ({"grid": (0, 1)}, "counts"),
    "a firing interval of zero": ({"rows": 1, "firing_intervals": (0,)}, "counts"),
    "both": ({"budget": "1 MiB", "rows": 3}, "not both"),
    "mode by hand": ({"rows": 2, "mode": "stream"}, "mode tells the planner"),
    "firing intervals alone": ({"firing_intervals": (1, 2)}, "firing_intervals and recompute go with rows or grid"),
    "recompute alone": ({"budget": "least", "recompute": 0}, "firing_intervals and recompute go with rows or grid"),
    "both, grid": ({"budget": "least", "grid": (2, 2)}, "not both"),
    "more rows than any map": ({"rows": 10**15}, "no map has"),
    "more steps than any map": ({"rows": 1, "firing_intervals": (1, 10**15)}, "no map has"),
    "more tiles than are counted": ({"grid": (100_000, 100_000)}, "a grid has at most"),
    "bytes below never": ({"rows": 1, "recompute": -2}, "recompute is a number of bytes"),
    "bytes of no machine": ({"rows": 1, "recompute": 2**61}, "recompute is a number of bytes"),
    "a budget of no machine": ({"budget": "1" + "0" * 400 + " B"}, "budget"),
    "a stage of too many tiles": ({"stages": ({"grid": (10**9, 10**9)},)}, "the stage .* a grid has at most"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_options(name: str) -> None:
    options, message = BAD[name]
    with pytest.raises(PlanError, match=message) as found:
        Tile(**options)
    assert len(str(found.value)) < 300


@made_once
def chain() -> fx.GraphModule:
    model = nn.Sequential(*(nn.Conv2d(3, 3, 3, padding=1) for _ in range(4)))
    return trace(model.eval(), image(1, 3, 64, 48))


@pytest.mark.parametrize("budget", ["10 B", "40 KiB"])
@pytest.mark.parametrize("make", [chain, lambda: net()[0], lambda: squeeze()[0]])
def test_a_budget_that_cannot_be_met_names_one_that_can(make: Callable[[], fx.GraphModule], budget: str) -> None:
    graph = make()
    if budget != "10 B":  # just below the least
        least, _ = run_pass(graph, Tile(budget="least"))
        budget = f"{facts(least).memory.peak_bytes - 1} B"
    with pytest.raises(PlanError, match=r"cannot be met: the least is ([\d.]+ \w+)[,;] (reached at )?\S+") as found:
        run_pass(graph, Tile(budget=budget))
    named = str(found.value).split("the least is ")[1].split(";")[0].split(",")[0]
    split, _ = run_pass(graph, Tile(budget=named))
    assert facts(split).memory.peak_bytes <= parse_bytes(named)


@made_once
def squeeze() -> tuple[fx.GraphModule, Any]:
    model, x = ZOO["squeeze_excite"]()
    return trace(model.eval(), x), x


def test_what_cannot_be_tiled_is_named() -> None:
    with pytest.raises(PlanError, match=r"cannot be met: .*reads whole maps, so it is not tiled"):
        run_pass(net()[0], Tile(budget="100 B"))


def test_a_grid_larger_than_the_map() -> None:
    with pytest.raises(PlanError, match=r"a grid of 1 x 21 tiles is larger than the map of 24 x 20 that last gives"):
        run_pass(net()[0], Tile(grid=(1, 21)))


def test_a_grid_over_a_gate() -> None:
    graph, x = squeeze()
    with pytest.raises(PlanError, match=r"body.1 \(mean\) reads the whole map.*until"):
        run_pass(graph, Tile(grid=(2, 2)))
    with pytest.raises(SplitfxError, match="grid"):
        run_pass(graph, Tile(mode="grid", budget="least"))
    split, _ = run_pass(graph, Tile(grid=(2, 2), until="body.0.2"))
    oracle.assert_equal_outputs(split, graph, x)


def test_an_unknown_layer() -> None:
    with pytest.raises(PlanError, match=r"no layer 'block.main.1x' can be tiled. Did you mean 'block.main.1'?"):
        run_pass(net()[0], Tile(rows=1, until="block.main.1x"))


def test_a_layer_that_is_not_tiled() -> None:
    with pytest.raises(PlanError, match="no layer 'fc' can be tiled"):
        run_pass(net()[0], Tile(rows=1, until="fc"))


@pytest.mark.parametrize("model", [nn.Linear(4, 3), nn.LSTM(4, 3)])
def test_models_without_maps(model: nn.Module) -> None:
    try:
        graph = trace(model.eval(), image(2, 5, 4))
    except SplitfxError:
        return
    split, _ = run_pass(graph, Tile(rows=1))
    assert not tiles(split)
    assert any("nothing to tile" in n for n in notes(split, "declined"))


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (3, 1), (5, 4)])
def test_inputs_smaller_than_the_receptive_field(size: tuple[int, int]) -> None:
    graph, _ = net()
    split, _ = run_pass(graph, Tile(rows=3, firing_intervals=(1, 2)))
    oracle.assert_equal_outputs(split, graph, image(2, 3, *size))
    small, _ = net(size)
    for step in (Tile(rows=1), Tile(), Tile(budget="least")):
        oracle.assert_equal_outputs(run_pass(small, step)[0], small, image(1, 3, *size))


def test_inputs_that_do_not_fit() -> None:
    split, _ = run_pass(trace(nn.Sequential(nn.Conv2d(3, 4, 5)).eval(), image(1, 3, 16, 16)), Tile(rows=2))
    with pytest.raises(UnsupportedError, match="do not fit"):
        split(image(1, 3, 4, 4))


def test_a_plan_for_another_number_of_stages() -> None:
    with pytest.raises(PlanError, match="stages"):
        run_pass(
            net()[0],
            Tile(stages=(TileStage(2, firing_intervals=(1,)), TileStage(2, firing_intervals=(1,)), TileStage(2))),
        )


def test_a_plan_whose_grid_does_not_fit_its_stage() -> None:
    with pytest.raises(PlanError, match="a grid of 500 x 2 tiles is larger than the map of 24 x 20 that last gives"):
        run_pass(net()[0], Tile(stages=(TileStage(2, (500, 2)),)))


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"rows": -1}, "the stage .* counts"),
        ({"rows": 2, "grid": (0, 1)}, "the stage .* counts"),
        ({"rows": 2, "firing_intervals": (0,)}, "the stage .* counts"),
        ({"rows": 2, "recompute": -2}, "the stage .* recompute is a number of bytes"),
        ({"rows": 2, "as_it_is": True}, "a stage that stays as_it_is has no rows"),
        ({"row": 2}, r"'stages\[1\]' has no key 'row'. Did you mean 'rows'\?"),
        ({"rows": "2"}, r"'stages\[1\].rows' must be an integer; got '2'"),
        (
            (2, 1, 1, -1),
            "'stages' must be a list of .a table of rows, grid, recompute, firing_intervals, as_it_is, keep.; got",
        ),
    ],
)
def test_a_plan_with_an_odd_stage(stage: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Tile(stages=(TileStage(rows=1), stage))


def test_a_stage_is_checked_by_itself() -> None:
    with pytest.raises(PlanError, match="rows of a stage must be an integer"):
        TileStage(rows="2")  # type: ignore[arg-type]
    assert TileStage(grid=[2, 1]).grid == (2, 1)  # type: ignore[arg-type]


def test_stages_are_tables_of_a_plan() -> None:
    """What a person reads in a plan that the planner has resolved, one stage tiled and one not."""
    plan = Plan(
        [Tile("least", stages=(TileStage(4, firing_intervals=(1, 2)), TileStage(as_it_is=True)))], (1, 3, 48, 40)
    )
    text = plan.to_toml()
    assert text.partition("[[pass]]")[2] == (
        '\nname = "tile"\nbudget = "least"\n'
        "[[pass.stages]]\nrows = 4\nfiring_intervals = [1, 2]\n"
        "[[pass.stages]]\nas_it_is = true\n"
    )
    assert Plan.from_toml(text) == plan
    head = text.partition("[[pass.stages]]")[0]
    assert Plan.from_toml(f"{head}stages = [{{rows = 4, firing_intervals = [1, 2]}}, {{as_it_is = true}}]\n") == plan


# ---------------------------------------------------------------- the oracle notices


def test_sabotage_is_noticed_by_the_pipeline(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of the halo lost in every piece: no wrong graph leaves the pipeline."""
    honest = Execution.compute

    def careless(self: Execution, one: Any) -> None:
        honest(self, one)
        if one.rows[0] > 0 and one.kernel.rule is not None:
            self.registers[one.dst] = F.pad(self.registers[one.dst][:, :, 1:], (0, 0, 1, 0))

    monkeypatch.setattr(Execution, "compute", careless)
    with pytest.raises(VerificationError):
        run_pass(net()[0], Tile(rows=4))


def test_classifier_head_is_part_of_the_stage() -> None:
    """A global pool consumes rows: the last map is never there, and the classifier runs on what it gives."""
    torch.manual_seed(0)
    graph = trace(Head(nn.Sequential(conv_bn(3, 8), Residual(8, 12, 2)), 12).eval(), image(1, 3, 64, 64))
    split, _ = run_pass(graph, Tile(rows=1))
    assert {op_name(n) for n in split.graph.nodes if n.op.startswith("call")} <= {"tiled", "getitem"}
    assert "fc" in inside(split)
