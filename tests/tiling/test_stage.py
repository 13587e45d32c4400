"""Whole stages: several inputs and outputs, users of many kinds, phases, what is left outside and why."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import splitfx
from splitfx.analysis import facts
from splitfx.analysis.regions import Regions
from splitfx.analysis.shapes import shapes
from splitfx.frontend.trace import trace
from splitfx.ir.graph import TensorSpec
from splitfx.passes import Tile
from splitfx.tiling.plan.instructions import Schedule
from splitfx.tiling.stage.compiling import compile_stage
from splitfx.tiling.stage.extract import stages
from splitfx.tiling.stage.kernel import Keeping
from splitfx.tiling.stage.roles import Kind, Roles
from tests import oracle
from tests.models import ZOO, image
from tests.tiling.cases import PHASES, SPLIT, Call, call
from tests.tiling.trial import GRIDS, STREAMS, Trial, assert_equal, peaks, tile, traced
from tests.traced import odd

GROUP_BY = "name"  # one worker does all that is asked of a model, so that it is traced once
SOME = [STREAMS[0], STREAMS[2], STREAMS[5]]


def check(model: nn.Module, inputs: Any, grids: bool = True, grad: bool = True) -> Trial:
    """The model tiled in many ways, in float64; the last trial."""
    graph, inputs = traced(model, inputs)
    for schedule in [*SOME, *(GRIDS[::2] if grids else [])]:
        trial = tile(graph, schedule)
        assert_equal(trial.split, graph, inputs)
        if grad:
            assert_equal(trial.split, graph, inputs, grad=True)
    return trial


def conv3(i: int, o: int, **options: Any) -> nn.Module:
    return nn.Conv2d(i, o, 3, padding=1, **options)


# ---------------------------------------------------------------- the odd tiny models

BARRED = {"tied_weights": "no map", "attention": "no map", "in_place_views": "order"}


@pytest.mark.parametrize("name", sorted(set(ZOO) - set(BARRED)))
def test_odd_models(name: str) -> None:
    _, inputs, graph = odd(name, double=True)
    for schedule in SOME:
        assert_equal(tile(graph, schedule).split, graph, inputs)


@pytest.mark.parametrize("name", sorted(BARRED))
def test_nothing_to_tile(name: str) -> None:
    _, _, graph = odd(name, double=True)
    assert stages(graph, facts(graph).regions)[0] == []


WITHOUT_BATCH = {
    "convolution": lambda: nn.Sequential(nn.ReLU(), nn.Conv2d(4, 3, 1), nn.ReLU()),
    "transposed": lambda: nn.Sequential(nn.ReLU(), nn.ConvTranspose2d(4, 3, 2, 2)),
    "max pool": lambda: nn.Sequential(nn.ReLU(), nn.MaxPool2d(3, 1, 1), nn.ReLU()),
    "avg pool": lambda: nn.Sequential(nn.AvgPool2d(2), nn.ReLU()),
    "shuffle": lambda: nn.Sequential(nn.ReLU(), nn.PixelShuffle(2)),
    "unshuffle": lambda: nn.Sequential(nn.ReLU(), nn.PixelUnshuffle(2)),
    "pooled": lambda: nn.Sequential(nn.InstanceNorm2d(4), nn.Conv2d(4, 4, 3), nn.AdaptiveAvgPool2d(1)),
}


@pytest.mark.parametrize("name", WITHOUT_BATCH)
def test_an_image_without_a_batch_is_no_sequence(name: str) -> None:
    """[C, H, W] is as long as [N, C, L], and is none: what reads H and W of it is never called on its columns."""
    torch.manual_seed(0)
    graph, x = traced(WITHOUT_BATCH[name](), torch.randn(4, 20, 18))
    for step in (Tile(rows=2), Tile(budget="least")):
        split = splitfx.transform(graph, step, verify=False)
        assert_equal(split, graph, x)
        said = " ".join(str(splitfx.explain(split)).split())
        assert "without a batch" in said or "shuffle" in name


def test_a_write_through_a_view_says_why_nothing_is_tiled() -> None:
    _, _, graph = odd("in_place_views", double=True)
    reasons = set(Roles(graph, facts(graph).regions).why.values())
    assert any("overwrites a value through a view" in why for why in reasons)


# ---------------------------------------------------------------- inputs and outputs


class Ends(nn.Module):
    """Two images and a vector in; a dict of maps and vectors out, one of which is read again inside."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv3(3, 4), conv3(2, 4, stride=2), nn.Linear(5, 4)

    def forward(self, x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> dict[str, Any]:
        left = self.a(x).relu()
        right = self.b(y) + self.c(z)[:, :, None, None]
        both = left + right
        return {"left": left, "maps": [both, F.max_pool2d(both, 3, 2)], "mean": both.mean((2, 3)), "z": z}


def test_several_inputs_and_outputs() -> None:
    trial = check(Ends(), (image(2, 3, 13, 10), image(2, 2, 25, 20), image(2, 5)), grids=False)
    assert trial.tiled.stage.graph.find_nodes(op="placeholder")


def test_outputs_of_a_grid_that_are_read_inside() -> None:
    """Tiles of such an output overlap: each holds what the other output needs of it."""

    def forward(x: torch.Tensor, a: nn.Module, b: nn.Module) -> tuple[torch.Tensor, ...]:
        y = a(x).relu()
        z = b(y)
        return y, z, z + y

    check(Call(forward, conv3(3, 4), conv3(4, 4)), image(2, 3, 13, 11))


def test_an_output_that_is_the_input_itself() -> None:
    def forward(x: torch.Tensor, drop: nn.Module, a: nn.Module) -> tuple[torch.Tensor, ...]:
        x = drop(x)
        return x, a(x)

    check(Call(forward, nn.Dropout(0.5), conv3(3, 4)), image(2, 3, 13, 11))


def test_an_output_twice() -> None:
    def forward(x: torch.Tensor, a: nn.Module, drop: nn.Module) -> tuple[torch.Tensor, ...]:
        y = a(x)
        return y, drop(y), y

    check(Call(forward, conv3(3, 4), nn.Dropout()), image(2, 3, 13, 11))


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_other_sizes_than_the_traced(batch: int) -> None:
    """A stage serves every size that its layers accept; instructions are made for each."""
    model = nn.Sequential(conv3(3, 4, stride=2), nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True), conv3(4, 5))
    graph, _ = traced(model, image(2, 3, 31, 27))
    trial = tile(graph, STREAMS[1])
    for size in ((31, 27), (8, 40), (5, 3), (63, 64)):
        x = image(batch, 3, *size).double()
        with torch.no_grad():
            oracle.assert_equal(trial.tiled(x)[0], model(x))


