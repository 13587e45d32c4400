"""One walk over an exported graph that writes the canonical one.

Operators whose weights are plain parameters become the matching ``torch.nn`` module, which **holds the same
Parameter objects** and sits under the user's own path; raising goes by operator and by identity of the
parameters, never by the Python class that called it. Operators with computed weights, or with parameters
under other names than ``weight`` and ``bias``, stay functions.

In-place operators stay in place, and every later use of what they overwrite reads their result instead, so
that the graph shows all dependencies: an in-place node is the last reader of its operand. Where the
overwritten storage is also seen by another value that is read later (a view), no edge shows it: such a node
has ``meta["writes_view"] = True`` and keeps its place among its neighbours.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import map_arg

from splitfx.frontend.behaviour import Behaviour
from splitfx.frontend.places import memory, places
from splitfx.ir.copies import unhooked
from splitfx.ir.graph import Whole, operand, operands
from splitfx.ir.layers import FunctionalBatchNorm, SeparableMaxPool2d
from splitfx.ir.ops import ROWS
from splitfx.ir.ops.families.elementwise import DROPOUTS
from splitfx.ir.schema import arguments, aten_name, mutates, sharing, written

_BATCH_NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
_INSTANCE_NORMS = {3: nn.InstanceNorm1d, 4: nn.InstanceNorm2d, 5: nn.InstanceNorm3d}
_NO_GRAD = torch.ops.higher_order.wrap_with_set_grad_enabled


class Raiser:
    """Writes ``graph``, and collects the ``modules`` and ``values`` (parameters, buffers, constants) it
    reads.

    ``private`` is the copy of the user's ``model`` that was exported; ``seen`` is how the model behaves in
    train mode, None where that is unknown.
    """

    def __init__(
        self, exported: fx.GraphModule, private: nn.Module, model: nn.Module, seen: Behaviour | None = None
    ) -> None:
        self.exported, self.private, self.model, self.seen = exported, private, model, seen
        self.places = places(private)
        self.owners = dict(private.named_modules(remove_duplicate=False))
        self.users = dict(model.named_modules(remove_duplicate=False))
        self.graph = fx.Graph()
        self.modules: dict[str, nn.Module] = {}
        self.by_key: dict[Any, str] = {}
        self.values: dict[str, Any] = {}
        self.env: dict[fx.Node, Any] = {}

    def run(self) -> fx.Graph:
        self.walk(self.exported.graph)
        return self.graph

    def walk(self, graph: fx.Graph, prefix: str = "") -> None:
        for node in graph.nodes:
            if self.skipped(node) or (prefix and node.op in ("placeholder", "output")):
                continue
            if node.op == "get_attr":
                node.meta["path"] = prefix + str(node.target)
                self.keep_value(node)
            elif node.target is _NO_GRAD:
                self.grad_switch(node)
            else:
                self.write(node)

    def write(self, node: fx.Node) -> None:
        if node.target is operator.getitem:
            inlined, place = self.env.get(operand(node)), node.args[1]
            if isinstance(inlined, tuple) and isinstance(place, int):
                self.env[node] = inlined[place]
                return
        new = self.raised(node) or self.copied(node)
        new.meta = {"layer": self.where(node), "source": source_line(node.meta.get("stack_trace") or "")}
        self.env[node] = new
        self.rewire(node, new)

    def copied(self, node: fx.Node) -> fx.Node:
        if node.op in ("placeholder", "output"):
            return self.graph.node_copy(node, self.value_of)
        args, kwargs = map_arg((node.args, node.kwargs), self.value_of)
        # Numbered anew, so that tracing a canonical graph again gives the same names.
        return self.graph.create_node(node.op, node.target, args, kwargs, re.sub(r"_\d+$", "", node.name))

    def skipped(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return "guards" in str(node.target)
        return node.op == "call_function" and not node.users and _is_assertion(node.target)

    def grad_switch(self, node: fx.Node) -> None:
        """``with torch.no_grad():`` in the user's forward: its operations inline, between two switches."""
        enabled, _, *outside = node.args
        inner = operand(node, 1)
        held = self.tensor(inner)
        assert held is not None, f"{node.name} reads no graph"
        body: fx.GraphModule = held[1]
        before = self.call_plain(torch.is_grad_enabled)
        self.call_plain(torch._C._set_grad_enabled, bool(enabled))
        holes = [n for n in body.graph.nodes if n.op == "placeholder"]
        for hole, outer in zip(holes, outside, strict=True):
            self.env[hole] = self.value_of(outer) if isinstance(outer, fx.Node) else outer
            hole.meta["outer"] = outer
        self.walk(body.graph, f"{inner.meta['path']}.")
        results = next(n for n in reversed(body.graph.nodes) if n.op == "output").args[0]
        self.env[node] = tuple(map_arg(results, self.value_of))
        self.call_plain(torch._C._set_grad_enabled, before)  # the caller may run the graph under no_grad

    def call_plain(self, function: Any, *args: Any) -> fx.Node:
        node = self.graph.call_function(function, args)
        node.meta = {"layer": "", "source": ""}
        return node

    # ------------------------------------------------------------ values

    def tensor(self, node: Any) -> tuple[str, Any] | None:
        """Path and value of a get_attr node, by the user's own object where there is one."""
        while isinstance(node, fx.Node) and "outer" in node.meta:
            node = node.meta["outer"]
        if not isinstance(node, fx.Node) or node.op != "get_attr":
            return None
        path = node.meta.get("path", str(node.target))
        own = _follow(self.private, path)
        if own is not None:
            return path, own
        constant = _follow(self.exported, path)
        return self.places.get(memory(constant), (path, constant))

    def parameter(self, node: Any) -> torch.Tensor | None:
        held = self.tensor(node)
        return held[1] if held is not None and isinstance(held[1], nn.Parameter) else None

    def where(self, node: fx.Node) -> str:
        """The user's path of the module in whose forward a node was recorded."""
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        path = stack[-1][0].split("@")[0] if stack else ""
        return path if path in self.owners else ""

    def owner(self, node: fx.Node, held: Mapping[str, torch.Tensor | None]) -> str | None:
        """Path of the module that holds exactly these tensors under these names."""

        def holds(path: str) -> bool:
            owner = self.owners.get(path)
            return owner is not None and all(getattr(owner, k, None) is v for k, v in held.items())

        return next((path for path in (self.where(node), *self.homes(node)) if path and holds(path)), None)

    def homes(self, node: fx.Node) -> Iterator[str]:
        for argument in node.all_input_nodes:
            found = self.tensor(argument)
            if found is not None:
                yield found[0].rpartition(".")[0]

    def keep_value(self, node: fx.Node) -> None:
        held = self.tensor(node)
        assert held is not None
        self.values[held[0]] = held[1]
        if isinstance(held[1], fx.GraphModule):  # the body of an operator such as torch.cond or autocast
            drop_assertions(held[1])

    def value_of(self, node: fx.Node) -> Any:
        """The new node for an old one; get_attr nodes appear where they are first read."""
        if node not in self.env:
            assert node.op == "get_attr", f"{node} is used before it is computed"
            path = node.meta["path"]
            self.env[node] = self.graph.get_attr(path)
            self.env[node].meta = {"layer": path, "source": ""}
        return self.env[node]

    def rewire(self, node: fx.Node, new: fx.Node) -> None:
        """What is read after an in-place node is its result."""
        for value, is_result in written(node):
            if is_result:
                self.env[value] = new

    # ------------------------------------------------------------ raising

    def raised(self, node: fx.Node) -> fx.Node | None:
        if node.op != "call_function":
            return None
        if node.target is torch.ops.splitfx.leaf.default:
            path = str(node.args[1])
            if isinstance(self.users[path], Whole):
                self.modules[path] = self.owners[path]  # private all the way down, as a stage is
            elif path not in self.modules:
                self.modules[path] = unhooked(self.users[path])  # what a hook computes is traced
            return self.graph.call_module(path, (self.value_of(operand(node)),))
        if node.target is torch.ops.splitfx.stage.default:
            path = str(node.args[1])
            self.modules[path] = self.owners[path]  # private, with the user's own tensors
            return self.graph.call_module(path, tuple(map(self.value_of, operands(node))))
        name = aten_name(node.target)
        if name == "max_pool2d" and isinstance(self.owners.get(self.where(node)), SeparableMaxPool2d):
            path = self.where(node)
            self.modules.setdefault(path, unhooked(self.owners[path]))
            return self.graph.call_module(path, (self.value_of(operand(node)),))
        if name in DROPOUTS:
            return self.dropout(node, name)
        if name == "batch_norm":
            return self.batch_norm(node)
        if name == "instance_norm":
            return self.instance_norm(node)
        return self.weighted(node, name) if name else None

    def weighted(self, node: fx.Node, name: str) -> fx.Node | None:
        raised = ROWS[name].raised if name in ROWS else None
        if raised is None:
            return None
        a = arguments(node)
        held = {key: self.parameter(a.get(key)) for key in raised.tensors}
        weight = held["weight"]
        if weight is None or (a.get("bias") is not None and held.get("bias") is None):
            return None
        path, recipe = self.owner(node, held), raised.recipe(a, weight)
        if recipe is None or path is None:
            return None
        kind, options = recipe
        if raised.optional_bias:
            options = {**options, "bias": held["bias"] is not None}
        data = a.get(raised.data, a.get("self"))
        return self.call(path, kind, options, held, data)

    def batch_norm(self, node: fx.Node) -> fx.Node | None:
        a = arguments(node)
        names = ("weight", "bias", "running_mean", "running_var")
        tensors = {k: self.tensor(a[k]) for k in names}
        held = {k: v[1] if v else None for k, v in tensors.items()}
        computed = any(a[k] is not None and tensors[k] is None for k in names)
        if not self.switches(held["running_mean"], a["training"]):
            return None  # frozen: the same in train mode
        path = None if computed else self.owner(node, held)
        size = next((v.numel() for v in held.values() if v is not None), None)
        plain = all(held[k] is None or isinstance(held[k], nn.Parameter) for k in ("weight", "bias"))
        if path is None or size is None or not plain:
            return self.functional_norm(node, a)
        owner, tracked = self.owners[path], held["running_mean"] is not None
        options = {
            "num_features": size,
            "eps": a["eps"],
            "momentum": getattr(owner, "momentum", a["momentum"]),
        }
        options |= {"affine": held["weight"] is not None, "track_running_stats": tracked}
        if tracked:
            held["num_batches_tracked"] = getattr(owner, "num_batches_tracked", None)
        return self.call(path, _BATCH_NORMS[_rank(a["input"])], options, held, a["input"])

    def switches(self, running_mean: Any, training: bool) -> bool:
        """Does this norm use batch statistics in train mode and running ones in eval mode?"""
        if running_mean is None or training:
            return True  # nothing to switch: `functional_norm` keeps it as it is
        return self.seen is None or self.seen.norms.get(id(running_mean), True)

    def functional_norm(self, node: fx.Node, a: dict[str, Any]) -> fx.Node | None:
        if a["training"]:
            return None
        again = isinstance(self.owners.get(self.where(node)), FunctionalBatchNorm)
        path = self.where(node) if again else self.fresh(node, "batch_norm")
        self.modules[path] = FunctionalBatchNorm(a["momentum"], a["eps"])
        self.modules[path].training = self.mode(self.where(node))
        operands = [a[k] for k in ("input", "weight", "bias", "running_mean", "running_var")]
        return self.graph.call_module(path, map_arg(tuple(operands), self.value_of))

    def instance_norm(self, node: fx.Node) -> fx.Node | None:
        a = arguments(node)
        tensors = {k: self.tensor(a[k]) for k in ("weight", "bias", "running_mean", "running_var")}
        held = {k: v[1] if v else None for k, v in tensors.items()}
        path, some = self.owner(node, held), next((v for v in held.values() if v is not None), None)
        tracked = held["running_mean"] is not None
        if some is None or path is None or (not tracked and not isinstance(some, nn.Parameter)):
            return None
        options = {"num_features": some.numel(), "eps": a["eps"], "momentum": a["momentum"]}
        options |= {"affine": held["weight"] is not None, "track_running_stats": tracked}
        if tracked:
            held["num_batches_tracked"] = getattr(self.owners[path], "num_batches_tracked", None)
        return self.call(path, _INSTANCE_NORMS[_rank(a["input"])], options, held, a["input"])

    def dropout(self, node: fx.Node, name: str) -> fx.Node | None:
        a = arguments(node)
        if a["train"]:
            return None  # always on, whatever the mode (Monte Carlo dropout)
        here = self.where(node)
        owned = isinstance(self.owners.get(here), nn.modules.dropout._DropoutNd)
        path = here if owned else self.fresh(node, "dropout")
        if path not in self.modules:
            self.modules[path] = DROPOUTS[name](a["p"], inplace=mutates(node.target))
            self.modules[path].training = self.mode(here)
        return self.graph.call_module(path, (self.value_of(operand(node)),))

    def mode(self, path: str) -> bool:
        return self.users[path].training if path in self.users else self.model.training

    def fresh(self, node: fx.Node, word: str) -> str:
        """A path below the user's layer that nothing has yet."""
        here = self.where(node)
        path = f"{here}.{word}" if here else word
        names = (path if i == 0 else f"{path}_{i}" for i in range(len(self.modules) + len(self.owners) + 1))
        return next(n for n in names if n not in self.modules and _follow(self.private, n) is None)

    def call(
        self, path: str, kind: type[nn.Module], options: dict[str, Any], held: dict[str, Any], data: Any
    ) -> fx.Node | None:
        """A call of the one module of this kind, options and tensors; None where its path holds another."""
        key = (path, kind, tuple(options.items()), *map(id, held.values()))
        if key not in self.by_key:
            if path in self.modules:
                return None
            module = kind(**options) if kind is nn.PReLU else kind(**options, device="meta")
            for name, tensor in held.items():
                setattr(module, name, tensor)
            module.training = self.mode(path)
            self.modules[path] = module
            self.by_key[key] = path
        return self.graph.call_module(path, (self.value_of(data),))


