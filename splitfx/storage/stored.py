"""What a stored program is, as types; `splitfx.storage.values` knows the values in it.

Does: decodes the JSON of a program into structs, every name in it held to the grammar (`splitfx.ground.names`).
Refuses (`ValueError`, with the place in the document): fields that are missing, unknown or of another type.
Promises: nothing is imported, evaluated or allocated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from splitfx.ground import names
from splitfx.ground.amounts import parse_bytes
from splitfx.ground.files.typed import require_ordinary
from splitfx.ir.notes import Note
from splitfx.storage.operators import LARGEST
from splitfx.subnetworks.entry import Form as EntryForm
from splitfx.tiling.plan import planner
from splitfx.tiling.plan.replan import HALF
from splitfx.tiling.stage.kernel import Spill

T = TypeVar("T")

Count = Annotated[int, Meta(ge=0, le=LARGEST)]
Positive = Annotated[int, Meta(ge=1, le=LARGEST)]


class Name(str):
    """A name in Python."""


class Path(str):
    """The dotted path of a layer or a tensor."""


class Node(Struct, forbid_unknown_fields=True):
    op: Literal["placeholder", "get_attr", "call_module", "call_function", "output"]
    name: Name
    target: str
    args: list[Any]
    kwargs: dict[str, Any]
    layer: str

    def __post_init__(self) -> None:
        _hold_keys(Name, self.kwargs)


class Layer(Struct, forbid_unknown_fields=True):
    """``nodes``, ``layers`` and ``norms`` are those of a layer that holds a graph of its own."""

    kind: str = msgspec.field(name="class")
    options: dict[str, Any]
    instead_of: str = ""
    nodes: list[Node] = []
    layers: dict[str, Layer] = {}
    norms: dict[str, Layer] = {}

    def __post_init__(self) -> None:
        _hold_keys(Path, self.layers)
        _hold_keys(Name, self.norms)


class Keeping(Struct, forbid_unknown_fields=True):
    """See `splitfx.tiling.stage.kernel.Keeping`."""

    recompute: Annotated[float, Meta(ge=0)] = math.inf
    spill: Annotated[float, Meta(ge=0)] = math.inf
    to: Spill = ""

    def __post_init__(self) -> None:
        if math.isnan(self.recompute) or math.isnan(self.spill):
            raise ValueError("see recompute and spill: not a number")
        if self.spill < math.inf and not self.to:
            raise ValueError("see spill: maps that are spilled go to 'host' or 'disk'")


class Schedule(Struct, forbid_unknown_fields=True):
    """See `splitfx.tiling.plan.instructions.Schedule`."""

    rows: Count = 0
    firing_intervals: tuple[Positive, ...] = ()
    tiles: tuple[Positive, Positive] = (1, 1)
    keeping: Keeping = msgspec.field(default_factory=Keeping)


class Goal(Struct, forbid_unknown_fields=True):
    """See `splitfx.tiling.plan.replan.Goal`."""

    budget: Annotated[str, Meta(max_length=100)]
    mode: planner.Mode
    sizes: tuple[tuple[Count, ...], ...]
    outside: Count
    spill: Spill = ""

    def __post_init__(self) -> None:
        if self.budget not in (HALF, "least"):
            parse_bytes(self.budget)


class TiledOptions(Struct, forbid_unknown_fields=True):
    schedule: Schedule
    goal: Goal | None = None
    checkpoint: bool = False


class EntryOptions(Struct, forbid_unknown_fields=True):
    """See `splitfx.subnetworks.entry.Entry`."""

    number: Count
    reads: Count
    form: EntryForm
    private: dict[str, Name]

    def __post_init__(self) -> None:
        _hold_keys(Path, self.private)


class Tree(Struct, forbid_unknown_fields=True):
    """Containers around what the graph takes and gives."""

    args: list[Name]
    inside: Any = msgspec.field(name="in")
    outside: Any = msgspec.field(name="out")


class Form(Struct, forbid_unknown_fields=True):
    """A tensor without its values."""

    shape: Annotated[list[Count], Meta(max_length=32)]
    dtype: Any
    high: Annotated[int, Meta(ge=-(2**62), le=2**62)] | None = None


class Rule(Struct, forbid_unknown_fields=True):
    """``holds``: an expression of `splitfx.ir.sizes`, as lists."""

    holds: Any
    where: Annotated[str, Meta(max_length=1000)] = ""


class Free(Struct, forbid_unknown_fields=True):
    """See `splitfx.ir.sizes.Sizes`."""

    fixed: Annotated[list[Annotated[list[Count], Meta(max_length=32)]], Meta(max_length=1000)]
    rules: Annotated[list[Rule], Meta(max_length=1000)]


class Info(Struct, forbid_unknown_fields=True):
    """See `splitfx.ir.graph.TraceInfo`."""

    inputs: list[Any]
    in_spec: Any
    model_class: Name
    front_end: str
    sizes: Free
    notes: list[Note]
    train_only: list[str]
    untouched: list[str]
    aliases: dict[str, Path]

    def __post_init__(self) -> None:
        _hold_keys(Path, self.aliases)


class Program(Struct, forbid_unknown_fields=True):
    """``outputs``: the tensors that the graph gives for inputs of the traced sizes."""

    nodes: list[Node]
    layers: dict[str, Layer]
    tree: Tree | None
    info: Info
    outputs: list[Form] | None = None

    def __post_init__(self) -> None:
        _hold_keys(Path, self.layers)


def decoded(plain: Any) -> Program:
    """The program in JSON's types. Raises `ValueError`, in one line with the place in the document."""
    require_ordinary(plain)
    return convert(plain, Program)


def convert(plain: Any, kind: type[T]) -> T:
    """Plain data as a struct. Raises `ValueError`, in one line with the place in the data."""
    return msgspec.convert(plain, kind, dec_hook=_held_to_grammar)


def _held_to_grammar(kind: type, given: Any) -> Any:
    if (names.is_name if kind is Name else names.is_path)(given):
        return kind(given)
    raise ValueError(f"an unusable {'name' if kind is Name else 'layer path'}: {str(given)[:80]!r}")


def _hold_keys(kind: type, given: Mapping[str, Any]) -> None:
    """msgspec looks at the values of a dict alone."""
    for key in given:
        _held_to_grammar(kind, key)