def test_channels_last_inputs() -> None:
    graph, _ = traced(nn.Sequential(conv3(3, 4), nn.MaxPool2d(2), conv3(4, 6)), image(2, 3, 16, 14))
    x = image(2, 3, 16, 14).double().contiguous(memory_format=torch.channels_last)
    for schedule in (*SOME, *GRIDS):
        with torch.no_grad():
            oracle.assert_equal(tile(graph, schedule).split(x), graph(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_number_types(dtype: torch.dtype) -> None:
    model = nn.Sequential(conv3(3, 6), nn.GroupNorm(2, 6), nn.SiLU(), nn.AvgPool2d(3, 2, 1), nn.Conv2d(6, 5, 1))
    graph = trace(model.eval(), image(2, 3, 17, 15))
    split = tile(graph, STREAMS[1]).split.to(dtype)
    x = image(2, 3, 17, 15).to(dtype)
    with torch.no_grad():
        oracle.assert_equal(split(x), graph.to(dtype)(x))


# ---------------------------------------------------------------- networks


class UNet(nn.Module):
    def __init__(self, up: str = "transposed") -> None:
        super().__init__()
        self.down = nn.ModuleList([conv3(3, 4), conv3(4, 6), conv3(6, 8)])
        make = (
            (lambda i, o: nn.ConvTranspose2d(i, o, 2, 2)) if up == "transposed" else (lambda i, o: nn.Conv2d(i, o, 1))
        )
        self.up = nn.ModuleList([make(8, 6), make(6, 4)])
        self.out = nn.ModuleList([conv3(12, 6), conv3(8, 4)])
        self.kind = up

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.down[0](x).relu()
        second = self.down[1](F.max_pool2d(first, 2)).relu()
        y = self.down[2](F.max_pool2d(second, 2)).relu()
        for up, out, skip in zip(self.up, self.out, (second, first), strict=True):
            y = up(y)
            if y.shape[2:] != skip.shape[2:]:
                y = F.interpolate(y, size=skip.shape[2:], mode="bilinear", align_corners=self.kind == "corners")
            y = out(torch.cat([skip, y], 1)).relu_()
        return y


@pytest.mark.parametrize("up", ["transposed", "bilinear", "corners"])
def test_u_net(up: str) -> None:
    trial = check(UNet(up), image(2, 3, 27, 22))
    assert trial.outside == []
    assert trial.phases == 1


def test_sizes_that_follow_from_the_input() -> None:
    model = call(lambda x, m: F.interpolate(m(x), size=(x.shape[2] + 3, x.shape[3] * 2)), lambda: conv3(3, 4))()
    assert check(model, image(2, 3, 12, 9)).outside == []


class Computed(nn.Module):
    """A weight, a scale and a shift that follow from parameters: made once, outside."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 6, 3, padding=1, bias=False), conv3(6, 4)
        self.scale, self.shift = nn.Parameter(torch.rand(6)), nn.Parameter(torch.rand(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        w = self.conv.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / w.std((1, 2, 3), keepdim=True)
        y = F.conv2d(x, w, padding=1) * self.scale.exp().reshape(1, -1, 1, 1)
        y = (y.permute(0, 2, 3, 1) + self.shift.square().view(1, 1, 1, 6)).permute(0, 3, 1, 2)
        return self.last(y.relu())


def test_computed_weights() -> None:
    trial = check(Computed(), image(2, 3, 15, 12))
    assert trial.inside.count("conv2d") == 2
    assert "std" in trial.outside or "var" in trial.outside
    assert not {"mul", "conv2d", "permute"} & set(trial.outside)


def test_weights_that_follow_from_the_image_are_a_barrier() -> None:
    def forward(x: torch.Tensor, a: nn.Module, b: nn.Module) -> torch.Tensor:
        y = a(x)
        weight = b(y.mean((0, 2, 3))).view(4, 4, 1, 1)
        return F.conv2d(y, weight)

    check(Call(forward, conv3(3, 4), nn.Linear(4, 16)), image(2, 3, 15, 12), grids=False)


def test_gradients_are_switched_where_they_were() -> None:
    """A backbone under no_grad is tiled; what comes behind keeps its gradients, and the backbone gets none."""
    model, inputs = ZOO["no_grad_backbone"]()
    graph, inputs = traced(model, inputs)
    split = tile(graph, STREAMS[1]).split
    split(oracle.leaves(inputs)[0]).sum().backward()
    with_gradient = {path for path, p in split.named_parameters() if p.grad is not None}
    assert with_gradient == {"head.weight", "head.bias"}


@pytest.mark.parametrize("train", [True, False])
def test_dropout_that_is_always_on_is_no_alias(train: bool) -> None:
    model = call(lambda x, m: F.dropout(m(x), 0.5, training=train), lambda: conv3(3, 4))()
    graph, inputs = traced(model, image())
    assert ("dropout" in tile(graph, STREAMS[1]).outside) == train
    assert_equal(tile(graph, STREAMS[1]).split, graph, inputs)


class Halving(nn.Module):
    """A leaf that does something in eval mode too."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.training else x[:, :, ::2]


def test_a_leaf_that_is_not_the_identity() -> None:
    check(nn.Sequential(conv3(3, 4), Halving(), nn.ReLU()), image(), grids=False)


class ChannelGate(nn.Module):
    """As in ECA: a convolution along the channels of the mean."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.gate, self.last = nn.Conv2d(3, 8, 3), nn.Conv1d(1, 1, 3, padding=1), nn.Conv2d(8, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        y = self.gate(x.mean((2, 3)).view(x.shape[0], 1, -1))
        return self.last(x * y.view(x.shape[0], -1, 1, 1).sigmoid().expand_as(x))


@pytest.mark.parametrize("works", [True, False])
def test_the_channels_of_a_gate_are_no_sequence(monkeypatch: pytest.MonkeyPatch, works: bool) -> None:
    if not works:  # every sequence is a map: the product has no rows then, as it had before
        monkeypatch.setattr(Regions, "gate", lambda self, node: False)
    graph, inputs = traced(ChannelGate(), torch.randn(2, 3, 19, 17))
    trial = tile(graph, Schedule(2))
    assert_equal(trial.split, graph, inputs)
    kernels = trial.tiled.program(tuple(oracle.leaves(inputs))).stage.kernels
    by_rows = {k.name for k in kernels if k.kind is Kind.ROWS}
    assert ("mul" in by_rows) is works
    assert "expand_as" in by_rows  # else the gate is spread over the whole map at once


class UnreadColumns(nn.Module):
    """Tokens, and behind them a stride that leaves columns out: rows and columns in one axis come all together."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Conv2d(3, 6, 3, padding=1), nn.LayerNorm(6), nn.Conv2d(6, 5, 4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        tokens = self.norm(y.flatten(2).transpose(1, 2))
        return self.last(tokens.transpose(1, 2).reshape(y.shape))


def test_columns_of_tokens_that_nobody_reads() -> None:
    check(UnreadColumns(), torch.randn(2, 3, 19, 23), grids=False)


class Heads(nn.Module):
    """A sequence [N, heads, places, channels], of which channels are padded and places are."""

    def __init__(self, pads: tuple[int, ...]) -> None:
        super().__init__()
        self.first, self.last, self.pads = nn.Conv1d(3, 8, 3, padding=1), nn.Conv1d(8, 4, 3, padding=1), pads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        heads = F.pad(y.reshape(y.shape[0], 2, 4, -1).transpose(2, 3), self.pads)
        front, back = (*self.pads[2:], 0, 0)[:2]
        heads = heads[:, :, front : heads.shape[2] - back, self.pads[0] : heads.shape[3] - self.pads[1]]
        return self.last(heads.transpose(2, 3).reshape(y.shape).relu())


@pytest.mark.parametrize("pads", [(1, 2), (0, 0, 2, 3), (1, 0, 0, 2)])
def test_heads_of_a_sequence_are_padded(pads: tuple[int, ...]) -> None:
    graph, inputs = traced(Heads(pads), torch.randn(2, 3, 23))
    for schedule in STREAMS:
        assert_equal(tile(graph, schedule).split, graph, inputs)


class Classes(nn.Module):
    """Segmentation to classes: what is largest among the channels, a row at a time."""

    def __init__(self, dim: int, least: bool, keep: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU(), nn.Conv2d(6, 5, 3, padding=1))
        self.dim, self.pick, self.keep = dim, torch.argmin if least else torch.argmax, keep

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = F.interpolate(self.body(x), size=x.shape[2:], mode="bilinear")
        return self.pick(logits, self.dim, keepdim=self.keep)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("least", [True, False])
@pytest.mark.parametrize("dim", [1, -3, -1, 2])
def test_places_of_extremes_among_channels(dim: int, least: bool, keep: bool) -> None:
    model = Classes(dim, least, keep)
    graph, inputs = traced(model, torch.randn(2, 3, 23, 18))
    for schedule in STREAMS:
        trial = tile(graph, schedule)
        assert_equal(trial.split, graph, inputs)
        kernels = trial.tiled.program(tuple(oracle.leaves(inputs))).stage.kernels
        assert any(k.name.startswith("arg") and k.kind is Kind.ROWS for k in kernels) is (dim in (1, -3, -1))


# ---------------------------------------------------------------- roles and phases

REASONS = {
    "instance norm with running statistics": "running statistics",
    "reflect channels": "padding of channels with their own values",
    "group norm channels last": "channels in front",
}


@pytest.mark.parametrize("name", REASONS)
def test_reasons(name: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), SPLIT[name]())
    graph = trace(model.eval(), image(2, 3, 19, 17))
    assert any(REASONS[name] in why for why in Roles(graph, facts(graph).regions).why.values())


def compiled(model: nn.Module, x: torch.Tensor, recompute: float = float("inf")) -> Any:
    graph = trace(model.eval(), x)
    trial = tile(graph, Schedule())
    return compile_stage(trial.tiled.stage, shapes(trial.tiled.stage, (TensorSpec.of(x),)), Keeping(recompute))


@pytest.mark.parametrize(
    ("name", "phases"),
    [("mean", 1), ("gate", 2), ("two gates", 3), ("group norm", 2), ("aspp", 2), ("spread", 2), ("mean of a gate", 2)],
)
def test_phases(name: str, phases: int) -> None:
    stage = compiled(nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), PHASES[name]()), image(2, 3, 19, 17))
    assert stage.phases == phases
    for kernel in stage.kernels:
        assert all(k.phase <= kernel.phase for k, _, _ in kernel.reads)
        if kernel.kind is Kind.ROWS:
            assert all(k.phase < kernel.phase for k in kernel.takes if k.kind is not Kind.SOURCE)


