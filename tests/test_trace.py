"""The laws of tracing, on every odd tiny model: same function, same names, same objects, model untouched."""

from __future__ import annotations

import copy
import importlib
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from splitfx import raising
from splitfx.graph import info, random_inputs
from splitfx.ops import text
from splitfx.schema import mutates
from splitfx.tracing import private_copy, split_inputs, trace
from tests import oracle
from tests.models import ZOO, auxiliary_head, image, plain

# The package's `trace` is the function of that name.
trace_module = importlib.import_module("splitfx.tracing")
GOLDENS = Path(__file__).with_name("goldens")
every_model = pytest.mark.parametrize("name", sorted(ZOO))


def doubled(value: Any) -> Any:
    from torch.utils import _pytree as pytree

    return pytree.tree_map(lambda t: t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t, value)


def made(name: str) -> tuple[nn.Module, Any]:
    model, inputs = ZOO[name]()
    return model.double(), doubled(inputs)


# ---------------------------------------------------------------- the same function


@every_model
def test_eval_output_is_equal(name: str) -> None:
    model, inputs = made(name)
    graph = trace(model, inputs)
    oracle.assert_equal_outputs(graph.eval(), model.eval(), inputs)


@every_model
def test_training_step_is_equal(name: str) -> None:
    model, inputs = made(name)
    oracle.assert_equal_training(trace(model, inputs).train(), model.train(), inputs)


@every_model
def test_any_batch(name: str) -> None:
    model, inputs = made(name)
    args, kwargs = split_inputs(inputs)
    one = torch.utils._pytree.tree_map(lambda t: t[:1], (args, kwargs))  # type: ignore[attr-defined]
    graph = trace(model, one)
    assert info(graph).dynamic == "batch", info(graph).notes
    for batch in (1, 3):
        more = random_inputs(graph, seed=batch, batch=batch)
        oracle.assert_equal_outputs(graph.eval(), model.eval(), more)


@every_model
def test_sums_after_copy_and_move(name: str) -> None:
    """deepcopy and .to() keep shared modules and tied weights shared."""
    model, inputs = ZOO[name]()
    graph = copy.deepcopy(trace(model, inputs)).to(torch.float64)
    assert len(list(graph.parameters())) == len([p for k, p in model.named_parameters() if k in graph.state_dict()])
    oracle.assert_equal_training(graph.train(), model.double().train(), doubled(inputs))


# ---------------------------------------------------------------- the same objects under the same names


@every_model
def test_parameters_are_the_users_own(name: str) -> None:
    model, inputs = made(name)
    graph = trace(model, inputs)
    assert list(graph.state_dict()).sort() == list(model.state_dict()).sort()
    assert set(graph.state_dict()) == set(model.state_dict())
    ours = dict(graph.named_parameters(remove_duplicate=False))
    for key, parameter in model.named_parameters(remove_duplicate=False):
        assert ours[key] is parameter
    for key, buffer in model.named_buffers(remove_duplicate=False):
        assert dict(graph.named_buffers(remove_duplicate=False))[key] is buffer


@every_model
def test_original_checkpoint_loads(name: str) -> None:
    model, inputs = made(name)
    graph = trace(copy.deepcopy(model), inputs)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    graph.load_state_dict(model.state_dict())
    oracle.assert_equal_outputs(graph.eval(), model.eval(), inputs)


@every_model
def test_modes_are_copied_layer_by_layer(name: str) -> None:
    model, inputs = made(name)
    flags = {path: m.training for path, m in model.named_modules()}
    graph = trace(model, inputs)
    assert graph.training == model.training
    for path, module in graph.named_modules():
        assert module.training == flags.get(path, module.training), path


def test_frozen_norm_keeps_its_statistics() -> None:
    model, inputs = made("frozen_norm")
    oracle.assert_equal_training(trace(model, inputs), model, inputs)


# ---------------------------------------------------------------- the model is never changed


