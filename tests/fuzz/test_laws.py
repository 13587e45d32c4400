"""Each law turns red: deliberately wrong rewrites, results and refusals are seen by it."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import fx, nn

import splitfx
from splitfx.analysis.regions import Edge
from splitfx.carving import narrow
from splitfx.compiler import pipeline
from splitfx.compiler.protocol import Outcome, Pass
from splitfx.errors import PlanError, UnsupportedError, VerificationError
from splitfx.ir.graph import info, output_node
from splitfx.ir.notes import Note
from splitfx.passes import DropIdentity, FoldBatchNorm, Group, Tile, fold_batchnorm
from tests.fuzz import laws, plans, steps
from tests.fuzz.box import refusal_fault
from tests.fuzz.kind_network import Trial
from tests.fuzz.laws import Broken
from tests.fuzz.networks import Drawn, Network, network

SHOWN = 200  # networks in which every family of layers must have been drawn


def net(length: int = 6) -> Network:
    """Three convolutions, a norm and what is dropped; or only the first layers."""
    torch.manual_seed(0)
    made = Network()
    layers = (
        nn.Conv2d(3, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, padding=1),
        nn.Dropout(0.2),
        nn.Conv2d(8, 4, 3, padding=1),
    )
    for i, layer in enumerate(layers[:length]):
        made.steps[f"layer{i}"] = layer
        made.layers.append(f"layer{i}")
        made.reads.append((i,))
    made.returns = (length,)
    assert isinstance(layers[1], nn.BatchNorm2d)
    assert layers[1].running_mean is not None
    layers[1].running_mean.normal_()
    return made.double().eval()


def image(*size: int) -> torch.Tensor:
    return torch.randn(*(size or (2, 3, 12, 13)), dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def tried(step: Pass, folder: Path, monkeypatch: pytest.MonkeyPatch, length: int = 6) -> str:
    """A whole trial of one network with one pass, by the laws alone: the pipeline's own oracle is off."""
    monkeypatch.setattr(pipeline, "_held_to_promise", lambda *_: 0.0)
    monkeypatch.setattr(plans, "draw_passes", lambda rng, graph: [lambda rng, graph: step])
    return Trial(Random(0), Drawn(net(length), (image(),)), folder).run()


HONEST = (FoldBatchNorm(), DropIdentity(eval_only=True), Tile(rows=3), Tile(grid=(2, 2)))


