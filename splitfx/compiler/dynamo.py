"""The backend of ``torch.compile(model, backend="splitfx", options=...)``: a plan for what Dynamo captures.

For code that `splitfx.trace` cannot take whole, such as a pipeline with control flow of its own around its networks.
Dynamo hands over one graph for each stretch of tensor code that it captures, weights among its inputs. The weights
become attributes again, under the names that they have in the user's module, and the plan is carried out at the first
call, when sizes are known. What runs then holds the user's own parameters: training and loading new weights reach it.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import map_arg

from splitfx.compiler.plan import Plan
from splitfx.compiler.transform import transform
from splitfx.errors import PlanError, UnsupportedError, nearest
from splitfx.ir.editing import free_path
from splitfx.ir.graph import set_path

KEPT = 8  # splits of one captured graph, for other numbers among its inputs
_OPTIONS = ("plan", "budget", "verify")
# Where Dynamo found a weight: L['self']._modules['conv']._parameters['weight'], .__dict__['_modules']['conv'] for some.
_ATTRIBUTE = re.compile(r"_(?:parameters|buffers)(?:'\])?\['\w+'\]$")
_WORDS = re.compile(r"\['(\w+)'\]|\.([A-Za-z]\w*)")
_HOLDERS = ("self", "_modules", "_parameters", "_buffers")


def backend(
    graph: fx.GraphModule, example_inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """What `torch.compile` calls for ``backend="splitfx"``.

    ``options``: "plan", anything that `splitfx.transform` takes as one, or "budget", that of `splitfx.passes.Tile`;
    "verify" as in `transform`. The first call raises what is wrong, as itself and not as a failure of Dynamo's:
    `PlanError` for other options and for none, what `transform` raises, and `UnsupportedError` for a plan that makes
    weights of its own.
    """
    return torch.compiler.disable(Captured(graph, options or {}))  # what it runs is not to be captured again


def asked(options: Mapping[str, Any]) -> tuple[Plan, bool]:
    for name in options:
        if name not in _OPTIONS:
            raise PlanError(f"torch.compile with backend='splitfx': unknown option {name!r}.{nearest(name, _OPTIONS)}")
    if ("plan" in options) == ("budget" in options):
        raise PlanError(
            "torch.compile with backend='splitfx' needs either a budget or a plan: options={'budget': '64 MiB'}, or "
            "options={'plan': [Tile(until='layer3')]}"
        )
    given = options["plan"] if "plan" in options else [{"name": "tile", "budget": options["budget"]}]
    return Plan.of(given), bool(options.get("verify", True))


class Captured:
    """A captured graph; split anew for each value of the numbers among its inputs, such as sizes."""

    def __init__(self, graph: fx.GraphModule, options: Mapping[str, Any]) -> None:
        self.graph, self.options = graph, options
        holes = [node for node in graph.graph.nodes if node.op == "placeholder"]
        self.wheres = {node: _where(node) for node in holes}  # Dynamo forgets them before the first call
        self.wrapped = [getattr(node.meta.get("grapharg"), "pass_arg_as_tensor", False) for node in holes]
        self._known: dict[tuple[Any, ...], tuple[list[int], fx.GraphModule]] = {}

    def __call__(self, *given: Any) -> Any:
        if any(self.wrapped):  # numbers that Dynamo hands over as tensors
            given = tuple(one.item() if wrapped else one for one, wrapped in zip(given, self.wrapped, strict=True))
        key = tuple(None if isinstance(one, torch.Tensor) else one for one in given)
        if key not in self._known:
            made = self._split(given)
            if len(self._known) >= KEPT:
                self._known.pop(next(iter(self._known)))
            self._known[key] = made
        places, split = self._known[key]
        return split(*(given[place] for place in places))

    def _split(self, given: Sequence[Any]) -> tuple[list[int], fx.GraphModule]:
        """The places of the inputs that are no weights and no numbers, and what runs on them."""
        if not all(isinstance(one, torch.Tensor | int | float | bool) for one in given):
            kinds = sorted({type(one).__name__ for one in given})
            raise UnsupportedError(
                f"torch.compile captured a graph whose inputs are {', '.join(kinds)}: call transform"
            )
        plan, verify = asked(self.options)
        trains = next((node for node in self.graph.graph.nodes if _trains(node)), None)
        if trains is not None:
            what = getattr(trains.target, "__name__", trains.name)
            raise UnsupportedError(
                f"torch.compile captured {what} in train mode, where it reads the whole batch or draws numbers: call "
                "model.eval() (frozen norms train well)"
            )
        model, places = lifted(self.graph, self.wheres, given)
        split = transform(model, plan, tuple(given[place] for place in places), verify=verify, progress=False)
        share(split, model)
        return places, split


def share(split: fx.GraphModule, model: nn.Module) -> None:
    """Parameters and buffers of ``split``, which are copies, become those of ``model``."""
    own, made = model.state_dict(keep_vars=True), split.state_dict()
    for name in sorted({*own, *made}):
        if name not in own or name not in made or not _same(own[name], made[name]):
            raise UnsupportedError(
                f"the plan changes the weights ({name}), and torch.compile leaves those of the model as they are: call "
                "splitfx.transform(model, plan, inputs) instead"
            )
    split.load_state_dict(own, assign=True)


def lifted(
    graph: fx.GraphModule, wheres: Mapping[fx.Node, str], given: Sequence[Any]
) -> tuple[fx.GraphModule, list[int]]:
    """The captured graph as a module: its weights are attributes again, its numbers are written down. And the places
    of the inputs that remain. ``wheres``: where Dynamo found each input, such as
    ``L['self']._modules['conv1']._parameters['weight']``."""
    tree, copied, places = nn.Module(), fx.Graph(), []
    known: dict[fx.Node, Any] = {}
    for name, part in graph.named_children():
        tree.add_module(name, part)
    for place, ((node, where), value) in enumerate(zip(wheres.items(), given, strict=True)):
        if isinstance(value, nn.Parameter) or (isinstance(value, torch.Tensor) and _ATTRIBUTE.search(where)):
            words = [a or b for a, b in _WORDS.findall(where)]
            words = [word for word in words if word not in _HOLDERS and not hasattr(nn.Module, word)]
            path = free_path(tree, ".".join(words) or node.name)
            set_path(tree, path, value)
            known[node] = copied.get_attr(path)
        elif isinstance(value, torch.Tensor):
            known[node] = copied.placeholder(node.name)
            places.append(place)
        else:
            known[node] = value
    for node in graph.graph.nodes:
        if node.op == "output":
            copied.output(map_arg(node.args[0], known.__getitem__))
        elif node.op == "call_method" and node.target == "item" and not isinstance(known[node.args[0]], fx.Node):
            known[node] = known[node.args[0]]  # of a number that was wrapped
        elif node.op != "placeholder":
            known[node] = copied.node_copy(node, known.__getitem__)
    return fx.GraphModule(tree, copied).eval(), places  # what differs in train mode is an argument of each call


def _where(node: fx.Node) -> str:
    held = node.meta.get("grapharg")
    return str(held.source.name) if held is not None and held.source is not None else ""


def _trains(node: fx.Node) -> bool:
    if node.op != "call_function" or not callable(node.target):
        return False
    try:
        given = inspect.signature(node.target).bind(*node.args, **node.kwargs)
    except (TypeError, ValueError):  # an operator without a signature has no such argument
        return False
    return given.arguments.get("training") is True


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