@every_model
@pytest.mark.parametrize("training", [True, False])
def test_model_is_untouched(name: str, training: bool) -> None:
    model, inputs = made(name)
    model.train(training)
    calls: list[str] = []
    hooks = [m.register_forward_hook(lambda *_: calls.append("run")) for m in model.children()]
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = snapshot(model)
    values = copy.deepcopy(model.state_dict())
    given = copy.deepcopy(split_inputs(inputs))
    trace(model, inputs)
    assert snapshot(model) == before
    for key, value in model.state_dict().items():
        assert torch.equal(value, values[key]), key
    assert all(bool((p.grad == 1).all()) for p in model.parameters() if p.grad is not None)
    oracle.assert_equal(split_inputs(inputs), given)
    assert len(hooks) == len(model._modules) or name == "shared_module"


def snapshot(model: nn.Module) -> Any:
    """Everything of a model that tracing could change, by identity."""

    def one(module: nn.Module) -> Any:
        held = {k: (id(v), getattr(v, "_version", 0)) for k, v in vars(module).items() if not isinstance(v, dict)}
        inner = {k: {n: id(v) for n, v in d.items()} for k, d in vars(module).items() if isinstance(d, dict)}
        return held, inner

    return {path: one(module) for path, module in model.named_modules()}


def test_traces_under_no_grad_and_still_trains() -> None:
    model, inputs = made("attention")
    with torch.no_grad():
        graph = trace(model, inputs)
    oracle.assert_equal_training(graph.train(), model.train(), inputs)


def test_frozen_parameters_do_not_bake_a_fast_path() -> None:
    model, inputs = made("attention")
    graph = trace(model.requires_grad_(False), inputs)
    assert not any("transformer" in str(n.target) or "native_multi" in str(n.target) for n in graph.graph.nodes)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    model, inputs = plain()
    model = model.to(dtype)
    oracle.assert_equal_outputs(trace(model, inputs.to(dtype)).eval(), model.eval(), inputs.to(dtype))


def test_grad_mode_is_given_back_under_no_grad() -> None:
    model, inputs = made("no_grad_backbone")
    graph = trace(model, inputs)
    with torch.no_grad():
        assert not graph(inputs).requires_grad
        assert not torch.is_grad_enabled()
    assert graph(inputs).requires_grad


# ---------------------------------------------------------------- what a trace cannot show is noted


def notes(graph: Any) -> str:
    return "\n".join(f"{n.where}: {n.what}" for n in info(graph).notes)


def test_auxiliary_head_is_reported() -> None:
    model, inputs = auxiliary_head()
    graph = trace(model, inputs)
    found = info(graph)
    assert found.train_only == ("aux",)
    assert found.untouched == ("aux.weight", "aux.bias")
    assert "aux: Linear left no trace" in notes(graph)
    assert set(graph.state_dict()) | set(found.untouched) == set(model.state_dict())


