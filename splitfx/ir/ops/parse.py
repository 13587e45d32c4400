"""The graph of a text that `splitfx.ir.ops.text` writes, or a reader by hand.

Every line is run on tensors without values, which tells the overload that is meant and refuses what does not fit.
"""

from __future__ import annotations

import ast
import operator
import re
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from splitfx.errors import SplitfxError
from splitfx.ir.graph import INFO, TensorSpec, TraceInfo, dressed, set_path
from splitfx.ir.ops.layers import LAYERS
from splitfx.ir.schema import FUNCTIONS

_VALUE = re.compile(r'%(?P<name>\w+) = (?P<call>.+?)(?: "(?P<path>[\w.]+)"(?: \((?P<reads>.*)\))?)?')
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def parse(written: str) -> fx.GraphModule:
    """The graph of a text, in eval mode, with random weights. Raises `SplitfxError` with the line that is no value."""
    reader = _Reader()
    for number, line in enumerate(written.strip().splitlines(), 1):
        try:
            reader.line(line.strip())
        except Exception as error:  # whatever torch says of arguments that do not fit
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise SplitfxError(f"line {number} of the graph, {line.strip()!r}: {reason}") from error
    return reader.finished()


class _Reader:
    def __init__(self) -> None:
        self.root, self.graph, self.mode = nn.Module(), fx.Graph(), FakeTensorMode(allow_non_fake_inputs=True)
        self.nodes: dict[str, fx.Node] = {}
        self.results: dict[fx.Node, Any] = {}
        self.inputs: list[TensorSpec] = []

    def line(self, line: str) -> None:
        if line.startswith("return "):
            self.graph.output(self.value(_expression(line.removeprefix("return "))))
            return
        match = _VALUE.fullmatch(line)
        if match is None or match["name"] in self.nodes:
            raise ValueError("a value has a name of its own, a call, and where it is a layer its path and operands")
        node = self.node(match["name"], _expression(match["call"]), match["path"], match["reads"] or "")
        if node.name != match["name"]:
            raise ValueError(f"{match['name']} is a name of Python's own: choose another")
        node.meta = {"layer": match["path"] or node.name, "source": ""}
        self.nodes[match["name"]] = node

    def node(self, name: str, call: ast.expr, path: str | None, reads: str) -> fx.Node:
        if isinstance(call, ast.Subscript):
            taken = (self.value(call.value), self.value(call.slice))
            return self.called(name, operator.getitem, operator.getitem, (taken, {}))
        word, (args, kwargs) = self.call(call)
        if word == "input":
            self.inputs.append(TensorSpec(args, **kwargs))
            return self.held("placeholder", name, name, torch.empty(args, device="meta", **kwargs))
        if path is None:
            target = FUNCTIONS[word] if word in FUNCTIONS else self.overload(word, (args, kwargs))
            return self.called(name, target, target, (args, kwargs))
        if word in ("parameter", "buffer"):
            tensor = torch.zeros(args, **kwargs) if kwargs else torch.randn(args)
            set_path(self.root, path, nn.Parameter(tensor) if word == "parameter" else tensor)
            return self.held("get_attr", name, path, tensor)
        if word not in LAYERS:
            raise ValueError(f"there is no layer {word}; known: {', '.join(sorted(LAYERS))}")
        layer = LAYERS[word](*args, **kwargs).eval()
        set_path(self.root, path, layer)
        return self.called(name, path, layer, self.call(_expression(f"layer({reads})"))[1])

    def held(self, kind: str, name: str, target: str, tensor: torch.Tensor) -> fx.Node:
        node = self.graph.create_node(kind, target, name=name)
        with self.mode:
            self.results[node] = torch.empty(tensor.shape, dtype=tensor.dtype)
        return node

    def called(self, name: str, target: Any, function: Any, arguments: Arguments) -> fx.Node:
        """The node of a call; a layer's target is its path."""
        with self.mode, torch.no_grad():
            args, kwargs = self.without_values(arguments)
            result = function(*args, **kwargs)
        kind = "call_module" if isinstance(target, str) else "call_function"
        node = self.graph.create_node(kind, target, *arguments, name=name)
        self.results[node] = result
        return node

    def overload(self, word: str, arguments: Arguments) -> Any:
        """The overload of an operator that torch itself would take for these arguments."""
        library, _, name = word.removesuffix(".vec").rpartition(".")
        packet = getattr(getattr(torch.ops, library or "aten"), name)
        if word.endswith(".vec"):
            return packet.vec
        args, kwargs = self.without_values(arguments)
        return getattr(packet, torch._C._jit_resolve_packet(packet._qualified_op_name, *args, **kwargs))

    def without_values(self, arguments: Arguments) -> Arguments:
        return map_arg(arguments, lambda node: self.results[node])

    def call(self, call: ast.expr) -> tuple[str, Arguments]:
        """What is called, and its arguments."""
        if not isinstance(call, ast.Call):
            raise ValueError("nothing is called")
        args = tuple(self.value(one) for one in call.args)
        return ast.unparse(call.func), (args, {str(one.arg): self.value(one.value) for one in call.keywords})

    def value(self, written: ast.expr) -> Any:
        if isinstance(written, ast.List | ast.Tuple):
            return [self.value(one) for one in written.elts]
        if isinstance(written, ast.Dict):
            return {
                self.value(key): self.value(one) for key, one in zip(written.keys, written.values, strict=True) if key
            }
        words = ast.unparse(written)
        if isinstance(written, ast.Name):
            if words.removeprefix(_MARK) not in self.nodes:
                raise ValueError(f"it reads %{words.removeprefix(_MARK)}, which is made nowhere before")
            return self.nodes[words.removeprefix(_MARK)]
        if words.startswith("torch."):
            return getattr(torch, words.removeprefix("torch."))
        if words.startswith("float("):
            return float(words[7:-2])
        return ast.literal_eval(written)

    def finished(self) -> fx.GraphModule:
        if not any(node.op == "output" for node in self.graph.nodes):
            raise SplitfxError("the graph returns nothing: end it with 'return %name'")
        self.graph.lint()
        graph = fx.GraphModule(self.root, self.graph, "Written").eval()
        spec = pytree.tree_flatten((tuple(self.inputs), {}))[1]
        graph.meta[INFO] = TraceInfo(tuple(self.inputs), spec, "Written", "text")
        return dressed(graph)


_MARK = "value_"


def _expression(words: str) -> ast.expr:
    """Python's own grammar, in which a value's name has no percent sign."""
    return ast.parse(words.replace("%", _MARK), mode="eval").body
