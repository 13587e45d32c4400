"""Regions against what operations really read: change one input row, see which output rows change."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

from splitfx.analysis import facts
from splitfx.analysis.regions import Edge, Regions
from splitfx.frontend.trace import trace
from splitfx.ir.graph import output_node


@dataclass(frozen=True)
class Region:
    """Rows ``start`` to ``stop`` (exclusive); ``before`` and ``after`` count rows of padding outside the map."""

    start: int
    stop: int
    before: int = 0
    after: int = 0

    def __len__(self) -> int:
        return max(0, self.stop - self.start)

    def hull(self, other: Region) -> Region:
        """The least interval that holds both."""
        return Region(min(self.start, other.start), max(self.stop, other.stop))


def needs(regions: Regions, node: fx.Node, axis: int, piece: Region) -> dict[fx.Node, Region]:
    """The rows of each feature-map operand that output rows ``piece`` need."""
    if regions.barrier(node):
        raise ValueError(regions.barrier(node))
    return {n: Region(*regions.edge(node, n, axis).need(piece.start, piece.stop)) for n in regions.maps(node)}


def ready(regions: Regions, node: fx.Node, axis: int, done: dict[fx.Node, int]) -> int:
    """Output rows that can be computed once each operand n has its first ``done[n]`` rows."""
    return min([regions.rows(node, axis), *(regions.edge(node, n, axis).reach(done[n]) for n in regions.maps(node))])


class Call(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def convolution(**options):
    torch.manual_seed(0)
    return nn.Conv2d(2, 2, **options)


CASES = {
    "3x3": convolution(kernel_size=3, padding=1),
    "stride 2": convolution(kernel_size=3, stride=2, padding=1),
    "stride 4 without overlap": convolution(kernel_size=2, stride=4),
    "dilated, asymmetric": convolution(kernel_size=(3, 2), padding=(2, 1), dilation=(2, 3), stride=(1, 2)),
    "same": convolution(kernel_size=4, padding="same"),
    "all padding": convolution(kernel_size=2, padding=3),
    "transposed": nn.ConvTranspose2d(2, 2, 3, stride=2, padding=1, output_padding=1),
    "transposed, dilated": nn.ConvTranspose2d(2, 2, 2, stride=3, dilation=2),
    "relu": nn.ReLU(),
    "avg pool": nn.AvgPool2d(3, 2, 1),
    "avg pool, ceil": nn.AvgPool2d(3, 2, ceil_mode=True),
    "nearest up": Call(lambda x: F.interpolate(x, scale_factor=2.0)),
    "nearest down": Call(lambda x: F.interpolate(x, size=(5, 4))),
    "nearest exact": Call(lambda x: F.interpolate(x, size=(17, 16), mode="nearest-exact")),
    "bilinear up": Call(lambda x: F.interpolate(x, scale_factor=2.0, mode="bilinear")),
    "bilinear down": Call(lambda x: F.interpolate(x, size=(5, 4), mode="bilinear")),
    "bilinear, corners": Call(lambda x: F.interpolate(x, size=(17, 16), mode="bilinear", align_corners=True)),
    "bicubic": Call(lambda x: F.interpolate(x, size=(17, 16), mode="bicubic")),
    "pixel shuffle": Call(lambda x: F.pixel_shuffle(torch.cat([x, x], 1), 2)),
    "pixel unshuffle": Call(lambda x: F.pixel_unshuffle(x[:, :, :10, :10], 2)),
    "pad": Call(lambda x: F.pad(x, (1, 2, 3, 0))),
    "crop by padding": Call(lambda x: F.pad(x, (-1, -2, -3, 0))),
    "reflect": Call(lambda x: F.pad(x, (1, 2, 3, 1), mode="reflect")),
    "replicate": Call(lambda x: F.pad(x, (1, 2, 3, 1), mode="replicate")),
    "concat": Call(lambda x: torch.cat([x, x.relu()], 1)),
    "broadcast": Call(lambda x: x * x.mean((2, 3), keepdim=True).detach()),
}
# A row that is needed for sure may still have weight 0 in the result, and the other way round nothing may be missed.
EXACT = {"3x3", "stride 2", "stride 4 without overlap", "same", "all padding", "transposed",
         "relu", "avg pool", "avg pool, ceil", "nearest up", "nearest down", "nearest exact", "pixel shuffle",
         "pad", "crop by padding", "concat"}  # fmt: skip


def last_map(model: nn.Module) -> tuple[fx.GraphModule, fx.Node]:
    graph = trace(model.double(), torch.randn(1, 2, 11, 10, dtype=torch.float64))
    return graph, output_node(graph).all_input_nodes[0]


def read_rows(model: nn.Module, axis: int) -> list[set[int]]:
    """For every output row, the input rows that change it."""
    torch.manual_seed(1)
    x = torch.randn(1, 2, 11, 10, dtype=torch.float64)
    plain = model(x)
    found: list[set[int]] = [set() for _ in range(plain.shape[2 + axis])]
    for row in range(x.shape[2 + axis]):
        changed = x.clone()
        changed.select(2 + axis, row).add_(torch.rand(()) + 1)
        other = [d for d in range(4) if d != 2 + axis]
        for out in ((model(changed) - plain).abs().amax(other) > 1e-12).nonzero().flatten().tolist():
            found[out].add(row)
    return found


def walk_back(regions: Regions, node: fx.Node, axis: int, piece: Region) -> Region:
    """Rows of the graph's input that a piece of ``node`` needs."""
    need = {node: piece}
    for n in reversed(node.graph.nodes):
        if n not in need or n.op in ("placeholder", "output", "get_attr"):
            continue
        for operand, region in needs(regions, n, axis, need[n]).items():
            need[operand] = need[operand].hull(region) if operand in need else region
    return next(r for n, r in need.items() if n.op == "placeholder")


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("name", [n for n in CASES if n not in ("broadcast", "pixel unshuffle")])
def test_needs_cover_what_is_read(name: str, axis: int) -> None:
    graph, node = last_map(CASES[name])
    regions = facts(graph).regions
    for out, rows in enumerate(read_rows(CASES[name], axis)):
        need = walk_back(regions, node, axis, Region(out, out + 1))
        assert rows <= set(range(need.start, need.stop)), f"row {out} reads {rows}, needs {need}"
        if name in EXACT and rows:
            assert (need.start, need.stop) == (min(rows), max(rows) + 1), f"row {out} reads {rows}, needs {need}"


