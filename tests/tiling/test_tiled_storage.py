"""A tiled graph as a module: saved and loaded, copied, moved to other types and layouts, trained, compiled."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

import splitfx
from splitfx.compiler.pipeline import run_pass
from splitfx.errors import ExportError, UnsupportedError
from splitfx.ir import graph as graphs
from splitfx.ir.ops import text
from splitfx.passes import Tile
from splitfx.storage import PROGRAM
from splitfx.tiling.plan.instructions import Schedule
from splitfx.tiling.run.executor import Tiled
from splitfx.tiling.stage.kernel import Keeping
from tests import oracle
from tests.traced import made_once


class Net(nn.Module):
    """Two inputs, a shared layer, buffers of both kinds, a residual sum, an output at half depth."""

    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.same = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6) if norm else nn.Identity())
        self.head = nn.Conv2d(6, 4, 1)
        self.register_buffer("scale", torch.rand(6, 1, 1) + 0.5)
        self.register_buffer("shift", torch.rand(6, 1, 1), persistent=False)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        z = self.stem(x + y).relu() * self.scale + self.shift
        z = z + self.same(self.same(z))
        return self.head(z), z.mean((2, 3))


@made_once
def net(norm: bool = False, size: tuple[int, int] = (26, 18), **options: Any) -> tuple[fx.GraphModule, fx.GraphModule]:
    """The graph, and the same graph tiled."""
    model = Net(norm).eval()
    graph = splitfx.trace(model, (torch.randn(2, 3, *size), torch.randn(2, 3, *size)))
    return graph, run_pass(graph, Tile(**options or {"rows": 4, "firing_intervals": (1, 2)}))[0]


def tiled_of(graph: nn.Module) -> Tiled:
    return next(m for m in graph.modules() if isinstance(m, Tiled))


def inputs(batch: int = 2, size: tuple[int, int] = (26, 18), **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(batch, 3, *size, generator=generator).to(**options) for _ in range(2))  # type: ignore[return-value]


# ---------------------------------------------------------------- saving


def test_saved_and_loaded_without_the_model(tmp_path: Path) -> None:
    _, split = net()
    loaded = splitfx.load(splitfx.save(split, tmp_path / "split"))
    assert tiled_of(loaded).schedule == Schedule(4, (1, 2))
    assert text(loaded) == text(split)
    assert list(loaded.state_dict()) == list(split.state_dict())
    assert not [key for key in split.state_dict() if key.endswith("shift")]
    oracle.assert_equal(loaded(*inputs()), split(*inputs()))
    again = splitfx.load(splitfx.save(copy.deepcopy(loaded), tmp_path / "again"))
    if not torch.__version__.startswith("2.11."):  # there, a copied GraphModule has persistent buffers only
        assert list(again.state_dict()) == list(split.state_dict())
    oracle.assert_equal(again(*inputs())[0], split(*inputs())[0])


def test_every_field_of_a_schedule_is_kept(tmp_path: Path) -> None:
    _, split = net()
    for schedule in (
        Schedule(8, (), (1, 1), Keeping(0.0)),
        Schedule(0, (), (1, 3)),
        Schedule(2, (3, 1), (2, 2), Keeping(4096.0, 100.0, "disk")),
    ):
        tiled_of(split).schedule = schedule
        folder = splitfx.save(split, tmp_path / "split", overwrite=True)
        assert tiled_of(splitfx.load(folder)).schedule == schedule
    tiled_of(split).checkpoint = True
    assert tiled_of(splitfx.load(splitfx.save(split, tmp_path / "split", overwrite=True))).checkpoint


def test_loaded_onto_a_fresh_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Net().eval()
    plan = splitfx.Plan([Tile(rows=4)])
    split = splitfx.transform(model, plan, inputs())
    with torch.no_grad():
        next(split.parameters()).add_(1)
    folder = splitfx.save(split, tmp_path / "split")
    loaded = splitfx.load(folder, Net().eval())
    assert isinstance(tiled_of(loaded), Tiled)
    assert list(loaded.state_dict()) == list(split.state_dict())


def damaged(folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    path = folder / PROGRAM
    plain = json.loads(path.read_text())
    change(plain["layers"]["tiled"])
    path.write_text(json.dumps(plain) + " " * 4096)  # not shorter than it was
    return folder


def option(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(layer: dict[str, Any]) -> None:
        schedule = dict(map(tuple, layer["options"]["schedule"]["dict"]))
        schedule[key] = value
        layer["options"]["schedule"]["dict"] = [list(one) for one in schedule.items()]

    return change


def kept(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return option("keeping", {"dict": [[key, value]]})


HOSTILE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "rows": (option("rows", -1), "unusable options: see schedule.rows"),
    "rows as words": (option("rows", "4"), "unusable options: see schedule.rows"),
    "a switch for a number": (option("rows", True), "unusable options: see schedule.rows"),
    "firing_intervals": (option("firing_intervals", {"tuple": [0]}), "unusable options: see schedule.firing_intervals"),
    "tiles": (option("tiles", {"tuple": [1]}), "unusable options: see schedule.tiles"),
    "recompute": (kept("recompute", {"float": "nan"}), "unusable options: see schedule.keeping"),
    "spilled bytes": (kept("spill", -1.0), "unusable options: see schedule.keeping.spill"),
    "spilled somewhere": (kept("to", "/etc"), "unusable options: see schedule.keeping.to"),
    "spilled nowhere": (kept("spill", 4.0), "unusable options: see schedule.keeping"),
    "another field": (option("run", "os.system"), "see schedule: object contains unknown field `run`"),
    "another option": (lambda layer: layer["options"].update(__class__=True), "unknown field `__class__`"),
    "no switch": (lambda layer: layer["options"].update(checkpoint="yes"), "unusable options: see checkpoint"),
    "another function": (
        lambda layer: next(n for n in layer["nodes"] if n["op"] == "call_function").update(target="os.system"),
        "'os.system', which is not an operator",
    ),
    "a path with code": (
        lambda layer: layer["layers"].update({"x'; import os #": layer["layers"]["stem"]}),
        "unusable layer path",
    ),
    "a name with code": (lambda layer: layer["nodes"][0].update(name="x; import os"), "unusable name"),
    "a lost layer": (lambda layer: layer["layers"].pop("stem"), "no layer or tensor 'stem'"),
    "no stage": (lambda layer: layer.pop("nodes"), "damaged"),
    "stages in a stage": (lambda layer: layer["layers"].update(inner=copy.deepcopy(layer)), "inside the tiled stage"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_changed_program_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    change, why = HOSTILE[name]
    folder = damaged(splitfx.save(net()[1], tmp_path / "split"), change)
    with pytest.raises(ExportError, match=why) as caught:
        splitfx.load(folder)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- a module like others


def test_copies_share_nothing_and_keep_what_is_shared() -> None:
    graph, split = net(norm=True)
    other = copy.deepcopy(split)
    assert sorted(other.state_dict()) == sorted(split.state_dict())
    assert not {id(p) for p in other.parameters()} & {id(p) for p in split.parameters()}
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert oracle.difference(other(*inputs())[0], split(*inputs())[0])
    other.load_state_dict(split.state_dict())
    oracle.assert_equal(other(*inputs())[0], split(*inputs())[0])
    assert len(list(split.parameters())) == len(list(graph.parameters()))


def test_other_batches_and_sizes_than_the_traced() -> None:
    graph, split = net()
    for batch, size in ((1, (26, 18)), (5, (26, 18)), (2, (31, 40))):
        oracle.assert_equal(split(*inputs(batch, size)), graph(*inputs(batch, size)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_number_types(dtype: torch.dtype) -> None:
    graph, split = net()
    given = inputs(dtype=dtype)
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            oracle.assert_equal(split.to(dtype)(*given), graph.to(dtype)(*given))


def test_channels_last() -> None:
    graph, split = net(norm=True)
    given = tuple(x.to(memory_format=torch.channels_last) for x in inputs())
    with torch.no_grad():
        oracle.assert_equal(split(*given), graph(*given))
        split = split.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        oracle.assert_equal(split(*given), graph(*given))


@pytest.mark.parametrize("options", [{"rows": 4, "firing_intervals": (1, 2)}, {"rows": 1}])
def test_gradients_are_those_of_the_untiled_graph(options: dict[str, Any]) -> None:
    graph, split = net(norm=True, **options)
    found = []
    for one in (graph.double(), split.double()):
        given = [x.requires_grad_() for x in inputs(dtype=torch.float64)]
        sum((y * y).sum() for y in one(*given)).backward()  # pyright: ignore[reportAttributeAccessIssue]
        weights = {k.removeprefix("tiled.stage."): p.grad for k, p in one.named_parameters()}
        found.append(([x.grad for x in given], weights))
    (x, p), (y, q) = found
    oracle.assert_equal(y, x)
    assert p.keys() == q.keys()
    for key, grad in p.items():
        oracle.assert_equal(q[key], grad)


def test_train_mode_is_refused_and_frozen_norms_train() -> None:
    _, split = net(norm=True)
    split.train()
    with pytest.raises(UnsupportedError, match=r"same\.1 in train mode.*model\.eval\(\)"):
        split(*inputs())
    for module in split.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    split(*inputs())[0].sum().backward()
    assert all(p.grad is not None for p in split.parameters())


class Flat(nn.Module):
    """Results that are parts or other forms of larger values."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.pool = nn.Conv2d(3, 8, 3, padding=1), nn.MaxPool2d(2)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = self.conv(x)
        a, b = y.chunk(2, 1)
        return a, self.pool(b), y.mean((2, 3), keepdim=True).flatten(1)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("rows", [0, 3, 64])
