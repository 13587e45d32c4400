"""Kernels: one piece of one value computed from pieces of its operands, exactly as the whole would be.

Padding is real only where a piece lies at the border of the map. Divisors of average pools, coordinates of resizes and
windows of adaptive pools come from the positions in the whole map.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import fx

from splitfx.ir.graph import attribute, module_of
from splitfx.ir.ops import Spatial, bind, is_size, op_name, out_of_place
from splitfx.ir.ops.families.norms import applied
from splitfx.ir.ops.families.products import softened
from splitfx.ir.ops.pieces import Call, Pieces
from splitfx.tiling.plan.instructions import Run
from splitfx.tiling.stage.kernel import Kernel, Stage, overwriting
from splitfx.tiling.stage.roles import Kind


def _with_column(call: Call) -> Call:
    """Pieces of sequences as those of maps with a single column."""

    def called(run: Run, pieces: Pieces, wholes: Pieces) -> torch.Tensor:
        given = [[x.unsqueeze(3) if x.dim() == 3 else x for x in some] for some in (pieces, wholes)]
        return call(run, *given).squeeze(3)

    return called


class Calls:
    """For every kernel of a stage the function that computes a piece of it: ``call(run, pieces, wholes)``."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self._known: dict[Kernel, Call] = {}

    def __getitem__(self, kernel: Kernel) -> Call:
        if kernel not in self._known:
            self._known[kernel] = self._made(kernel)
        return self._known[kernel]

    def _made(self, kernel: Kernel) -> Call:
        if kernel.node.op == "get_attr":
            graph, path = self.stage.graph, str(kernel.node.target)
            return lambda run, pieces, wholes: attribute(graph, path)
        by_hand = self._by_hand(kernel)
        if by_hand is None:
            return self._plain(kernel)
        value = self.stage.values[kernel.node]
        dtype = (value[0] if isinstance(value, list | tuple) else value).dtype
        # Under autocast the operation itself would cast here.
        return lambda run, pieces, wholes: by_hand(run, [piece.to(dtype) for piece in pieces], wholes)

    def _by_hand(self, kernel: Kernel) -> Call | None:
        """For what cannot be called on pieces as it is."""
        job = replace(kernel.job, argument=partial(self._argument, kernel))
        if kernel.role == "apply":
            place = next(i for i, k in enumerate(kernel.takes) if k.role == "statistics")
            return (softened if kernel.row.reduces == "exponentials" else applied)(job, place)
        if kernel.kind is Kind.WHOLE or kernel.row.piece is None:
            return None
        found = kernel.row.piece(job)
        spatial = kernel.spatial in (Spatial.WINDOW, Spatial.RESIZE, Spatial.PAD)
        return _with_column(found) if spatial and job.values[kernel.node].dim() == 3 else found

    # ------------------------------------------------------------ operands

    def _resolver(self, kernel: Kernel, value: Any) -> Callable[[Pieces, Pieces], Any]:
        """How an argument of the node is found among pieces, whole values, parameters and constants."""
        if isinstance(value, list | tuple) and any(isinstance(v, fx.Node) for v in value):
            parts, kind = [self._resolver(kernel, v) for v in value], type(value)
            return lambda pieces, wholes: kind(part(pieces, wholes) for part in parts)
        if not isinstance(value, fx.Node):
            return lambda pieces, wholes: value
        place = kernel.places.get(value)
        if place is not None:
            return (lambda pieces, wholes: pieces[place]) if place >= 0 else (lambda pieces, wholes: wholes[-1 - place])
        if value.op == "get_attr":
            graph, path = self.stage.graph, str(value.target)
            return lambda pieces, wholes: attribute(graph, path)
        if not is_size(value):
            raise AssertionError(f"{kernel.name} reads {value.name}, which the stage does not hold")
        number = self.stage.values[value]
        return lambda pieces, wholes: number

    def _argument(self, kernel: Kernel, name: str) -> Callable[[Pieces, Pieces], Any]:
        """A module's parameter, looked up at every call because it may be moved or replaced; or an argument."""
        module = module_of(kernel.node)
        if module is not None:
            return lambda pieces, wholes: getattr(module, name)
        return self._resolver(kernel, bind(kernel.node).get(name))

    def _plain(self, kernel: Kernel) -> Call:
        node, module = kernel.node, module_of(kernel.node)
        arguments = [self._resolver(kernel, a) for a in node.args]
        options = {k: self._resolver(kernel, v) for k, v in node.kwargs.items()}
        target: Any = module if module is not None else out_of_place(node.target)
        # A piece in the operand's memory is copied: it would keep a larger one alive, or be overwritten with it.
        over, copies = overwriting(node), kernel.row.result.may_share and kernel.kind is not Kind.WHOLE
        converts = op_name(node) == "to"  # which copies by itself, but for a type that the operand has already
        # Of a sum or a product of two, either may be overwritten.
        second = (
            kernel.places.get(node.args[1], -1) if len(node.args) == 2 and isinstance(node.args[1], fx.Node) else -1
        )

        def call(run: Run, pieces: Pieces, wholes: Pieces) -> torch.Tensor:
            given = [a(pieces, wholes) for a in arguments]
            if run.over >= 0 and over is not None:
                if second >= 0 and run.srcs[second] == run.over:
                    given = [given[1], given[0]]
                return over(*given, **{k: v(pieces, wholes) for k, v in options.items()})
            found = target(*given, **{k: v(pieces, wholes) for k, v in options.items()})
            same = copies and (not converts or found.dtype == given[0].dtype)
            return found.clone(memory_format=torch.contiguous_format) if same else found

        return call
