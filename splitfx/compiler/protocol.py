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
import functools
import typing
from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

from splitfx.compiler import options
from splitfx.errors import PassError, PlanError, nearest
from splitfx.ir.notes import Note
from splitfx.text import cut, shown

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
    plain form of what an APPROXIMATE one computes. `settled` is the pass with what it decided
    by measuring written down, so that its plan gives the same graph on another machine; None: nothing was measured.
    """

    notes: tuple[Note, ...] = ()
    reference: fx.GraphModule | None = None
    settled: Pass | None = None


def not_in_plan() -> Any:
    """Declare an option that holds no plain data (calibration tensors, a function), `None` by default.

    It is left out of the plan's text, of comparisons and of the JSON schema: a plan that is saved and loaded
    again has `None` there, and the user gives the data anew.
    """
    return dataclasses.field(default=None, compare=False, repr=False, metadata={"plan": False})


@dataclass(frozen=True)
class Pass:
    """Base of every pass. Subclasses are frozen dataclasses with `name`, `promise` and `run`.

    ``promise`` belongs to the class; an instance whose options give up the class's promise carries its own.
    """

    name: ClassVar[str]
    promise: ClassVar[Promise]
    needs_eval: ClassVar[bool] = False  # True: the pipeline refuses a model in train mode before it runs the pass
    # False: `run` puts new tensors in the place of old ones and never writes into a parameter or buffer that it was
    # given. The pipeline then lends it the caller's own tensors instead of copying them all, and looks afterwards.
    writes_weights: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for option, hint in _options(type(self)).items():
            # The dataclass is frozen for its users; this is the one place that normalises ([8, 2] -> (8, 2)).
            object.__setattr__(self, option, _checked(type(self), option, getattr(self, option), hint))

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
        values = {option: getattr(self, option) for option in _options(type(self))}
        return {key: options.plain(one) for key, one in values.items() if one != _default(type(self), key)}

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> Self:
        """Build the pass from plain data. Raises `PlanError` for unknown, missing or wrong options."""
        known = _options(cls)
        for option in given:
            if option not in known:
                allowed = ", ".join(known) or "none"
                hint = nearest(str(option), known)
                raise PlanError(f"pass '{cls.name}' has no option '{cut(str(option))}'.{hint} Its options: {allowed}.")
        for option in known:
            if option not in given and _default(cls, option) is MISSING:
                raise PlanError(f"pass '{cls.name}' needs option '{option}': {options.describe(known[option])}.")
        return cls(**{option: _checked(cls, option, value, known[option]) for option, value in given.items()})

    @classmethod
    def schema(cls) -> dict[str, Any]:
        """The JSON schema of this pass's table in a plan; a default is shown where it has a plain form."""
        properties: dict[str, Any] = {"name": {"const": cls.name}}
        required = ["name"]
        for option, hint in _options(cls).items():
            properties[option] = options.schema(hint)
            default = _default(cls, option)
            if default is MISSING:
                required.append(option)
            elif default is not None:
                properties[option]["default"] = options.plain(default)
        closed = {
            "type": "object",
            "properties": properties,
            "required": required,
            "additionalProperties": False,
        }
        return {"title": cls.__name__, "description": _first_line(cls), **closed}


@functools.cache
def _options(cls: type[Pass]) -> dict[str, Any]:
    """The options of a pass that are part of its plan, with their type hints."""
    hints = typing.get_type_hints(cls)
    return {one.name: hints[one.name] for one in dataclasses.fields(cls) if one.metadata.get("plan", True)}


def _default(cls: type[Pass], option: str) -> Any:
    field = cls.__dataclass_fields__[option]
    value = field.default if field.default_factory is MISSING else field.default_factory()
    return value if value is MISSING else options.convert(value, _options(cls)[option])


def _checked(cls: type[Pass], option: str, value: Any, hint: Any) -> Any:
    try:
        return options.convert(value, hint)
    except options.Mismatch as mismatch:
        allowed = str(mismatch) or options.describe(hint)
        raise PlanError(f"pass '{cls.name}': option '{option}' must be {allowed}; got {shown(value)}.") from None


def check_options(cls: type[Pass]) -> None:
    """Raise `PassError` when an option of a pass cannot make the trip through a plan's text and back."""
    for option, hint in _options(cls).items():
        where = f"{cls.__qualname__}.{option}"
        options.schema(hint)  # refuses hints that are not plain
        if option in ("name", "promise", "needs_eval", "writes_weights"):
            raise PassError(f"{where} must be a ClassVar: the name is taken by the protocol of passes.")
        if type(None) in options.members(hint) and _default(cls, option) is not None:
            raise PassError(f"{where} allows None, so None must be its default: a plan has no word for None.")


def _first_line(cls: type[Pass]) -> str:
    text = (cls.__doc__ or "").strip()
    written_by_dataclass = text.startswith(f"{cls.__name__}(")
    return "" if written_by_dataclass else text.partition("\n")[0]
