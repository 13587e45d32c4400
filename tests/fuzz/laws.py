"""The laws that every network, plan and size must keep. Each raises `Broken` with what it saw."""

from __future__ import annotations

import copy
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

import splitfx
from splitfx.compiler.pipeline import Step
from splitfx.compiler.plan import Plan
from splitfx.errors import PassError, SplitfxError, VerificationError
from splitfx.ir.graph import layer, module_of
from splitfx.ir.ops import op_name, text
from tests import oracle
from tests.fuzz.box import obeyed, refusal_fault

Inputs = tuple[torch.Tensor, ...]
THREADS = 4


class Broken(AssertionError):
    """A law does not hold."""


def called(model: nn.Module, inputs: Inputs) -> Any:
    """Outputs on copies of the inputs, which must be left alone."""
    given = [t.clone() for t in inputs]
    with torch.no_grad():
        found = model(*given)
    if not all(torch.equal(a, b) for a, b in zip(given, inputs, strict=True)):
        raise Broken("the inputs were changed")
    return found


def require_same(got: Any, wanted: Any, what: str) -> None:
    if wrong := oracle.difference(got, wanted):
        raise Broken(f"{what}: {wrong}")


def shapes(value: Any) -> list[tuple[int, ...]]:
    return [tuple(t.shape) for t in oracle.leaves(value) if isinstance(t, torch.Tensor)]


# ---------------------------------------------------------------- refusals


def fair(error: SplitfxError) -> str:
    """A refusal's word; `Broken` where it is no refusal but an admission, or not one plain line."""
    message = str(error)
    if isinstance(error, VerificationError) or (isinstance(error, PassError) and "left an illegal" in message):
        raise Broken(f"{type(error).__name__}: {message}") from error
    if wrong := refusal_fault(message):
        raise Broken(f"{wrong}: {type(error).__name__}: {message}") from error
    return "refused"


# ---------------------------------------------------------------- sizes


def at_another_size(model: nn.Module, split: nn.Module, inputs: Inputs, equal: bool) -> str:
    """Equal to the model, or one line that names sizes. A split that computes something else has its shapes."""
    try:
        wanted = called(model, inputs)
    except Broken:
        raise
    except Exception:  # with whatever it raises: nn.MultiheadAttention asserts
        return "the model itself refuses"
    try:
        found = called(split, inputs)
    except SplitfxError as error:
        fair(error)
        if not re.search(r"\d", str(error)):
            raise Broken(f"a refusal of a size that names none: {error}") from error
        return "refused"
    except Exception as error:
        size = [tuple(t.shape) for t in inputs]
        raise Broken(f"at {size}, which the model takes: {type(error).__name__}: {str(error)[:300]}") from error
    size = f"at {[tuple(t.shape) for t in inputs]}"
    if equal:
        require_same(found, wanted, size)
    elif shapes(found) != shapes(wanted):
        raise Broken(f"{size}: shapes {shapes(found)} instead of {shapes(wanted)}")
    return "equal"


# ---------------------------------------------------------------- the user's model


