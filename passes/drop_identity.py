"""DropIdentity: removes what does nothing, for every input and in train and eval mode alike.

Case 1: nn.Identity, aten.alias, flatten of one dim, padding by nothing. Case 2: dropout and stochastic depth
with p = 0; any p with ``eval_only``. Case 3: a slice over a whole dim, whatever the batch. Case 4: a clone in
the same layout.

Stays, with a note: dropout with p > 0 (without ``eval_only``), what an in-place operation would then
overwrite, what keeps the model from returning its own input. Stays, because it is no identity for other
inputs: a pool that keeps the traced size, a cast (it acts once the model has another type). Promise EQUAL.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import fx, nn

from splitfx.analysis import Facts
from splitfx.analysis.oracle import acts_as_in_eval
from splitfx.analysis.shapes import shape, shapes
from splitfx.compiler.protocol import Note, Outcome, Pass, Promise
from splitfx.errors import UnsupportedError
from splitfx.ir.editing import bypass
from splitfx.ir.graph import TensorSpec, info, layer, module_of
from splitfx.ir.ops import Spatial, bind, in_place, op, op_name, slices_all
from splitfx.ir.schema import may_share
from splitfx.ir.walks import reached

_LEAVES = ("StochasticDepth", "DropPath")  # torchvision's and timm's; p is named in different ways


@dataclass(frozen=True)
class DropIdentity(Pass):
    """Remove operations that are the identity; with ``eval_only`` dropout and stochastic depth of any p too.

    ``eval_only``: dropout and stochastic depth go whatever their p is, and the result no longer drops anything in train
    mode. Raises `UnsupportedError` for it on a model in train mode.
    """

    name: ClassVar[str] = "drop_identity"
    promise: ClassVar[Promise] = Promise.EQUAL
    writes_weights: ClassVar[bool] = False

    eval_only: bool = False

    def run(self, graph: fx.GraphModule, facts: Facts) -> Outcome:
        if self.eval_only and not acts_as_in_eval(graph):
            raise UnsupportedError(
                "pass 'drop_identity' with eval_only needs the model in eval mode: call model.eval() first"
            )
        notes = []
        place = {node: i for i, node in enumerate(graph.graph.nodes)}
        at_other_batch = _Lazy(lambda: _other_batch(graph))
        for node in list(graph.graph.nodes):
            verdict = self.verdict(node, facts, at_other_batch)
            if verdict is None:
                continue
            why = verdict or blocked(node, place)
            if why:
                notes.append(Note(layer(node), f"{_word(node)} stays: {why}", "declined"))
                continue
            notes.append(Note(layer(node), f"{_word(node)} removed"))
            bypass(graph, node)
        return Outcome(tuple(notes) or (Note("model", "holds no identity: nothing to remove", "info"),))

    def verdict(self, node: fx.Node, facts: Facts, at_other_batch: _Lazy) -> str | None:
        """Empty for an identity, a reason for one that is not always one, None for everything else."""
        name = op_name(node)
        if node.op not in ("call_module", "call_function") or not node.args:
            return None
        if name in ("identity", "alias"):
            return ""
        if op(node).drops or type(module_of(node)).__name__ in _LEAVES:
            return self.drops(node)
        known = facts.shapes
        if not isinstance(node.args[0], fx.Node) or not isinstance(known.get(node.args[0]), torch.Tensor):
            return None
        if name == "flatten":
            given, rank = bind(node), len(shape(known[node.args[0]]))
            return "" if rank and given["start_dim"] % rank == given["end_dim"] % rank else None
        if op(node).spatial is Spatial.PAD:
            pads = node.args[1]
            return "" if isinstance(pads, list | tuple) and not any(pads) else None
        if name == "slice":
            return "" if _slices_all(node, known, at_other_batch) else None
        if name == "clone":
            return "" if known[node.args[0]].stride() == known[node].stride() else None
        return None

    def drops(self, node: fx.Node) -> str:
        module = module_of(node)
        given: Any = bind(node) if module is None else vars(module)
        if module is None and given.get("train") is False:
            return ""
        p = next((given[k] for k in ("p", "drop_prob") if k in given), None)
        if p == 0 or self.eval_only:
            return ""
        rate = "" if p is None else f" (p={p})"
        return f"it drops values in train mode{rate}; eval_only=True removes it"


def blocked(node: fx.Node, place: dict[fx.Node, int]) -> str:
    """Why removing an identity would change what else is seen of its storage; empty where it would not."""
    operand = node.args[0]
    assert isinstance(operand, fx.Node)
    shared = _same_storage(node)
    returned = [n for n in shared if any(r.op == "output" for r in n.users)]
    if returned and any(n.op in ("placeholder", "get_attr") for n in shared):
        return "the model would return its own input or parameter"
    if len(returned) > 1:
        return "the model would return one tensor twice"
    later = [n for n in shared if in_place(n) and place[n] > place[node]]
    if not later:
        return ""
    writers = sorted(later, key=lambda n: place[n])
    direct = [n for n in writers if n.args[0] is node]
    # Where autograd keeps no output, an operation in place may take it over.
    alone = len(operand.users) == 1 and len(node.users) == 1 and not op(operand).keeps_output
    if alone and len(direct) == 1 and not in_place(operand) and not in_place(node):
        return ""
    return f"{layer((direct or writers)[0])} works in place and would overwrite {layer(operand)}"


def _same_storage(node: fx.Node) -> set[fx.Node]:
    """What would share storage with ``node`` and its operand if the two were one."""
    near = lambda n: [*may_share(n), *(r for r in n.users if n in may_share(r) or _writes(r, n))]  # noqa: E731
    return set(reached([node, *node.all_input_nodes[:1]], near))


def _writes(reader: fx.Node, node: fx.Node) -> bool:
    return in_place(reader) and bool(reader.args) and reader.args[0] is node


class _Lazy:
    """A value that is computed when it is first asked for."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self.make = make

    def __call__(self) -> Any:
        if not hasattr(self, "value"):
            self.value = self.make()
        return self.value


def _other_batch(graph: fx.GraphModule) -> dict[fx.Node, Any] | None:
    """Sizes with one more image in the batch: what depends on it shows. None where other sizes may vary."""
    known = info(graph)
    if known.dynamic in ("all", "sizes"):
        return None
    if known.dynamic == "none":
        return shapes(graph)
    more = [
        replace(s, shape=(s.shape[0] + 1, *s.shape[1:])) if isinstance(s, TensorSpec) and s.shape else s
        for s in known.inputs
    ]
    return shapes(graph, tuple(more))


def _slices_all(node: fx.Node, known: dict[fx.Node, Any], at_other_batch: _Lazy) -> bool:
    given = bind(node)
    end, dim = given["end"], given["dim"]
    if slices_all(node):
        return True
    if given["start"] not in (None, 0) or given["step"] != 1 or isinstance(end, fx.Node):
        return False
    size = shape(known[given["input"]])[dim]
    other = at_other_batch() if end >= size else None
    return other is not None and shape(other[given["input"]])[dim] == size


def _word(node: fx.Node) -> str:
    module = module_of(node)
    return type(module).__name__ if isinstance(module, nn.Module) else op_name(node)
