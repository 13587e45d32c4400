"""What a search looks through: a model whose blocks may each be divided by one of some factors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import fx, nn

from splitfx.analysis import facts
from splitfx.analysis.blocks import blocks
from splitfx.compiler import registry
from splitfx.compiler.plan import Plan
from splitfx.compiler.protocol import Pass
from splitfx.errors import PlanError
from splitfx.frontend.trace import trace
from splitfx.ground.digest import digest
from splitfx.ir.graph import TensorSpec, copy_graph, info, is_canonical
from splitfx.train.search.trend import Figures

FACTORS = (2, 4, 6, 8)


class SearchSpace:
    """A model, and the factors by which each of its blocks may be divided.

    ``model``: a module with ``example_inputs`` as `trace` takes them, or a graph that `trace` gave. It is never
    changed, and is the teacher where a recipe has one. ``factors``: those to try, from 2 on in rising order.
    ``options``: those of `Group`, such as {"fusion": "keep"}; the lowering is "branches" where they name none.

    Raises `PlanError` for a model without blocks and for factors and options that make no sense, and what `trace`
    raises.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any = None,
        *,
        factors: Sequence[int] = FACTORS,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.factors = _factors(factors)
        self.options: dict[str, Any] = {"lowering": "branches", **(options or {})}
        if "factors" in self.options:
            raise PlanError("options are those of Group without factors: the search finds them")
        if self.options.get("fusion", "widen") == "none" or self.options["lowering"] == "auto":
            raise PlanError("a search needs a fusion behind each block, and a lowering that does not depend on timing")
        self.model, self.dense = model, _dense(model, example_inputs)
        self._divided: dict[tuple[int, ...], set[int]] = {}
        if not self.names():
            raise PlanError("the model has no convolution: there are no blocks whose factor could be searched")
        self.step((1,) * len(self.names()))

    def names(self) -> list[str]:
        return [str(block) for block in blocks(facts(self.dense))]

    def step(self, factors: Sequence[int]) -> Pass:
        return registry.get("group").from_dict({**self.options, "factors": tuple(factors)})

    def plan(self, factors: Sequence[int]) -> Plan:
        shapes = [one.shape for one in info(self.dense).inputs if isinstance(one, TensorSpec)]
        return Plan([self.step(factors)], shapes[0] if len(shapes) == 1 else tuple(shapes))

    def divided(self, factors: Sequence[int]) -> set[int]:
        """The blocks that a plan divides; a factor above a block's channels leaves it whole, and so does any where its
        only layer reads what nothing divides."""
        key = tuple(factors)
        if key not in self._divided:
            found = cast(Any, self.step(key)).divides(facts(self.dense))
            self._divided[key] = {index for index, name in enumerate(self.names()) if name in found}
        return self._divided[key]

    def dividing(self, index: int, others: tuple[int, ...]) -> tuple[int, ...]:
        """The factors that divide a block beside those of the other blocks."""
        return tuple(f for f in self.factors if index in self.divided(changed(others, index, f)))

    def choices(self) -> list[tuple[int, ...]]:
        """For each block, the factors that divide it when the others are whole, or when they are divided."""
        count = len(self.names())
        found = []
        for index in range(count):
            able = {f for others in (1, self.factors[0]) for f in self.dividing(index, (others,) * count)}
            found.append(tuple(sorted(able)))
        return found

    def real(self, factors: tuple[int, ...]) -> tuple[int, ...]:
        """The same plan with factor 1 for each block that it leaves whole."""
        while True:
            divided = self.divided(factors)
            found = tuple(factor if index in divided else 1 for index, factor in enumerate(factors))
            if found == factors:
                return found
            factors = found

    def about(self) -> dict[str, Any]:
        """What a study of this space is for, as plain data; weights by a digest."""
        state = self.dense.state_dict()
        shapes = {key: list(t.shape) for key, t in state.items()}
        options = {key: list(v) if isinstance(v, tuple) else v for key, v in self.options.items()}
        return {
            "model": shapes, "weights": digest(state), "options": options, "factors": list(self.factors),
        }  # fmt: skip


def figures(graph: fx.GraphModule) -> Figures:
    known = facts(graph)
    return Figures(known.cost.macs, known.cost.params, known.memory.peak_bytes)


def key_of(factors: Sequence[int]) -> str:
    """A trial's name: its factors, "4-2-1"."""
    return "-".join(map(str, factors))


def changed(factors: tuple[int, ...], index: int, factor: int) -> tuple[int, ...]:
    return (*factors[:index], factor, *factors[index + 1 :])


def _dense(model: nn.Module, example_inputs: Any) -> fx.GraphModule:
    if is_canonical(model) and example_inputs is None:
        assert isinstance(model, fx.GraphModule)
        return copy_graph(model)
    if example_inputs is None:
        raise PlanError("no input sizes: give example_inputs")
    return trace(model, example_inputs)


def _factors(factors: Sequence[int]) -> tuple[int, ...]:
    found = tuple(factors)
    if not found or any(type(f) is not int or f < 2 for f in found) or list(found) != sorted(set(found)):
        raise PlanError(f"factors are whole numbers from 2 on in rising order, such as (2, 4, 6, 8); got {factors!r}")
    return found
