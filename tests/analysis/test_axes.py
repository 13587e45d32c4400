"""Channel axes: permuting the channels of an axis, as its labels say, leaves the output unchanged."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import fx, nn

from splitfx.analysis import facts
from splitfx.analysis.axes import Axes
from splitfx.frontend.trace import trace
from splitfx.ir.graph import copy_graph, module_of
from tests import oracle
from tests.models import conv_bn
from tests.strategies import networks
from tests.traced import odd

# ---------------------------------------------------------------- the permutation


class Permutation:
    """Permutes all channels that the graph neither reads from outside nor returns, weight by weight.

    Two channels may change places when the same weights read and write both (in the same group).
    """

    def __init__(self, graph: fx.GraphModule, seed: int = 0) -> None:
        self.graph, self.axes = graph, facts(graph).axes
        self.edges = {e.node: e for e in self.axes.edges}
        self.new: dict[int, int] = {}
        self.seen: dict[int, list[tuple]] = defaultdict(list)
        self.done: set[str] = set()
        self.weighted = [n for n in graph.graph.nodes if n.op == "call_module" and module_of(n) is not None]
        for node in self.weighted:
            self.sign(node)
        self.choose(np.random.default_rng(seed))

    def channels(self, names: np.ndarray) -> np.ndarray:
        return self.axes.channel[names]

    def sign(self, node: fx.Node) -> None:
        """Note which weights see a channel, and in which group."""
        edge, module = self.edges.get(node), module_of(node)
        if edge is not None:
            for side, names in (("ins", edge.ins), ("outs", edge.outs)):
                for group, part in enumerate(np.split(self.channels(names), edge.groups)):
                    self.mark(part, (node.name, side, group))
            return
        names = self.axes.of(node)
        if names is not None:
            count = module.num_groups if isinstance(module, nn.GroupNorm) else 1
            for group, part in enumerate(np.split(self.channels(names), count)):
                self.mark(part, (node.name, group))

    def mark(self, channels: np.ndarray, what: tuple) -> None:
        for channel in np.unique(channels):
            self.seen[int(channel)].append(what)

    def choose(self, rng: np.random.Generator) -> None:
        kept = set(self.axes.frozen) | self.axes.outputs
        fixed = {int(c) for c in np.unique(self.axes.channel[np.isin(self.axes.axis, list(kept))])}
        alike: dict[tuple, list[int]] = defaultdict(list)
        for channel, places in self.seen.items():
            if channel not in fixed:
                alike[tuple(places)].append(channel)
        for channels in alike.values():
            self.new |= dict(zip(channels, np.roll(rng.permutation(channels), 1).tolist(), strict=True))
        self.moved = sum(a != b for a, b in self.new.items())

    def source(self, names: np.ndarray) -> torch.Tensor:
        """For each position, the position whose weights it gets."""
        where: dict[tuple[int, int], int] = {}
        keys: list[tuple[int, int]] = []
        times: dict[int, int] = defaultdict(int)
        for position, channel in enumerate(self.channels(names).tolist()):
            keys.append((channel, times[channel]))
            where[keys[-1]] = position
            times[channel] += 1
        return torch.tensor([where[(self.new.get(c, c), i)] for c, i in keys])

    def apply(self) -> None:
        for node in self.weighted:
            if str(node.target) not in self.done:
                self.done.add(str(node.target))
                self.permute(node)

    @torch.no_grad()
    def permute(self, node: fx.Node) -> None:
        edge, module = self.edges.get(node), module_of(node)
        assert module is not None
        if edge is None:
            names = self.axes.of(node)
            per_channel = [*module.parameters(), *(b for b in module.buffers() if b.dim())]
            if names is not None and all(len(t) == len(names) for t in per_channel):
                for tensor in per_channel:
                    tensor.copy_(tensor[self.source(names)])
            return
        weight: torch.Tensor = module.weight  # type: ignore[assignment]
        if getattr(module, "transposed", False):
            assert edge.groups == 1, "not needed by these tests"
            weight = weight.transpose(0, 1)
        per = len(edge.ins) // edge.groups
        rows = len(edge.outs) // edge.groups
        ins = self.source(edge.ins)
        for g in range(edge.groups):
            local = ins[g * per : (g + 1) * per] - g * per
            block = weight[g * rows : (g + 1) * rows]
            block.copy_(block[:, local])
        outs = self.source(edge.outs)
        weight.copy_(weight[outs])
        if isinstance(module.bias, torch.Tensor):
            module.bias.copy_(module.bias[outs])


def share_moved(graph: fx.GraphModule, x: torch.Tensor) -> float:
    """Permute a copy, compare the outputs, and say which share of the inner channels took part."""
    other = copy_graph(graph)
    permutation = Permutation(other)
    permutation.apply()
    oracle.assert_equal_outputs(other, graph, x)
    return permutation.moved / max(1, len(permutation.new))


def real(name: str, size: int = 64) -> tuple[fx.GraphModule, torch.Tensor]:
    import torchvision

    torch.manual_seed(0)
    model = torchvision.models.get_model(name, **options(name)).double().eval()
    for key, buffer in model.named_buffers():
        if key.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    return trace(model, x), x


def options(name: str) -> dict[str, bool]:
    return {"init_weights": False, "aux_logits": False} if name == "googlenet" else {}


@pytest.mark.parametrize("name", ["resnet18", "shufflenet_v2_x0_5"])
def test_permuted_models(name: str) -> None:
    assert share_moved(*real(name, 32)) > 0.9


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "resnet50",
        "mobilenet_v2",
        "densenet121",
        "googlenet",
        "efficientnet_b0",
        "regnet_y_400mf",
        "resnext50_32x4d",
    ],
)
def test_permuted_large_models(name: str) -> None:
    assert share_moved(*real(name)) > 0.5


@pytest.mark.parametrize("name", ["residual", "concats", "squeeze_excite", "depthwise", "grouped", "plain"])
def test_permuted_odd_models(name: str) -> None:
    _, x, graph = odd(name, double=True)
    assert share_moved(graph, x) > 0.5


@settings(max_examples=12)
@given(networks())
def test_permuted_random_networks(network: tuple[nn.Module, torch.Tensor]) -> None:
    model, x = network
    share_moved(trace(model, x), x)


def test_a_wrong_label_is_seen() -> None:
    """Sabotage: one conv's labels are off by one channel."""
    _, x, graph = odd("residual", double=True)
    permutation = Permutation(graph)
    node = next(n for n in permutation.edges if str(n.target) == "body.2.main.0")
    wanted = copy_graph(graph)
    permutation.edges[node].ins[:] = np.roll(permutation.edges[node].ins, 1)
    permutation.apply()
    with pytest.raises(AssertionError, match="off by"):
        oracle.assert_equal_outputs(graph, wanted, x)


