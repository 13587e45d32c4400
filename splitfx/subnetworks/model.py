"""The result of `SubNetworks`: a graph that is the base model, and gives its sub-models.

`splitfx.ir.graph.dress` gives a graph with entries the methods of `SubNetworksGraph`; copies keep them, and tracing and
loading put them back. Nothing is stored twice: a sub-model is made from the graph as it is, when it is asked for,
over the same parameters and buffers.
"""

from __future__ import annotations

import copy as copying
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from splitfx.errors import UnsupportedError
from splitfx.frontend.called import CanonicalGraph
from splitfx.ir.graph import (
    INFO,
    attribute,
    dressed,
    info,
    inputs_as_now,
    resolve,
    restore_aliases,
    set_path,
)
from splitfx.ir.schema import mutates
from splitfx.ir.walks import descendants, reached
from splitfx.subnetworks.entry import Entry, entries

if TYPE_CHECKING:
    from splitfx.subnetworks.choose import Figures


class SubNetworksGraph(CanonicalGraph):
    """The base model as an ordinary GraphModule, and its sub-models.

    ``forward(x)``: the base model. ``forward_all(x)``: the outputs of all, the base model's first. ``detach(i)``: one
    sub-model. ``select(...)``: the largest that fits.
    """

    def forward_all(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """The outputs of the base model and of every sub-model on one batch, in the mode that this module is in."""
        return (self(*args, **kwargs), *(run(self, *args, **kwargs) for run in _runs(self)))

    def forward_one(self, number: int, *args: Any, **kwargs: Any) -> Any:
        """The output of one model: -1 is the base model, 0 the first sub-model."""
        return self(*args, **kwargs) if number == -1 else _runs(self)[_checked(self, number)](self, *args, **kwargs)

    def detach(self, number: int, copy: bool = False) -> fx.GraphModule:
        """Sub-model ``number``, from 0, as an ordinary GraphModule.

        It holds the very parameters and buffers of this one: training one moves the other, and so does moving one to
        another device or type. Only where forward itself reads some buffers of a module, and this sub-model not all of
        them, must it be detached anew after such a move. ``copy``: its own instead. Train and eval mode are its own in
        any case. Raises `UnsupportedError` for a number that there is not.
        """
        made = detached(self, _checked(self, number))
        return copying.deepcopy(made) if copy else made

    def base(self, copy: bool = False) -> fx.GraphModule:
        """The base model without step-down convolutions; as `detach` otherwise."""
        made = detached(self, -1)
        return copying.deepcopy(made) if copy else made

    @property
    def names(self) -> tuple[str, ...]:
        """``base``, ``sub0``, ``sub1`` …, in the order of `forward_all`."""
        return ("base", *(f"sub{number}" for number in range(len(entries(self)))))

    def figures(self, runs: int = 0) -> Figures:
        """MACs, operations, parameters, peak and, with ``runs`` timed calls, median seconds of every model at the
        traced size, the base model's first; ``str()`` is a table. Counted once, measured anew at every call."""
        from splitfx.subnetworks.choose import figures, remembered

        return figures(self, runs) if runs else remembered(self, timed=False)

    def select(
        self, max_macs: float | None = None, max_latency: float | None = None, max_peak: float | str | None = None
    ) -> fx.GraphModule:
        """The model with the most MACs within all limits, as `base` and `detach` give it.

        ``max_latency`` in seconds, measured here at the traced size when it is first asked for; ``max_peak`` in bytes,
        or as in "8 MiB". Raises `UnsupportedError`, with the nearest, where no model fits.
        """
        from splitfx.subnetworks.choose import select

        return select(self, max_macs, max_latency, max_peak)


Entry.graph_class = SubNetworksGraph


def _checked(graph: fx.GraphModule, number: int) -> int:
    count = len(entries(graph))
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < count:
        known = f"0 to {count - 1}" if count > 1 else "0 only" if count else "none"
        raise UnsupportedError(
            f"there is no sub-model {number!r}; this model's are numbered {known}, and base() is the base model"
        )
    return number


# ---------------------------------------------------------------- a sub-model's graph


@dataclass(frozen=True)
class _Part:
    """The nodes of one model. ``homes``: where the module of a node lies in the whole graph, by the node."""

    graph: fx.Graph
    homes: dict[fx.Node, str]


def _part(split: fx.GraphModule, number: int) -> _Part:
    """The base model's nodes (-1), or a sub-model's: those that the output needs when the step-down takes the place of
    everything in front of its entry. Other entries fall away."""
    known = entries(split)
    node, entry = known[number] if number >= 0 else (None, None)
    others = {n for n, _ in known if n is not node}
    nodes = list(split.graph.nodes)
    images = [n for n in nodes if n.op == "placeholder"]
    image = images[entry.reads] if entry is not None else None
    needed = _needed(nodes, node, image)
    made, env, homes = fx.Graph(owning_module=split), dict[fx.Node, fx.Node](), dict[fx.Node, str]()
    for old in nodes:
        if old in others and old in needed:
            env[old] = env[old.all_input_nodes[0]]
        elif old is node and entry is not None and image is not None:
            env[old] = _inlined(made, entry, str(old.target), env[image], homes)
        elif old in needed or old.op == "placeholder":
            env[old] = made.node_copy(old, lambda n: env[n])
            if old.op == "call_module":
                homes[env[old]] = _home(entry, str(node.target) if node is not None else "", str(old.target))
            elif old.op == "get_attr":
                homes[env[old]] = str(old.target)
    made.set_codegen(split.graph._codegen)
    made.owning_module = None
    if entry is not None:
        _all_private(split, entry, made)
    return _Part(made, homes)


def _needed(nodes: list[fx.Node], cut: fx.Node | None, image: fx.Node | None) -> set[fx.Node]:
    """What the output needs, and what writes in place behind the cut; switches of gradients stay."""
    behind = set() if cut is None else set(descendants([cut]))
    kept = lambda n: mutates(n.target) and n.op == "call_function" and (cut is None or n in behind)  # noqa: E731
    switch = lambda n: n.op == "call_function" and n.target is torch._C._set_grad_enabled  # noqa: E731
    reads = lambda n: [image] if n is cut and image is not None else n.all_input_nodes  # noqa: E731
    return set(reached((n for n in nodes if n.op == "output" or kept(n) or switch(n)), reads))


def _inlined(made: fx.Graph, entry: Entry, path: str, image: fx.Node, homes: dict[fx.Node, str]) -> fx.Node:
    """The nodes of the step-down; they are named in the whole graph by the entry's path."""
    env: dict[fx.Node, fx.Node] = {}
    for old in entry.step_down.graph.nodes:
        if old.op == "placeholder":
            env[old] = image
        elif old.op == "output":
            return env[old.args[0]]
        else:
            env[old] = new = made.node_copy(old, lambda n: env[n])
            if old.op in ("call_module", "get_attr"):
                new.target = f"step_down.{old.target}"
                homes[new] = f"{path}.step_down.{old.target}"
                new.meta = {**new.meta, "layer": new.target}
    raise AssertionError("a step-down has an output")


def _home(entry: Entry | None, path: str, target: str) -> str:
    """Where a layer lies in the whole graph: a norm with statistics of the sub-model's own lies in the entry."""
    own = entry.private.get(target) if entry is not None else None
    return target if own is None else f"{path}.norms.{own}"


def _all_private(split: fx.GraphModule, entry: Entry, made: fx.Graph) -> None:
    """Refuse where a later pass has removed or replaced a norm of which the sub-model has statistics of its own."""
    called = {str(n.target) for n in made.nodes if n.op == "call_module"}
    gone = [path for path in entry.private if path not in called]
    for path in called & entry.private.keys():
        norm: Any = split.get_submodule(path)
        own: Any = entry.norms[entry.private[path]]
        gone += [] if _one_weight(norm.weight, own.weight) else [path]
    if gone:
        raise UnsupportedError(
            f"sub{entry.number} has statistics of its own for {gone[0]}, which a later pass has replaced: run "
            "that pass before 'subnetworks', or on what detach gives"
        )


def _one_weight(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    """A move to the meta device parts modules that share a parameter; there is nothing to tell them apart by there."""
    return one is other or (one is not None and other is not None and one.is_meta and other.is_meta)


def _runs(split: fx.GraphModule) -> list[Callable[..., Any]]:
    """Each sub-model's forward as a function of the whole graph, which holds its layers; compiled once."""
    kept = vars(split).get(_KEPT)
    if kept is None or kept.code is not split._code:
        kept = vars(split)[_KEPT] = _Runs(split._code, [_run(split, i) for i in range(len(entries(split)))])
    return kept.functions


_KEPT = "_splitfx_runs"


@dataclass(frozen=True)
class _Runs:
    code: str
    functions: list[Callable[..., Any]]

    def __reduce__(self) -> tuple[Any, ...]:  # a copy of the graph compiles its own
        return _forgotten, ()


def _forgotten() -> None:
    """What a copy of a graph has in place of the functions."""


def _run(split: fx.GraphModule, number: int) -> Callable[..., Any]:
    part = _part(split, number)
    for node, home in part.homes.items():
        node.target = home
    python = part.graph.python_code(root_module="self")
    space = dict(python.globals)
    exec(compile(python.src, f"<sub{number}>", "exec"), space)  # fx compiles a graph's forward in the same way
    return space["forward"]


def detached(split: fx.GraphModule, number: int) -> fx.GraphModule:
    """A sub-model, or the base model (-1), as a graph of its own over the same tensors."""
    part = _part(split, number)
    root, twins = nn.Module(), dict[str, nn.Module]()
    for node, home in part.homes.items():
        path = str(node.target)
        if node.op == "call_module":
            twins[home] = twins.get(home) or twin(split.get_submodule(home))
            set_path(root, path, twins[home])
        else:
            set_path(root, path, attribute(split, home), persistent=not node.meta.get("transient"))
    known = info(split)
    name = f"{known.model_class}_{'base' if number < 0 else f'sub{number}'}"
    made = CanonicalGraph(root, part.graph, name)
    own = {one for each in twins.values() for one in each.modules()}
    for module in made.modules():
        module.training = module.training if module in own else split.training
    alive = {a: p for a, p in known.aliases.items() if _resolves(made, p)}
    made.meta[INFO] = replace(known, model_class=name, aliases=alive, steps=list(known.steps), plan=None)
    restore_aliases(made)
    dressed(made)
    _one_table(split, made, part.homes)
    made.graph.lint()
    return inputs_as_now(made)


def _one_table(split: fx.GraphModule, made: fx.GraphModule, homes: dict[fx.Node, str]) -> None:
    """What the graph reads by itself lies in one table for both, as with `twin`: a conversion puts other tensors in
    the place of buffers, which a table of its own would not see. Not where the whole's table holds more than the
    sub-model reads, since that would come into its state_dict."""
    for node, home in homes.items():
        if node.op != "get_attr":
            continue
        mine = made.get_submodule(str(node.target).rpartition(".")[0])
        theirs = split.get_submodule(home.rpartition(".")[0])
        for name in ("_parameters", "_buffers"):
            own, whole = vars(mine)[name], vars(theirs)[name]
            if own and own.keys() == whole.keys() and all(own[key] is whole[key] for key in own):
                vars(mine)[name] = whole


def _resolves(graph: nn.Module, path: str) -> bool:
    try:
        return isinstance(resolve(graph, path), nn.Module | torch.Tensor)
    except AttributeError:
        return False


def twin(module: nn.Module) -> nn.Module:
    """The module anew, over the very tables of parameters and buffers: what is put there is seen by both."""
    memo: dict[int, Any] = {id(t): t for ts in (module.parameters(), module.buffers()) for t in ts}
    made = copying.deepcopy(module, memo)
    for path, one in made.named_modules():
        origin = module.get_submodule(path)
        vars(one)["_parameters"], vars(one)["_buffers"] = origin._parameters, origin._buffers
    return made
