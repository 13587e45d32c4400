"""A network whose stages are divided among the ranks: the graph that every rank runs, and where its inputs come from
and its results go."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.graph import CodeGen
from torch.fx.node import map_arg

from splitfx.analysis import facts
from splitfx.analysis.regions import Regions
from splitfx.analysis.shapes import shapes
from splitfx.errors import UnsupportedError
from splitfx.ground.exclusive import autocasts
from splitfx.ir.graph import TensorSpec, copy_graph, inputs_as_now, layer, module_of, output_node, set_path
from splitfx.ir.ops import is_size, op_name
from splitfx.parallel.shard.execution import Share
from splitfx.parallel.shard.shares import Division
from splitfx.parallel.shard.stage import Gather, Rows, Sharded
from splitfx.parallel.shard.tape import Job
from splitfx.splitnet.arguments import arguments_of, bound
from splitfx.tiling.plan.instructions import Schedule
from splitfx.tiling.run.executor import Tiled
from splitfx.tiling.run.install import install
from splitfx.tiling.stage.extract import stages
from splitfx.tiling.stage.roles import draws

ROW_DIM = 2  # of an input that is a map: N, C, rows


class Network:
    """``graph``: what a rank runs, flat inputs to flat results; ``tiled``: the same with whole stages, for sizes.
    ``divided``: the inputs, by number, of which each rank gives rows alone."""

    def __init__(self, graph: fx.GraphModule, job: Job, division: Division, gather: Gather, apart: bool) -> None:
        self.job, self.tiled = job, _on(graph, job.link.device)
        self.parameters = list(self.tiled.parameters())  # in the order of the model: stages move them
        _tile(self.tiled)
        self._arguments = arguments_of(self.tiled)
        inputs = [n for n in self.tiled.graph.nodes if n.op == "placeholder"]
        self._calls = [n for n in self.tiled.graph.nodes if isinstance(module_of(n), Tiled)]
        if not self._calls:
            raise UnsupportedError("no layer of this model works on rows of a map: there is nothing to divide")
        self.divided = tuple(i for i, node in enumerate(inputs) if apart and _is_map(node, self.tiled))
        if apart and not self.divided:
            raise UnsupportedError("given='rows': no input of this model is a map that is divided")
        self._results = list(output_node(self.tiled).all_input_nodes)
        self._returned, self._process = output_node(self.tiled).args[0], self.tiled.graph.process_outputs
        self.graph = copy_graph(self.tiled, share=True)
        self.stages: dict[fx.Node, Sharded] = {}  # by the call in ``tiled``
        for call in self._calls:
            given = {p: i for p, n in enumerate(call.args) for i in self.divided if n is inputs[i]}
            direct = {int(n.args[1]) for n in call.users if set(n.users) == {output_node(self.tiled)}}  # type: ignore[arg-type]
            whole: Any = self.graph.get_submodule(str(call.target))
            self.stages[call] = Sharded(whole, job, division, given, direct, gather)
            set_path(self.graph, str(call.target), self.stages[call])
        output = output_node(self.graph)
        output.args = (list(output.all_input_nodes),)
        self.graph.graph.set_codegen(CodeGen())
        self.graph.recompile()

    def values(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """The inputs, one for each placeholder. Raises `UnsupportedError` where they are others than it takes."""
        try:
            return bound(self._arguments, args, kwargs)
        except ValueError as error:
            raise UnsupportedError(str(error)) from None

    def returned(self, results: Sequence[Any]) -> Any:
        """What the model returns, from its results."""
        found = dict(zip(self._results, results, strict=True))
        return self._process(map_arg(self._returned, found.__getitem__))

    def apart(self) -> list[bool]:
        """Of each result of the last call: whether its gradient on a rank is that of the rank's rows."""
        return [s is not None and s[0].lies_apart(s[0].called, s[1]) for s in map(self._given_by, self._results)]

    def rows(self) -> tuple[Rows | None, ...]:
        """Of each result of the last call: the rows that this rank has got."""
        found = map(self._given_by, self._results)
        return tuple(None if s is None else s[0].rows_of(s[0].called, s[1]) for s in found)

    def _given_by(self, node: fx.Node) -> tuple[Sharded, int] | None:
        """The stage of which a node is a result, and which."""
        source = node.all_input_nodes[0] if node.all_input_nodes else None
        return (self.stages[source], int(node.args[1])) if source in self.stages else None  # type: ignore[arg-type, index]

    def planned(self, specs: Sequence[Any], wanting: set[int] | None) -> Iterator[tuple[Sharded, Share]]:
        """Each stage with what this rank does in it, for whole inputs of these sizes. ``wanting``: the inputs that want
        gradients; None: nothing does."""
        known = shapes(self.tiled, tuple(specs), autocasts())
        numbers = {n: i for i, n in enumerate(n for n in self.tiled.graph.nodes if n.op == "placeholder")}
        for call, stage in self.stages.items():
            values = [known[n] for n in call.args]  # type: ignore[index]
            given = [TensorSpec(tuple(map(int, v.shape)), v.dtype, str(v.device)) for v in values]
            rows = {p: self.counts(stage.division, given[p].shape[ROW_DIM]) for p in stage.inputs}
            grads = None if wanting is None else tuple(numbers.get(n, -1) in wanting | {-1} for n in call.args)  # type: ignore[arg-type]
            stage.called = stage.share(given, rows, grads)
            yield stage, stage.called

    def counts(self, division: Division, rows: int) -> list[int]:
        return [high - low for low, high in (division.own(rows, r) for r in range(division.ranks))]