# ---------------------------------------------------------------- counts of published networks


@pytest.mark.parametrize(("name", "convs", "axes", "writers"), [("resnet18", 20, 12, 12), ("resnet50", 53, 37, 20)])
def test_residual_networks(name: str, convs: int, axes: int, writers: int) -> None:
    graph, _ = real(name, 32)
    written = facts(graph).axes.writers()
    found = {a: es for a, es in written.items() if str(es[0].node.target) != "fc"}
    shared = [es for es in found.values() if len(es) > 1]
    assert sum(map(len, found.values())) == convs
    assert len(found) == axes
    assert len(shared) == 4
    assert sum(map(len, shared)) == writers


# ---------------------------------------------------------------- rules, one by one


class Model(nn.Module):
    def __init__(self, forward: Callable[..., torch.Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.function = forward
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self, x)


def axes_of(model: nn.Module, *shape: int) -> tuple[Axes, dict[str, np.ndarray]]:
    """The axes, and of each layer's output the channels."""
    graph = trace(model.eval(), torch.randn(*(shape or (2, 3, 8, 8))))
    axes = facts(graph).axes
    found = {n.name: axes.channel[names] for n in graph.graph.nodes if (names := axes.of(n)) is not None}
    return axes, found | {str(e.node.target): axes.channel[e.outs] for e in axes.edges}


def test_a_sum_ties_channels() -> None:
    _, at = axes_of(Model(lambda m, x: m.a(x) + m.b(x), a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(3, 4, 1)))
    assert at["a"].tolist() == at["b"].tolist()


def test_a_conv_ties_nothing() -> None:
    _, at = axes_of(Model(lambda m, x: m.b(m.a(x)), a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(4, 4, 1)))
    assert not set(at["a"]) & set(at["b"])


def test_concat_lays_side_by_side() -> None:
    model = Model(lambda m, x: torch.cat([m.a(x), m.b(x)], 1), a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(3, 2, 1))
    _, at = axes_of(model)
    assert at["cat"].tolist() == [*at["a"], *at["b"]]


def test_depthwise_keeps_and_repeats() -> None:
    layers = {"a": nn.Conv2d(3, 4, 1), "d": nn.Conv2d(4, 8, 3, groups=4)}
    _, at = axes_of(Model(lambda m, x: m.d(m.a(x)), **layers))
    assert at["d"].tolist() == np.repeat(at["a"], 2).tolist()


def test_existing_groups_are_units() -> None:
    layers = {"a": nn.Conv2d(3, 6, 1), "g": nn.Conv2d(6, 4, 1, groups=2)}
    axes, _ = axes_of(Model(lambda m, x: m.g(m.a(x)), **layers))
    edge = axes.edges[1]
    units = axes.unit[edge.ins]
    assert len(set(units[:3])) == 1
    assert len(set(units)) == 2
    assert set(axes.unit[edge.outs[:2]]) == {units[0]}


def test_flatten_repeats() -> None:
    model = Model(lambda m, x: m.f(m.a(x).flatten(1)), a=nn.Conv2d(3, 4, 1), f=nn.Linear(4 * 64, 2))
    axes, at = axes_of(model)
    assert axes.channel[axes.edges[1].ins].tolist() == np.repeat(at["a"], 64).tolist()


def test_a_gate_is_one_axis_with_what_it_scales() -> None:
    layers = {"a": nn.Conv2d(3, 4, 1), "down": nn.Conv2d(4, 2, 1), "up": nn.Conv2d(2, 4, 1)}

    def gate(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = m.a(x)
        return x * m.up(m.down(x.mean((2, 3), keepdim=True))).sigmoid()

    _, at = axes_of(Model(gate, **layers))
    assert at["up"].tolist() == at["a"].tolist()


def test_a_spatial_mask_stays_whole() -> None:
    """One channel that is spread over all: nothing is tied, and its axis is frozen with the reason."""
    layers = {"a": nn.Conv2d(3, 4, 1), "m": nn.Conv2d(3, 1, 1)}
    axes, at = axes_of(Model(lambda m, x: m.a(x) * m.m(x).sigmoid(), **layers))
    assert len(set(at["a"])) == 4
    reason = axes.frozen[int(axes.axis[axes.edges[1].outs[0]])]
    assert "spreads it over all channels" in reason


def test_a_module_called_twice_ties_its_calls() -> None:
    model = Model(lambda m, x: m.c(m.c(m.a(x))), a=nn.Conv2d(3, 4, 1), c=nn.Conv2d(4, 4, 1))
    axes, _ = axes_of(model)
    first, again = axes.edges[1], axes.edges[2]
    assert axes.channel[first.ins].tolist() == axes.channel[again.ins].tolist()
    assert axes.channel[first.outs].tolist() == axes.channel[again.ins].tolist()


def test_group_norm_ties_its_groups() -> None:
    axes, _ = axes_of(nn.Sequential(nn.Conv2d(3, 6, 1), nn.GroupNorm(3, 6), nn.Conv2d(6, 2, 1)))
    assert len(set(axes.unit[axes.edges[0].outs])) == 3


@pytest.mark.parametrize(
    ("what", "function"),
    [
        ("layer_norm", lambda m, x: m.b(m.norm(m.a(x)))),
        ("softmax", lambda m, x: m.b(m.a(x).softmax(1))),
        ("cumsum", lambda m, x: m.b(m.a(x).cumsum(1))),
        ("sum", lambda m, x: m.b(m.a(x) / m.a(x).sum(1, keepdim=True))),
        ("matmul", lambda m, x: m.b((m.a(x).flatten(2) @ m.a(x).flatten(2).mT).unsqueeze(-1))),
    ],
)
def test_barriers_say_what_they_are(what: str, function: Callable[..., torch.Tensor]) -> None:
    layers = {"a": nn.Conv2d(3, 4, 1), "b": nn.Conv2d(4, 2, 1), "norm": nn.LayerNorm([4, 8, 8])}
    axes, _ = axes_of(Model(function, **layers))
    assert any(what in why for why in axes.frozen.values()), axes.frozen


def test_inputs_are_frozen_and_outputs_known() -> None:
    axes, _ = axes_of(nn.Sequential(conv_bn(3, 4), nn.Conv2d(4, 5, 1)))
    assert "input of the model" in axes.frozen[int(axes.axis[axes.edges[0].ins[0]])]
    assert axes.outputs == {int(axes.axis[axes.edges[1].outs[0]])}