def test_a_map_behind_its_own_reduction_is_computed_twice() -> None:
    """With ``recompute`` the second phase starts from the image again, and nothing large waits."""
    x = image(2, 3, 64, 48)
    model = nn.Sequential(conv3(3, 6), PHASES["gate"](), nn.Conv2d(6, 2, 1, stride=4))
    once, twice = compiled(model, x), compiled(model, x, 0.0)
    assert sum(k.again for k in once.kernels) == 0
    assert sum(k.again for k in twice.kernels) > 0
    graph = trace(model, x)
    kept, again = (
        peaks(tile(graph, Schedule(4, keeping=Keeping(recompute=r))).tiled, (x,)) for r in (float("inf"), 0.0)
    )
    assert again[1] < kept[1] / 2


def test_stage_is_deterministic() -> None:
    names = [[k.name for k in compiled(UNet(), image(2, 3, 27, 22)).kernels] for _ in range(2)]
    assert names[0] == names[1]


def test_padding_larger_than_the_map() -> None:
    check(nn.Sequential(nn.Conv2d(3, 4, 3, padding=9), nn.MaxPool2d(2)), image(2, 3, 2, 3))


@pytest.mark.parametrize("last", [nn.Conv2d(3, 4, 1, 2, 1), nn.Conv2d(3, 4, 2, 1, 3), nn.Conv2d(3, 4, 3, 2, 4, 2)])
def test_windows_that_lie_in_the_padding_alone(last: nn.Module) -> None:
    check(last, image(2, 3, 4, 3))