class ByMode(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.attention = nn.MultiheadAttention(4, 2, dropout=0.5, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        y = torch.tanh(y) if self.training else y
        tokens = y.flatten(2).transpose(1, 2)
        return self.attention(tokens, tokens, tokens)[0]


def test_other_paths_in_train_mode_are_reported() -> None:
    said = notes(trace(ByMode(), image()))
    assert "model: ByMode acts differently in train mode (tanh)" in said
    assert "attention: MultiheadAttention acts differently in train mode" in said
    assert "acts differently" not in notes(trace(*plain()))


class ByBatch(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.relu() if x.shape[0] == 1 else x.sigmoid()


class UpToFour(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.relu() if x.shape[0] > 4 else x.sigmoid()


@pytest.mark.parametrize(("model", "batch"), [(ByBatch(), 1), (ByBatch(), 2), (UpToFour(), 1), (UpToFour(), 6)])
def test_code_that_depends_on_the_batch_fixes_it(model: nn.Module, batch: int) -> None:
    inputs = image(batch, 3, 4, 4)
    graph = trace(model, inputs)
    oracle.assert_equal_outputs(graph, model, inputs)
    if info(graph).dynamic == "batch":
        for other in (1, 2, 3, 8):
            oracle.assert_equal_outputs(graph, model, image(other, 3, 4, 4))
    else:
        assert "sizes are fixed" in notes(graph)


class OneOfEach(nn.Module):
    """Takes an image and a tensor of one scale, whatever the batch; a batch of two scales fails."""

    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return x * scale.view(1)


def test_input_that_is_no_batch_fixes_the_sizes() -> None:
    inputs = (image(1, 3, 4, 4), image(1))
    graph = trace(OneOfEach(), inputs)
    oracle.assert_equal_outputs(graph, OneOfEach(), inputs)
    assert info(graph).dynamic == "none"
    assert "cannot be run in train mode" not in notes(graph)


class NeedsTargets(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        if self.training and targets is None:
            raise ValueError("targets are needed in train mode")
        return self.conv(x)


def test_model_that_cannot_train_on_these_inputs_is_noted() -> None:
    graph = trace(NeedsTargets(), image())
    assert "cannot be run in train mode on these inputs (ValueError: targets are needed" in notes(graph)


class AlwaysFrozen(nn.BatchNorm2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.1, self.eps)


def test_norm_that_never_switches_stays_frozen() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), AlwaysFrozen(4)).double()
    graph = trace(model, image().double())
    oracle.assert_equal_training(graph.train(), model.train(), image().double())


class Flattening(nn.Module):
    """A leaf that acts on self.training and changes the size."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1) if not self.training else x.flatten(1) * 2


def test_leaf_that_changes_the_size_is_traced_into() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), Flattening(), nn.Linear(1024, 2)).eval()
    graph = trace(model, image())
    oracle.assert_equal_outputs(graph, model, image())
    assert "1: Flattening acts differently in train mode" in notes(graph)


def test_python_inputs_are_noted() -> None:
    model, inputs = ZOO["keyword_inputs"]()
    graph = trace(model, (inputs[0], {**inputs[1], "scale": 3.0}))
    assert "these Python values only: 3.0" in notes(graph)
    oracle.assert_equal_outputs(graph, model, (inputs[0], {"scale": 3.0, **inputs[1]}))


def test_free_height_and_width() -> None:
    model, inputs = ZOO["residual"]()
    graph = trace(model, inputs, dynamic="all")
    assert info(graph).dynamic == "all"
    oracle.assert_equal_outputs(graph.eval(), model.eval(), image(3, 3, 20, 28))


def test_compiled_model_keeps_its_names() -> None:
    model, inputs = plain()
    assert set(trace(torch.compile(model), inputs).state_dict()) == set(model.state_dict())  # type: ignore[arg-type]


def test_graph_module_of_the_user() -> None:
    model, inputs = made("residual")
    graph = trace(torch.fx.symbolic_trace(model), inputs)
    oracle.assert_equal_training(graph.train(), model.train(), inputs)


def test_symbolic_trace_is_the_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch.export fails at first, the second front end gives the same canonical graph."""
    model, inputs = made("plain")
    expected = text(trace(model, inputs))

    def broken(model: nn.Module) -> nn.Module:
        raise RuntimeError("no private copy today")

    real = trace_module.private_copy
    monkeypatch.setattr(trace_module, "private_copy", broken)
    monkeypatch.setattr(trace_module, "symbolic_copy", lambda m: torch.fx.symbolic_trace(real(m)).eval())
    graph = trace(model, inputs)
    assert info(graph).front_end == "torch.fx.symbolic_trace"
    assert text(graph) == expected
    oracle.assert_equal_training(graph.train(), model.train(), inputs)


# ---------------------------------------------------------------- in place


@every_model
def test_in_place_result_replaces_its_operand(name: str) -> None:
    graph = trace(*made(name)).graph
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        if node.op == "call_function" and mutates(node.target) and not node.meta.get("writes_view"):
            operand = node.args[0]
            assert all(order[user] <= order[node] for user in operand.users), f"{operand} is read after {node}"


def test_old_names_of_overwritten_values_are_rewired() -> None:
    """An exported graph may read an overwritten value under its old name; the canonical graph must not."""
    model, inputs = made("in_place_read_again")
    private = private_copy(model)
    exported: Any = torch.export.export(private, (inputs,)).module(check_guards=False)
    for node in exported.graph.nodes:
        if mutates(node.target):
            node.replace_all_uses_with(node.args[0], delete_user_cb=lambda user, node=node: user is not node)
    graph = raising.Raiser(exported, private, model).run()
    nodes = [n for n in graph.nodes if n.op == "call_function"]
    assert [mutates(n.target) for n in nodes] == [True, True, False, False, False, False]
    assert nodes[0].args[0].op == "call_module"
    assert nodes[1].args[0] is nodes[0]
    assert all(nodes[0] not in n.all_input_nodes for n in nodes[2:])
    assert nodes[1] in nodes[2].all_input_nodes


def test_writes_through_views_are_marked() -> None:
    def marked(name: str) -> set[str]:
        return {n.name for n in trace(*made(name)).graph.nodes if n.meta.get("writes_view")}

    assert {"fill_", "mul_", "clamp_"} & marked("in_place_views") >= {"fill_", "clamp_"}
    for name in ("plain", "residual", "stochastic_depth", "in_place_read_again"):
        assert marked(name) == set(), name


# ---------------------------------------------------------------- tracing a canonical graph again


@every_model
def test_retrace_is_equal(name: str) -> None:
    model, inputs = made(name)
    first = trace(model, inputs)
    second = trace(first, inputs)
    assert text(second) == text(first)
    a, b = info(first), info(second)
    for field in (
        "inputs",
        "model_class",
        "front_end",
        "dynamic",
        "notes",
        "train_only",
        "untouched",
        "aliases",
    ):
        assert getattr(a, field) == getattr(b, field), field
    layers = [[n.meta.get("layer") for n in g.graph.nodes if n.op == "call_function"] for g in (first, second)]
    assert layers[0] == layers[1]
    oracle.assert_equal_training(second.train(), model.train(), inputs)


@pytest.mark.parametrize("name", ["residual", "in_place_read_again"])
def test_text_is_golden(name: str) -> None:
    """SPLITFX_GOLDENS=1 writes the files anew; read the difference before committing it."""
    path, now = GOLDENS / f"trace_{name}.txt", text(trace(*ZOO[name]()))
    if os.environ.get("SPLITFX_GOLDENS"):
        path.write_text(now)
    assert path.read_text() == now


# ---------------------------------------------------------------- sabotage: the laws above can turn red


def test_lost_rewiring_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    test_old_names_of_overwritten_values_are_rewired()
    monkeypatch.setattr(raising.Raiser, "rewire", lambda *_: None)
    with pytest.raises(AssertionError):
        test_old_names_of_overwritten_values_are_rewired()


def test_frozen_batch_norm_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(raising.Raiser, "batch_norm", lambda *_: None)
    with pytest.raises(AssertionError, match="output|buffer"):
        test_training_step_is_equal("plain")


def test_frozen_dropout_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(raising.Raiser, "dropout", lambda *_: None)
    with pytest.raises(AssertionError):
        test_training_step_is_equal("plain")


def test_copied_parameters_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace_module, "private_copy", lambda m: copy.deepcopy(m).eval())
    with pytest.raises(AssertionError):
        test_parameters_are_the_users_own("plain")


def test_untied_weights_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def untied(model: nn.Module) -> nn.Module:
        private = private_copy(model)
        private.same.weight = nn.Parameter(private.same.weight.detach().clone())  # type: ignore[union-attr]
        return private

    monkeypatch.setattr(trace_module, "private_copy", untied)
    with pytest.raises(AssertionError):
        test_parameters_are_the_users_own("tied_weights")


@pytest.mark.parametrize("wrong", [lambda y: 2 * y, lambda y: y.roll(1, 1), lambda y: y * 1.01])
def test_the_oracle_sees_a_wrong_output(wrong: Any) -> None:
    y = image()
    with pytest.raises(AssertionError, match="off by"):
        oracle.assert_equal(wrong(y), y)