def _on(graph: fx.GraphModule, device: torch.device) -> fx.GraphModule:
    """A copy on the device, which shares its tensors with the graph where they are there."""
    there = all(t.device == device for t in (*graph.parameters(), *graph.buffers()))
    return inputs_as_now(copy_graph(graph, share=True) if there else copy_graph(graph).to(device))


def _tile(graph: fx.GraphModule) -> None:
    """Make every stage one module, in place. Raises `UnsupportedError` where something is random."""
    for node in graph.graph.nodes:
        if draws(node):
            raise UnsupportedError(f"layer {layer(node)} ({op_name(node)}) is random: ranks would draw other numbers")
    found, _ = stages(graph, facts(graph).regions)
    for nodes in found:
        install(graph, nodes, Schedule(), "stage")
    graph.recompile()


def _is_map(node: fx.Node, graph: fx.GraphModule) -> bool:
    """An input of which stages read rows. Raises `UnsupportedError` where something else reads it too."""
    calls = [user for user in node.users if isinstance(module_of(user), Tiled)]
    if not any(_reads_rows(call, node, graph) for call in calls):
        return False
    for user in node.users:
        alike = is_size(user) and len(user.args) > 1 and user.args[1] != ROW_DIM
        if not alike and (user not in calls or not _reads_rows(user, node, graph)):
            raise UnsupportedError(
                f"given='rows': layer {layer(user)} ({op_name(user)}) reads input {node.name} whole: give it whole"
            )
    return True


def _reads_rows(call: fx.Node, node: fx.Node, graph: fx.GraphModule) -> bool:
    known, stage = shapes(graph), module_of(call).stage  # type: ignore[union-attr]
    specs = [TensorSpec(tuple(map(int, known[n].shape)), known[n].dtype, str(known[n].device)) for n in call.args]  # type: ignore[index, union-attr]
    regions = Regions(shapes(stage, tuple(specs)))  # type: ignore[arg-type]
    inside = [n for n in stage.graph.nodes if n.op == "placeholder"]  # type: ignore[union-attr]
    dims = regions.dims[inside[call.args.index(node)]]
    return dims is not None and dims[0] == ROW_DIM