def test_results_own_memory_of_exactly_their_size(grad: bool, rows: int) -> None:
    graph = splitfx.trace(Flat().eval(), torch.randn(1, 3, 14, 10))
    split = run_pass(graph, Tile(rows=rows) if rows else Tile(grid=(2, 2)))[0]
    x = torch.randn(1, 3, 14, 10)
    with torch.set_grad_enabled(grad):
        found = tiled_of(split)(x)
    memory = [t.untyped_storage() for t in found]
    assert [m.nbytes() for m in memory] == [t.numel() * t.element_size() for t in found]
    assert len({m.data_ptr() for m in memory} | {x.data_ptr()}) == len(found) + 1


# ---------------------------------------------------------------- torch.compile, torch.export


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_compiled(mode: Any) -> None:
    graph, split = net(norm=True)
    torch._dynamo.reset()
    seen: list[fx.GraphModule] = []

    def backend(part: fx.GraphModule, example: Any) -> Any:
        seen.append(part)
        return part.forward

    with mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        oracle.assert_equal(torch.compile(split, backend=backend)(*inputs()), graph(*inputs()))
    convolutions = [n for part in seen for n in part.graph.nodes if "conv" in str(n.target)]
    assert not convolutions, "the pieces were compiled one by one"


def test_what_torch_export_makes_does_not_stay() -> None:
    graph, split = net()
    tiled = tiled_of(split)
    tiled._programs.clear()
    exported = torch.export.export(split, inputs(), strict=False)
    assert not tiled._programs
    for tensor in pytree.tree_leaves(split(*inputs())):
        assert type(tensor) is torch.Tensor
    oracle.assert_equal(exported.module()(*inputs()), graph(*inputs()))
    assert graphs.is_canonical(split)