# ---------------------------------------------------------------- where gradients are switched


class Switched(nn.Module):
    """Gradients off for layers in the middle, which are more than the ones before and behind, or fewer."""

    def __init__(self, before: int, inside: int, behind: int) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.ModuleList(conv3(3, 3) for _ in range(n)) for n in (before, inside, behind))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        before, inside, behind = self.parts
        for layer in before:  # type: ignore[attr-defined]
            x = layer(x).relu()
        with torch.no_grad():
            for layer in inside:  # type: ignore[attr-defined]
                x = layer(x).relu()
        for layer in behind:  # type: ignore[attr-defined]
            x = layer(x).relu()
        return x


@pytest.mark.parametrize("counts", [(1, 3, 1), (3, 1, 1), (2, 1, 3), (0, 2, 1), (1, 2, 0), (2, 2, 2)])
def test_no_stage_crosses_a_switch_of_gradients(counts: tuple[int, int, int]) -> None:
    """Every layer of a stage runs with gradients as in the model: the same layers get the same gradients."""
    torch.manual_seed(0)
    model = Switched(*counts)
    graph, inputs = traced(model, image(2, 3, 12, 10))
    trial = tile(graph, SOME[0])
    part = {path.split(".")[1] for path, _ in trial.tiled.stage.named_parameters()}
    assert len(part) == 1, f"a stage holds layers of parts {part}"
    assert_equal(trial.split, graph, inputs, grad=True)
    (x,) = oracle.leaves(inputs)
    found = []
    for one in (model, trial.split):
        one.zero_grad()
        y = one(x.clone().requires_grad_())
        if y.requires_grad:
            y.square().sum().backward()
        found.append({p.replace("tiled.stage.", ""): w.grad for p, w in one.named_parameters() if w.grad is not None})
    oracle.assert_equal(found[1], found[0])


def test_a_stage_shares_no_memory_with_what_it_reads() -> None:
    """What it returns is overwritten behind it while its input is still read."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(5, 3, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.second(self.first(x).relu_())

    torch.manual_seed(0)
    model, x = Net().double().eval(), torch.randn(2, 3, 9, 7, dtype=torch.float64)
    split = splitfx.transform(model, Tile(until="first", grid=(3, 2)), x)
    assert oracle.difference(split(x), model(x)) == ""