@pytest.mark.parametrize(
    "name",
    ["3x3", "stride 2", "avg pool, ceil", "bilinear up", "reflect", "transposed", "concat", "all padding", "pad"],
)
def test_forward_is_the_inverse_of_backward(name: str) -> None:
    graph, node = last_map(CASES[name])
    regions = facts(graph).regions
    operand = next(n for n in node.all_input_nodes if n.op != "get_attr")
    for done in range(regions.rows(operand, 0) + 1):
        first = ready(regions, node, 0, dict.fromkeys(node.all_input_nodes, done))
        stops = [needs(regions, node, 0, Region(r, r + 1))[operand].stop for r in range(regions.rows(node, 0))]
        assert all(n <= done for n in stops[:first])
        assert first == len(stops) or max(stops[: first + 1]) > done


def test_padding_is_counted_only_at_borders() -> None:
    graph, node = last_map(CASES["3x3"])
    regions, operand = facts(graph).regions, node.all_input_nodes[0]
    assert needs(regions, node, 0, Region(0, 4))[operand] == Region(0, 5, 1, 0)
    assert needs(regions, node, 0, Region(4, 6))[operand] == Region(3, 7, 0, 0)
    assert needs(regions, node, 0, Region(8, 11))[operand] == Region(7, 11, 0, 1)


def test_rows_of_padding_alone_need_the_row_beside_it() -> None:
    """No piece is ever empty, and all of it is padding."""
    graph, node = last_map(CASES["all padding"])
    regions, operand = facts(graph).regions, node.all_input_nodes[0]
    edge = regions.edge(node, operand, 0)
    assert edge.need(0, 2) == (0, 1, 3, 0)
    assert edge.need(14, 16) == (10, 11, 0, 3)
    assert edge.reach(0) == 0
    assert edge.first(15) == 10


def test_where_the_rows_lie() -> None:
    """Maps with channels behind, reductions over channels alone, and weights, which are no maps."""

    def forward(x: torch.Tensor) -> torch.Tensor:
        y = x.permute(0, 2, 3, 1).softmax(-1)
        z = y.mean(3, keepdim=True).permute(0, 3, 1, 2)
        weight = torch.ones(2, 2, 1, 1, dtype=x.dtype).exp()
        return F.conv2d(x, weight) * z * x.amax((1,), keepdim=True) + x.transpose(2, 3).transpose(2, 3)

    graph, _ = last_map(Call(forward))
    regions = facts(graph).regions
    found = {n.name: regions.dims[n] for n in graph.graph.nodes if n.op == "call_function"}
    assert found["permute"] == found["softmax"] == found["mean"] == (1, 2)
    assert found["permute_1"] == found["amax"] == found["mul"] == (2, 3)
    assert found["transpose"] == (3, 2)
    assert found["exp"] is None
    assert regions.barrier(output_node(graph).all_input_nodes[0]) == ""


def test_barriers_say_why() -> None:
    pooled = trace(nn.Sequential(nn.Conv2d(2, 2, 3), nn.AdaptiveAvgPool2d(1)), torch.randn(1, 2, 11, 10))
    node = output_node(pooled).all_input_nodes[0]
    assert "reduces over the whole map" in facts(pooled).regions.barrier(node)
    with pytest.raises(ValueError, match="reduces"):
        needs(facts(pooled).regions, node, 0, Region(0, 1))


def test_sabotage_a_halo_one_short_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Edge.need

    def short(self: Edge, start: int, stop: int) -> tuple[int, int, int, int]:
        first, last, *pads = honest(self, start, stop)
        return (first, last - 1, *pads) if last - first > 1 else (first, last, *pads)  # type: ignore[return-value]

    monkeypatch.setattr(Edge, "need", short)
    with pytest.raises(AssertionError):
        test_needs_cover_what_is_read("3x3", 0)
