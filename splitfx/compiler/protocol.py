"""What a pass is: a frozen dataclass whose fields are its options, with a promise and a `run`.

Does: checks options against their type hints, turns a pass into plain data and back.
Refuses: unknown options and values of another type (`PlanError` with the pass, the option, what was
given and what is allowed). A subclass checks what its values mean in its own `__post_init__`, after
`super().__post_init__()`.
Promises: `cls.from_dict(one.to_dict()) == one` for every pass whose options are all part of the plan.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

from splitfx.compiler import options
from splitfx.errors import PassError, PlanError
from splitfx.ir.notes import Note

if TYPE_CHECKING:
    from torch import fx

    from splitfx.analysis import Facts


class Promise(enum.Enum):
    """What a pass guarantees, and so which oracle the pipeline runs after it."""

    EQUAL = "equal"  # same function: outputs equal to the input graph's in float64
    RETRAIN = "retrain"  # same shapes, fewer connections: outputs equal to the pass's own masked dense reference
    RESHAPE = "reshape"  # another signature: declared shapes, each sub-model equal to its reference
    APPROXIMATE = "approximate"  # another function, near: outputs equal to the pass's own plain form of it, no more


@dataclass(frozen=True)
class Outcome:
    """What `Pass.run` returns.

    `reference` is what a pass must equal that does not promise EQUAL: the dense masked model of a RETRAIN pass, the
    plain form of what an APPROXIMATE one computes. `resolved` is the pass with what it decided
    by measuring written down, so that its plan gives the same graph on another machine; None: nothing was measured.
    """

    notes: tuple[Note, ...] = ()
    reference: fx.GraphModule | None = None
    resolved: Pass | None = None


def not_in_plan() -> Any:
    """Declare an option that holds no plain data (calibration tensors, a function), `None` by default.

    It is left out of the plan's text, of comparisons and of the JSON schema: a plan that is saved and loaded
    again has `None` there, and the user gives the data anew.
    """
    return dataclasses.field(default=None, compare=False, repr=False, metadata={"plan": False})


@dataclass(frozen=True)
class Pass:
    """Base of every pass. Subclasses are frozen dataclasses with `name`, `promise` and `run`."""

    name: ClassVar[str]
    promise: ClassVar[Promise]
    needs_eval: ClassVar[bool] = False  # True: the pipeline refuses a model in train mode before it runs the pass
    # False: `run` puts new tensors in the place of old ones and never writes into a parameter or buffer that it was
    # given. The pipeline then lends it the caller's own tensors instead of copying them all, and looks afterwards.
    writes_weights: ClassVar[bool] = True

    def __post_init__(self) -> None:
        options.normalise(self, f"pass '{self.name}': option '{{}}'")

    def run(self, graph: fx.GraphModule, facts: Facts) -> Outcome:
        """Rewrite `graph` in place, through `splitfx.ir.editing`, and return the notes.

        Refusing one site is a note; refusing the whole job raises `PassError` or `UnsupportedError`.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no run()")

    def held(self, before: fx.GraphModule, after: fx.GraphModule) -> float:
        """The oracle of a pass that promises RESHAPE: every model of the result against a reference that is made
        without `run`. Returns the largest relative difference in float64; raises `VerificationError` where that is
        too large."""
        raise PassError(f"pass '{self.name}' promises reshape and defines no held() to be checked by")

    def to_dict(self) -> dict[str, Any]:
        """The options that differ from their defaults, as plain TOML types (lists, dicts, numbers, texts)."""
        return options.changed(self)

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> Self:
        """Build the pass from plain data. Raises `PlanError` for unknown, missing or wrong options."""
        try:
            options.check_keys(cls, given, "option")
        except options.Mismatch as mismatch:
            raise PlanError(f"pass '{cls.name}' {mismatch.problem}.") from None
        return cls(**given)

    @classmethod
    def schema(cls) -> dict[str, Any]:
        """The JSON schema of this pass's table in a plan; a default is shown where it has a plain form."""
        table = options.table_schema(cls)
        table["properties"] = {"name": {"const": cls.name}, **table["properties"]}
        table["required"] = ["name", *table["required"]]
        return {"title": cls.__name__, "description": _first_line(cls), **table}


def check_options(cls: type[Pass]) -> None:
    """Raise `PassError` when an option of a pass cannot make the trip through a plan's text and back."""
    options.table_schema(cls)
    for option in ("name", "promise", "needs_eval", "writes_weights"):
        if option in options.fields(cls):
            where = f"{cls.__qualname__}.{option}"
            raise PassError(f"{where} must be a ClassVar: the name is taken by the protocol of passes.")


def _first_line(cls: type[Pass]) -> str:
    text = (cls.__doc__ or "").strip()
    written_by_dataclass = text.startswith(f"{cls.__name__}(")
    return "" if written_by_dataclass else text.partition("\n")[0]