class Snapshot:
    """All that can be seen of a model, to be compared later."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.seen = self.look()

    def look(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for path, module in self.model.named_modules(remove_duplicate=False):
            for name, value in vars(module).items():
                found[f"{path}.{name}"] = (id(value), _contents(value))
        tensors = [*self.model.named_parameters(), *self.model.named_buffers()]
        found |= {f"value of {name}": (id(t), t.detach().clone()) for name, t in tensors}
        return found

    def require_same(self) -> None:
        now = self.look()
        if now.keys() != self.seen.keys():
            raise Broken(f"the model has other attributes than before: {sorted(now.keys() ^ self.seen.keys())}")
        for name, (identity, value) in self.seen.items():
            same = torch.equal(value, now[name][1]) if isinstance(value, torch.Tensor) else value == now[name][1]
            if identity != now[name][0] or not same:
                raise Broken(f"{name} of the model was changed")


def _contents(value: Any) -> Any:
    if isinstance(value, dict):
        return [(k, id(v)) for k, v in value.items()]
    if isinstance(value, list | set | tuple):
        return [id(v) for v in value]
    return value if isinstance(value, bool | int | float | str | None) else None


def nothing_shared(split: nn.Module, model: nn.Module) -> None:
    """No module, tensor memory or mutable attribute of the model in the result, nor of one module in another."""
    theirs = {key: path for path, key in _mutable(model)}
    ours: dict[int, str] = {}
    for path, key in _mutable(split):
        if key in theirs:
            raise Broken(f"{path} of the result is {theirs[key]} of the model")
        if key in ours:
            raise Broken(f"{path} of the result is {ours[key]} too")
        ours[key] = path
    memory = {t.untyped_storage().data_ptr(): n for n, t in _tensors(model) if t.numel()}
    for name, tensor in _tensors(split):
        if tensor.numel() and tensor.untyped_storage().data_ptr() in memory:
            raise Broken(f"{name} of the result is in the memory of {memory[tensor.untyped_storage().data_ptr()]}")


def _mutable(model: nn.Module) -> Iterator[tuple[str, int]]:
    for path, module in model.named_modules():
        yield path, id(module)
        for name, value in vars(module).items():
            if isinstance(value, dict | list | set):
                yield f"{path}.{name}", id(value)


def _tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


# ---------------------------------------------------------------- notes


def notes_name_declined_sites(step: Step, before: fx.GraphModule, after: fx.GraphModule) -> None:
    if not step.notes:
        raise Broken(f"{step.name} has no notes")
    for note in step.notes:
        if not note.where or len(note.what) < 6 or any(map(obeyed, note.what)):
            raise Broken(f"{step.name}: an empty note or one with control characters: {note}")
    if not step.changed and all(n.kind == "did" for n in step.notes):
        raise Broken(f"{step.name} changed nothing and its notes say only what it did: {step.notes}")
    reasons = [n for n in step.notes if n.kind != "did"]
    told = " ".join(f"{n.where} {n.what}" for n in reasons) + " ".join(_within(n.where, before) for n in reasons)
    for node in sites(step, before, after):
        if layer(node) not in told:
            raise Broken(f"{step.name} left {layer(node)} ({op_name(node)}) as it was, and no note says why")


def _within(where: str, graph: fx.GraphModule) -> str:
    """The layers of a block that a note names by its first and its last."""
    first, _, last = where.partition(" to ")
    layers = [layer(node) for node in graph.graph.nodes]
    if first not in layers or last not in layers:
        return ""
    return " ".join(layers[layers.index(first) : len(layers) - layers[::-1].index(last)])


def sites(step: Step, before: fx.GraphModule, after: fx.GraphModule) -> list[fx.Node]:
    """What a pass that was asked to act on every such node left as it was."""
    left = list(after.graph.nodes)
    if step.name == "fold_batchnorm":
        return [n for n in left if op_name(n) == "batch_norm"]
    if step.name == "drop_identity":  # as functions they follow the mode that was traced
        drops = ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")
        return [
            n for n in left if op_name(n) in ("identity", "alias") or (op_name(n) in drops and n.op == "call_module")
        ]
    if step.name == "group" and min(step.options["factors"]) > 1 and not step.options.get("exclude"):  # type: ignore[type-var]
        was = {str(n.target): module_of(n) for n in before.graph.nodes if n.op == "call_module"}
        return [n for n in left if op_name(n) == "conv2d" and _as_it_was(n, was)]
    return []


def _as_it_was(node: fx.Node, was: dict[str, Any]) -> bool:
    old: Any = was.get(str(node.target))
    new: Any = module_of(node)
    if old is None or new is None or type(old) is not type(new):
        return False
    return old.groups == new.groups == 1 and old.weight.shape == new.weight.shape


# ---------------------------------------------------------------- folders, files, texts, threads


def plan_round_trips(plan: Plan) -> None:
    if (again := Plan.from_toml(plan.to_toml())) != plan:
        raise Broken(f"the plan's text says another plan:\n{plan.to_toml()}\n{again.to_toml()}")


def transforms_the_same(graph: fx.GraphModule, plan: Plan) -> None:
    one, other = (splitfx.transform(graph, plan, verify=False) for _ in range(2))
    if text(one) != text(other):
        raise Broken(f"a second transform gives another graph:\n{text(one)}\n{text(other)}")
    require_same(dict(one.state_dict()), dict(other.state_dict()), "weights of a second transform")


def saves_and_loads(split: fx.GraphModule, model: nn.Module, inputs: Inputs, folder: Path) -> None:
    wanted = called(split, inputs)
    place = splitfx.save(split, folder / "split")
    loaded = splitfx.load(place)
    require_same(called(loaded, inputs), wanted, "loaded without the model")
    if text(loaded) != text(split):
        raise Broken(f"loaded, the text is another:\n{text(loaded)}\n{text(split)}")
    require_same(called(splitfx.load(place, copy.deepcopy(model)), inputs), wanted, "loaded with the model")
    again = splitfx.save(loaded, folder / "again")
    for name in ("program.json", "plan.toml"):
        if (again / name).read_bytes() != (place / name).read_bytes():
            raise Broken(f"saved again, {name} is another")


def exports(split: fx.GraphModule, inputs: Inputs, folder: Path) -> None:
    import onnxruntime

    wanted = [t for t in oracle.leaves(called(split, inputs)) if isinstance(t, torch.Tensor)]
    path = splitfx.export_onnx(split, folder / "split.onnx")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    feed = {spec.name: value.numpy() for spec, value in zip(session.get_inputs(), inputs, strict=False)}
    require_same([torch.from_numpy(v) for v in session.run(None, feed)], wanted, "onnxruntime")


def runs_in_threads(split: nn.Module, inputs: list[Inputs]) -> None:
    """The same from several threads at once, at several sizes."""
    wanted = [called(split, one) for one in inputs]
    problems: list[BaseException] = []

    def work(turn: int) -> None:
        try:
            for i in range(len(inputs)):
                k = (turn + i) % len(inputs)
                require_same(called(split, inputs[k]), wanted[k], f"in a thread, at size {k}")
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=work, args=(turn,)) for turn in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if problems:
        raise Broken(f"from {THREADS} threads: {type(problems[0]).__name__}: {problems[0]}") from problems[0]