@pytest.mark.parametrize("step", HONEST, ids=repr)
def test_honest_passes_keep_the_laws(step: Pass, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tried(step, tmp_path, monkeypatch) == "equal"


def test_sabotage_a_dropped_bias(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = fold_batchnorm._fold

    def fold(module: Any, norm: Any) -> None:
        honest(module, norm)
        module.bias = None

    monkeypatch.setattr(fold_batchnorm, "_fold", fold)
    with pytest.raises(Broken, match="the promise: value 0 .* is off by"):
        tried(FoldBatchNorm(), tmp_path, monkeypatch)


@pytest.mark.parametrize("step", [Tile(rows=3), Tile(grid=(2, 2))], ids=repr)
def test_sabotage_a_halo_one_short(step: Pass, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Edge.need

    def short(self: Edge, start: int, stop: int) -> tuple[int, int, int, int]:
        first, last, above, below = honest(self, start, stop)
        return (first, last - 1, above, below + 1) if last - first > 2 else (first, last, above, below)

    monkeypatch.setattr(Edge, "need", short)
    with pytest.raises(Broken, match="the promise: value 0 .* is off by"):
        tried(step, tmp_path, monkeypatch, length=1)


def run_that(change: Any) -> Any:
    """`DropIdentity.run` that goes on with ``change(graph)``."""
    honest = DropIdentity.run

    def run(self: DropIdentity, graph: fx.GraphModule, facts: Any) -> Outcome:
        outcome = honest(self, graph, facts)
        return change(graph, outcome) or outcome

    return run


def doubled(graph: fx.GraphModule, outcome: Outcome) -> None:
    out = output_node(graph)
    value = out.all_input_nodes[0]
    with graph.graph.inserting_before(out):
        twice = graph.graph.call_function(torch.ops.aten.add.Tensor, (value, value))
    out.replace_input_with(value, twice)


def silent(graph: fx.GraphModule, outcome: Outcome) -> Outcome:
    return replace(outcome, notes=(Note("model", "all is well, nothing else to say", "info"),))


@pytest.mark.parametrize(
    ("change", "eval_only", "seen"),
    [(doubled, True, "the promise: value 0 .* is off by"), (silent, False, r"left steps.layer4 \(dropout\) as it was")],
)
def test_sabotaged_rewrites(
    change: Any, eval_only: bool, seen: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DropIdentity, "run", run_that(change))
    with pytest.raises(Broken, match=seen):
        tried(DropIdentity(eval_only=eval_only), tmp_path, monkeypatch)


def test_sabotage_swapped_blocks() -> None:
    """What RETRAIN computes is held to the pass's own dense reference; its refusal is an admission."""
    right = narrow._block
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(narrow, "_block", lambda w, o, i: right(w, o, (i + w.shape[1] // 2) % w.shape[1]))
        with pytest.raises(VerificationError) as caught:
            splitfx.transform(net(), Group(factors=(2,), lowering="branches"), image())
    with pytest.raises(Broken, match="VerificationError"):
        laws.fair(caught.value)


def test_refusals_are_one_plain_line() -> None:
    assert laws.fair(PlanError("the plan is empty.")) == "refused"
    for wrong in ("two\nlines", "long " * 300, " ", "an \x1b[1m escape"):
        assert refusal_fault(wrong).startswith("a refusal ")
    with pytest.raises(Broken, match="not one line"):
        laws.fair(PlanError(" "))


class Sized(nn.Module):
    """Returns the traced size, whatever comes in; or raises."""

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__()
        self.error = error

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.error is not None:
            raise self.error
        return x[:, :, :12, :13]


def test_sizes() -> None:
    model, other = nn.Identity(), (image(2, 3, 16, 20),)
    assert laws.at_another_size(model, Sized(), (image(),), equal=True) == "equal"
    assert (
        laws.at_another_size(model, Sized(UnsupportedError("takes 12×13, not 16×20")), other, equal=True) == "refused"
    )
    for split, seen in (
        (Sized(), "at .*16, 20.* of shape"),
        (Sized(UnsupportedError("another size")), "names none"),
        (Sized(RuntimeError("mismatch")), "RuntimeError: mismatch"),
    ):
        with pytest.raises(Broken, match=seen):
            laws.at_another_size(model, split, other, equal=True)
    with pytest.raises(Broken, match="shapes"):
        laws.at_another_size(model, Sized(), other, equal=False)


def test_the_users_model_is_untouched() -> None:
    model = net()
    for change in (
        lambda: model.train(),
        lambda: model.steps["layer0"].weight.data.mul_(2),  # type: ignore[union-attr, operator]
        lambda: model.steps["layer1"].running_var.add_(1),  # type: ignore[union-attr, operator]
        lambda: model.register_forward_hook(lambda *_: None),
        lambda: setattr(model, "note", 1),
        lambda: model.reads.append((0,)),
    ):
        before = laws.Snapshot(model)
        before.require_same()
        change()
        with pytest.raises(Broken, match="was changed|other attributes"):
            before.require_same()


def test_inputs_are_left_alone() -> None:
    with pytest.raises(Broken, match="inputs were changed"):
        laws.called(nn.ReLU(inplace=True), (image(),))


def test_nothing_is_shared() -> None:
    model, twice = net(), net()
    laws.nothing_shared(copy.deepcopy(model), model)
    with pytest.raises(Broken, match="of the model"):
        laws.nothing_shared(nn.Sequential(model.steps["layer0"]), model)
    part = nn.Conv2d(3, 6, 3)
    part.weight = model.steps["layer0"].weight  # type: ignore[assignment]
    with pytest.raises(Broken, match="in the memory of steps.layer0.weight"):
        laws.nothing_shared(part, model)
    twice.steps["layer0"]._forward_hooks = twice.steps["layer1"]._forward_hooks
    with pytest.raises(Broken, match="of the result is steps.layer0._forward_hooks too"):
        laws.nothing_shared(twice, model)


def test_a_second_transform_and_the_plan() -> None:
    graph = splitfx.trace(net(), image())
    split = splitfx.transform(graph, DropIdentity(eval_only=True))
    assert info(split).plan is not None
    laws.plan_round_trips(info(split).plan)  # type: ignore[arg-type]
    turns = iter([DropIdentity.run, run_that(doubled)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DropIdentity, "run", lambda self, graph, facts: next(turns)(self, graph, facts))
        with pytest.raises(Broken, match="another graph"):
            laws.transforms_the_same(graph, info(split).plan)  # type: ignore[arg-type]
        patch.setattr(splitfx.Plan, "to_toml", lambda self: 'format = 1\n[[pass]]\nname = "fold_batchnorm"\n')
        with pytest.raises(Broken, match="another plan"):
            laws.plan_round_trips(info(split).plan)  # type: ignore[arg-type]


def test_folders_and_exports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = net().float()
    split = splitfx.transform(model, FoldBatchNorm(), image().float())
    laws.saves_and_loads(split, model, (image().float(),), tmp_path)
    laws.exports(split, (image().float(),), tmp_path)
    honest = splitfx.save

    def other_weights(one: fx.GraphModule, folder: Path) -> Path:
        wrong = copy.deepcopy(one)
        with torch.no_grad():
            next(wrong.parameters()).mul_(1.01)
        return honest(wrong, folder)

    (tmp_path / "second").mkdir()
    monkeypatch.setattr(splitfx, "save", other_weights)
    with pytest.raises(Broken, match="loaded without the model"):
        laws.saves_and_loads(split, model, (image().float(),), tmp_path / "second")
    monkeypatch.setattr(splitfx, "export_onnx", lambda *_: tmp_path / "split.onnx")
    with torch.no_grad():
        next(split.parameters()).mul_(1.01)
    with pytest.raises(Broken, match="onnxruntime"):
        laws.exports(split, (image().float(),), tmp_path)


def test_threads() -> None:
    class Counts(nn.Module):
        """The result of its first call at a size, for ever: a cache by the wrong key."""

        def __init__(self) -> None:
            super().__init__()
            self.calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return x * (1 + (self.calls > 2))

    sizes = [(image(),), (image(1, 3, 5, 5),)]
    laws.runs_in_threads(net(), sizes)
    with pytest.raises(Broken, match="from 4 threads"):
        laws.runs_in_threads(Counts(), sizes)


SIZES = {"pointwise": (2, 4, 9, 9), "map": (2, 4, 8, 8), "signal": (2, 4, 8), "vector": (2, 4), "binary": (2, 4, 8, 8)}


@pytest.mark.parametrize(("kind", "size"), SIZES.items())
def test_every_expression_computes(kind: str, size: tuple[int, ...]) -> None:
    """What cannot be computed would never be drawn."""
    x = torch.rand(size, dtype=torch.float64)
    owned = {text: make(4, 8) for text, make in steps.OWNED.items()} if kind == "map" else {}
    for text in (*steps.TEXTS[kind], *owned):
        assert steps.Call(text, **owned.get(text, {})).double()(x.clone(), x.clone()).numel() > 0, text


def test_every_layer_and_form_is_drawn() -> None:
    drawn = [network(Random(seed)).model for seed in range(SHOWN)]
    classes = {type(m).__name__ for model in drawn for m in model.modules()}
    norms = {"BatchNorm2d", "GroupNorm", "LayerNorm", "InstanceNorm2d", "RMSNorm"}
    assert {"Conv1d", "Conv2d", "Conv3d", "ConvTranspose2d", "PReLU", "Gate", "Residual", "Tied"} | norms <= classes
    assert {model.form for model in drawn} == {"one", "tuple", "dict"}
    assert any(len(set(model.layers)) < len(model.layers) for model in drawn), "no layer is called twice"
