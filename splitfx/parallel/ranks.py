"""`Ranks`: one process's share of a carved model, in a job started by ``torchrun``.

Every rank makes the same `Ranks(split)` and calls it with the same inputs. With the stem duplicated only logits cross,
once, at the end; with a stem of its own rank 0 sends what it computed to the ranks of the branches.

Refuses: a model in train mode, more ranks than groups (`UnsupportedError`); ranks that hold different models, a rank
that died or does not answer in time (`ParallelError`, see `splitfx.parallel.link`). Inference only: no gradient
crosses from rank to rank.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import torch
from torch import fx

from splitfx.analysis.fingerprint import fingerprint
from splitfx.analysis.oracle import acts_as_in_eval
from splitfx.errors import UnsupportedError
from splitfx.ground import pages
from splitfx.ir.graph import copy_graph
from splitfx.parallel.link import Link, ParallelError
from splitfx.parallel.placement import Placement, Stem, place
from splitfx.splitnet.tree import STEM, Part, Tree

__all__ = ["ParallelError", "Ranks"]

AHEAD = 2  # batches under way at once where the stem has a rank of its own
Finish = Callable[[], Any]


class Ranks:
    """This process's share of ``split``, the result of a plan with ``SplitNet(lowering="branches")``, in eval mode.

    ``stem``: "duplicate" on every rank, on its "own" (rank 0), or "auto", by estimate (`place`). ``gather``: who gets
    the model's output, the "first" rank (the others get None) or "all". ``timeout``: seconds to wait for another rank.
    ``device``: "cpu", or "cuda" for the GPU of this process's LOCAL_RANK. ``compile``: run the share through
    ``torch.compile``. ``pipelined``: it will be used through `stream`, which counts for "auto". ``keep_pages``: on a
    CPU this process keeps the memory that it frees, see `splitfx.parallel.keep_pages`: processes side by side wait for
    fresh pages otherwise. ``verify``: see `Tree`.

    ``placement`` says who runs what. Close it, or use it as a context manager.
    """

    def __init__(
        self,
        split: fx.GraphModule,
        *,
        stem: Stem = "auto",
        gather: Literal["first", "all"] = "first",
        timeout: float = 60.0,
        device: Literal["cpu", "cuda"] = "cpu",
        compile: bool = False,
        pipelined: bool = False,
        keep_pages: bool = True,
        verify: bool = True,
    ) -> None:
        if gather not in ("first", "all"):
            raise UnsupportedError(f"gather is 'first' or 'all', not {gather!r}")
        if not acts_as_in_eval(split):
            raise UnsupportedError("ranks are for inference: call split.eval() first, and train the model itself")
        self.tree = Tree(split, verify=verify)
        self.link = Link(device, timeout)
        self.rank, self.size = self.link.rank, self.link.size
        try:
            self.placement = place(self.tree, self.size, stem, pipelined)
            self.link.agree(_digest(self.tree, self.placement, gather))
        except Exception:
            self.link.close()
            raise
        if keep_pages and self.link.device.type == "cpu":
            pages.keep_pages()
        self.own = self.placement.stem == "own"
        self.groups = self.placement.groups[self.rank]
        self.receivers = range(self.size) if gather == "all" else range(1)
        self.part = share(self.tree, self.placement, self.rank)
        graph, merge = (self._placed(p.graph) for p in (self.part, self.tree.merge))
        self.compute: Callable[..., list[torch.Tensor]] = torch.compile(graph) if compile else graph
        self.merge: Callable[..., list[torch.Tensor]] = merge

    def _placed(self, graph: fx.GraphModule) -> fx.GraphModule:
        return graph if self.link.device.type == "cpu" else copy_graph(graph).to(self.link.device)

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def close(self) -> None:
        self.link.close()

    # ------------------------------------------------------------ running

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output for one batch; None on a rank that does not receive it.

        All ranks give the same inputs. Raises `ParallelError`.
        """
        with torch.inference_mode():
            return self._begin(args, kwargs)()

    def stream(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The outputs of many batches (a tensor each, or a tuple of inputs), in order; all ranks give the same. A stem
        of its own works on the next batch while the branches work on this one. Raises `ParallelError`."""
        waiting: deque[Finish] = deque()
        ahead = AHEAD if self.own and self.rank == 0 else 1
        for batch in batches:
            args = batch if isinstance(batch, tuple) else (batch,)
            with torch.inference_mode():
                waiting.append(self._begin(args, {}))
                found = [waiting.popleft()()] if len(waiting) == ahead else []
            yield from found
        while waiting:
            with torch.inference_mode():
                found = [waiting.popleft()()]
            yield from found

    def pieces(self, *args: Any, **kwargs: Any) -> list[torch.Tensor]:
        """The logits of this rank's own groups, computed here; nothing crosses. With the stem duplicated."""
        if self.own:
            raise UnsupportedError("a rank computes its logits alone only where the stem is duplicated")
        with torch.inference_mode():
            return self._share(self.tree.given(args, kwargs))

    def exchange(self, pieces: list[torch.Tensor]) -> Any:
        """Send this rank's logits to who gathers them; the model's output there, else None. Raises `ParallelError`."""
        dim, sent = self.tree.dim, []
        joined = [torch.cat(pieces, dim)] if pieces else []
        if pieces:
            sent = [one for r in self.receivers if r != self.rank for one in self.link.send(r, joined, self.own)]
        output = None
        if self.rank in self.receivers:
            held = dict(zip(self._names(self.rank), pieces, strict=True))
            for peer in range(self.size):
                if peer != self.rank and self.placement.groups[peer]:
                    held |= self._received(peer, joined)
            output = self._merged(held)
        self.link.wait(sent)
        return output

    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Finish:
        """Compute this rank's share; what is returned finishes the batch."""
        values = self.tree.given(args, kwargs)
        if not self.own:
            made = self._share(values)
            return lambda: self.exchange(made)
        if self.rank == 0:
            return self._begin_stem(values)
        names = self._sent_to(self.rank)
        values |= dict(zip(names, self.link.receive_announced(0, len(names)) if names else [], strict=True))
        made = self._share(values)
        return lambda: self.exchange(made)

    def _begin_stem(self, values: dict[str, Any]) -> Finish:
        values |= dict(zip(self.part.outputs, self._share(values), strict=True))
        wanted = {peer: self._sent_to(peer) for peer in range(1, self.size)}
        sent = [self.link.send(peer, [values[n] for n in names], True) for peer, names in wanted.items() if names]

        def finish() -> Any:
            output = self.exchange([])
            for one in sent:
                self.link.wait(one)
            return output

        return finish

    def _share(self, values: dict[str, Any]) -> list[torch.Tensor]:
        place = self.link.device
        given = [values[n] for n in self.part.inputs]
        return list(self.compute(*(v.to(place) if isinstance(v, torch.Tensor) else v for v in given)))

    def _sent_to(self, peer: int) -> list[str]:
        """The values of the stem that the branches of a rank read."""
        return [n for n in share(self.tree, self.placement, peer).inputs if n not in self.tree.inputs]

    def _names(self, rank: int) -> list[str]:
        return [self.tree.pieces[g] for g in self.placement.groups[rank]]

    def _received(self, peer: int, own: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        """The logits of another rank's groups."""
        dim = self.tree.dim
        widths = [len(self.tree.classes[g]) for g in self.placement.groups[peer]]
        if self.own:
            joined = self.link.receive_announced(peer, 1)[0]
        else:
            sizes = list(own[0].shape)
            sizes[dim] = sum(widths)
            joined = self.link.receive(peer, own[0].new_empty(sizes))
        return dict(zip(self._names(peer), joined.split(widths, dim), strict=True))

    def _merged(self, held: dict[str, torch.Tensor]) -> Any:
        merge = self.tree.merge
        return self.tree.returned(dict(zip(merge.outputs, self.merge(*(held[n] for n in merge.inputs)), strict=True)))


def share(tree: Tree, placement: Placement, rank: int) -> Part:
    """What a rank computes, as one graph."""
    own = placement.groups[rank]
    if own:
        return tree.program(own, stem=placement.stem == "duplicate")
    return next(p for p in tree.parts if p.name == STEM)


def _digest(tree: Tree, placement: Placement, gather: str) -> str:
    """What has to be the same on all ranks: the parts, who runs them, and every weight."""
    about = repr((placement.stem, placement.groups, gather, tree.classes, tree.pieces))
    return fingerprint(tree.graph, about)
