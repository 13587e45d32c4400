"""Where a sub-model can enter: cuts whose one tensor is a map (or the tokens of a token model) with work behind it.

A site is named by the first layer that is kept: the cut lies at that layer's input, and what lies between it and the
last convolution (norm, activation, pool) goes with the removed part. Refused (`PlanError`), with the tensors that
cross: a place inside a residual block or across a skip; a place behind the head; a name or number that there is not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from splitfx.analysis import Facts
from splitfx.analysis.shapes import shape
from splitfx.errors import PlanError, nearest
from splitfx.ground.table import dims
from splitfx.ir.graph import layer
from splitfx.ir.ops import is_size, op
from splitfx.ir.walks import ancestors, descendants
from splitfx.subnetworks.trunk import Spread, spreads


@dataclass(frozen=True)
class Site:
    """``cut``: the node whose value is replaced. ``enters``: the first layer kept, by which the site is found again.
    ``dropped``: convolutions in front. ``embedding``: for tokens, the cut at which the model's own embedding ends."""

    cut: fx.Node
    enters: str
    dropped: int
    embedding: fx.Node | None = None


class Sites:
    """The sites of a graph, in order. ``why``: the reason where it has none; ``unfit``: where it can have none."""

    def __init__(self, facts: Facts) -> None:
        self.facts, self.values = facts, facts.shapes
        self.nodes = list(facts.graph.graph.nodes)
        self.place = {node: i for i, node in enumerate(self.nodes)}
        self.convs = [n for n in self.nodes if op(n).convolves]
        self.data = self._data()
        self.spread: dict[fx.Node, Spread] = {}
        self.why = self.unfit = self._unfit()
        self.cuts = [] if self.unfit else facts.cuts
        if not self.unfit:
            self.spread = spreads(facts, self.image)
        self.embedding = self._embedding()
        self.found = [self._site(cut, reader) for cut, reader in self._places()]
        if not self.unfit and not self.found:
            self.why = "no single tensor carries a map from its input to its output: there is no cut"

    # ------------------------------------------------------------ what is asked for

    def resolve(self, word: int | str) -> Site:
        """The site of a cut as the user writes it. Raises `PlanError`."""
        if self.unfit:
            raise PlanError(f"pass 'subnetworks': cannot cut at {word!r}: {self.unfit}")
        return self._by_count(word) if isinstance(word, int) else self._by_name(word)

    def _by_count(self, count: int) -> Site:
        if not 1 <= count < len(self.convs):
            raise PlanError(
                f"pass 'subnetworks': cannot drop {count} convs: the model has {len(self.convs)}, and a sub-model "
                f"keeps at least one{self._counts()}"
            )
        return self._at(self.convs[count], f"behind {count} convs", self._counts())

    def _by_name(self, name: str) -> Site:
        reader = self._named(name)
        if reader is None:
            known = dict.fromkeys(layer(n) for n in self.nodes if n in self.data)
            raise PlanError(f"pass 'subnetworks': there is no layer {name!r}.{nearest(name, known)}{self._names()}")
        return self._at(reader, f"at {name!r}", self._names())

    def _named(self, name: str) -> fx.Node | None:
        """The layer of that path, else the first node of the user's module of that path, else the node of that name."""
        known = [n for n in self.nodes if n in self.data and n.op in ("call_module", "call_function")]
        exact = (n for n in known if n.op == "call_module" and str(n.target) == name)
        under = (n for n in known if layer(n) == name or layer(n).startswith(f"{name}."))
        by_node = (n for n in known if n.name == name)
        return next(exact, None) or next(under, None) or next(by_node, None)

    def _at(self, reader: fx.Node, where: str, known: str) -> Site:
        crossing = self._crossing(reader)
        if any(n.op == "placeholder" for n in crossing) and len(crossing) == 1:
            raise PlanError(f"pass 'subnetworks': cannot cut {where}: no layer lies in front of it{known}")
        if len(crossing) != 1 or crossing[0] not in self.cuts:
            listed = ", ".join(f"{layer(n)} [{dims(shape(self.values[n])[1:])}]" for n in crossing)
            raise PlanError(
                f"pass 'subnetworks': cannot cut {where}: {len(crossing)} tensors cross there ({listed}); a cut needs "
                f"one that carries everything{known}"
            )
        cut = crossing[0]
        if why := self._misfit(cut):
            raise PlanError(f"pass 'subnetworks': cannot cut {where}: {why}{known}")
        return self._site(cut, reader)

    def _counts(self) -> str:
        return f"; numbers that can be dropped: {_listed([s.dropped for s in self.found if s.dropped])}"

    def _names(self) -> str:
        return f"; a sub-model can enter at {_listed([s.enters for s in self.found])}"

    # ------------------------------------------------------------ where there are sites

    def _unfit(self) -> str:
        images = [n for n in self.nodes if n.op == "placeholder" and isinstance(self.values[n], torch.Tensor)]
        if len(images) != 1:
            return f"the model takes {len(images)} tensors; a step-down convolution reads one image"
        self.image = images[0]
        value = self.values[self.image]
        if value.dim() not in (3, 4, 5) or not value.is_floating_point():
            return f"the model's input is {value.dtype} {list(value.shape)}, not an image [N, C, H, W]"
        if not self.convs:
            return "the model has no convolution: nothing steps its input down"
        return ""

    def _data(self) -> set[fx.Node]:
        """Values that depend on the input, sizes left out."""
        inputs = [n for n in self.nodes if n.op == "placeholder"]
        return {n for n in descendants(inputs, lambda n: not is_size(n)) if not is_size(n)}

    def _places(self) -> Iterator[tuple[fx.Node, fx.Node]]:
        """Cuts with weighted work before the next one, behind some work already, each with its first reader."""
        worked = False
        ends = [*self.cuts[1:], self.nodes[-1]]
        for cut, end in zip(self.cuts, ends, strict=False):
            between = self.nodes[self.place[cut] + 1 : self.place[end] + 1]
            works = any(op(n).macs for n in between if n in self.data)
            readers = [n for n in between if cut in n.all_input_nodes and n in self.data]
            if works and worked and readers and not self._misfit(cut) and self._is_clean(cut):
                yield cut, readers[0]
            worked = worked or works

    def _site(self, cut: fx.Node, reader: fx.Node) -> Site:
        names = (layer(reader), reader.name)
        enters = next((name for name in names if self._named(name) is reader), reader.name)
        dropped = sum(self.place[n] <= self.place[cut] for n in self.convs)
        tokens = self.spread.get(cut) is None
        return Site(cut, enters, dropped, self.embedding if tokens else None)

    def _misfit(self, cut: fx.Node) -> str:
        """Why no step-down gives this tensor; empty where one does."""
        sizes, image = shape(self.values[cut]), shape(self.values[self.image])
        what = f"{layer(cut)} [{dims(sizes[1:])}]"
        known = self.spread.get(cut)
        if known is not None and len(sizes) == len(image):
            there, here = [sizes[d] for d in known.dims], image[2:]
            if any(h > n for h, n in zip(there, here, strict=True)):
                return f"{what} is larger than the image {dims(here)}: a step-down convolution cannot enlarge"
            if known.maps is None and set(there) == {1} and max(here) > 1:
                return f"{what} lies in the head, behind the last map"
            return ""
        if self.embedding is not None and len(sizes) == 3:
            same = sizes == shape(self.values[self.embedding])
            if same and self.place[cut] > self.place[self.embedding]:
                return ""
            if same:
                return f"no layer lies between the embedding and {what}"
            return f"{what} has other tokens than the model's embedding gives ({layer(self.embedding)})"
        return f"{what} is no map of the image: it lies behind the head, or in no layout that is known"

    def _embedding(self) -> fx.Node | None:
        """The first cut that holds tokens [N, L, C] and that weighted work reads: there the embedding ends."""
        for cut, end in zip(self.cuts, [*self.cuts[1:], self.nodes[-1]], strict=False):
            between = self.nodes[self.place[cut] + 1 : self.place[end] + 1]
            works = any(op(n).macs for n in between if n in self.data)
            image = shape(self.values[self.image])
            if works and len(shape(self.values[cut])) == 3 and len(image) == 4 and cut not in self.spread:
                return cut
        return None

    def _is_clean(self, cut: fx.Node) -> bool:
        return not any(n.op != "placeholder" for n in self._sizes_across(cut))

    def _sizes_across(self, cut: fx.Node) -> list[fx.Node]:
        """Values in front of the cut of which a size is read behind it, so that they cannot be dropped."""
        behind = dict.fromkeys(descendants([cut]))
        read = [n for node in behind if node is not cut for n in node.all_input_nodes]
        sizes = [n for n in read if is_size(n) and n not in behind]
        return [n for n in ancestors(sizes, is_size) if not is_size(n) and n not in behind and n in self.data]

    def _crossing(self, reader: fx.Node) -> list[fx.Node]:
        """The values that are made in front of a node and read by it or behind it."""
        here = self.place[reader]
        early = [n for n in self.nodes[:here] if n in self.data]
        found = [n for n in early if any(self.place[u] >= here and not is_size(u) for u in n.users)]
        return found + [n for n in self._sizes_across(found[0]) if n.op != "placeholder"] if len(found) == 1 else found


def _listed(found: list) -> str:
    shown = ", ".join(map(str, found[:12]))
    return shown + (f" and {len(found) - 12} more" if len(found) > 12 else "") if found else "nowhere"