def mark_view_writes(graph: fx.Graph) -> None:
    """Set ``meta["writes_view"]`` on nodes that overwrite storage which another value, read later, shares."""
    order, family = {node: i for i, node in enumerate(graph.nodes)}, sharing(graph)
    for node in graph.nodes:
        for value, is_result in written(node):
            others = (m for m in family[value] if m is not node and order[m] < order[node])
            late = any(order[user] > order[node] for m in others for user in m.users)
            if late or not is_result:
                node.meta["writes_view"] = True


def _follow(root: Any, path: str) -> Any:
    for part in path.split("."):
        root = getattr(root, part, None)
    return root


def _rank(node: Any) -> int:
    return node.meta["val"].dim()


def drop_assertions(body: nn.Module) -> None:
    """Remove checks of types and sizes that torch.export adds: a graph may be moved to another type later."""
    for module in body.modules():
        if not isinstance(module, fx.GraphModule):
            continue
        for node in [n for n in module.graph.nodes if n.op == "call_function" and not n.users]:
            if _is_assertion(node.target):
                module.graph.erase_node(node)
        module.recompile()


def _is_assertion(target: Any) -> bool:
    name = getattr(target, "__name__", "") or str(target)
    return "assert" in name or "sym_constrain" in name or name.startswith("check_")


@cache
def foreign_folders() -> tuple[str, ...]:
    """Folders whose source lines are not the user's: torch's and splitfx's own."""
    found = (Path(f) for f in (torch.__file__, __file__))
    return tuple(f"{folder}/" for f in found for folder in (f.parent, f.resolve().parent))  # a venv may be a link


def source_line(stack_trace: str) -> str:
    """``package/file.py:line`` of the user's innermost frame in the text of a stack trace."""
    frames = re.findall(r'File "([^"]+)", line (\d+)', stack_trace)
    users = [f for f in frames if not f[0].startswith(foreign_folders())]
    return "" if not users else "/".join(Path(users[-1][0]).parts[-2:]) + f":{users[-1][1]}"
