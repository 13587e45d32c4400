"""Plans and the options of passes: exact round trips, and one clear line for everything that is wrong."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitfx.compiler import registry
from splitfx.compiler.plan import FORMAT, Plan, plan_schema
from splitfx.compiler.protocol import Outcome, Pass, Promise, not_in_plan
from splitfx.errors import PassError, PlanError


@dataclass(frozen=True)
class Corner:
    """An option of several values with names."""

    row: int
    weight: float = 1.0
    name: str | None = None
    inner: tuple[int, ...] = ()


@dataclass(frozen=True)
class Divide(Pass):
    """Divides every block."""

    name: ClassVar[str] = "divide"
    promise: ClassVar[Promise] = Promise.RETRAIN

    factors: tuple[int, ...] = (1,)
    fusion: Literal["widen", "keep", "none"] = "widen"
    share: int = 0
    strict: bool = True
    budget: float | Literal["auto"] = "auto"
    label: str | None = None
    per_layer: dict[str, int] = dataclasses.field(default_factory=dict)
    window: tuple[int, int] | None = None
    corners: tuple[Corner, ...] = ()
    origin: Corner | None = None
    data: Any = not_in_plan()

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.factors, default=1) < 1:
            raise PlanError(f"pass 'divide': factors must be 1 or more; got {list(self.factors)}.")

    def run(self, graph: Any, facts: Any) -> Outcome:
        return Outcome()


@dataclass(frozen=True)
class Polish(Pass):
    """Needs one option."""

    name: ClassVar[str] = "polish"
    promise: ClassVar[Promise] = Promise.EQUAL
    level: int

    def run(self, graph: Any, facts: Any) -> Outcome:
        return Outcome()


@pytest.fixture(autouse=True)
def _two_passes(own_registry: dict) -> None:
    registry.register(Divide)
    registry.register(Polish)


TEXT = """\
format = 1
input_shape = [1, 3, 224, 224]

[[pass]]
name = "divide"
factors = [8, 2, 2, 4, 4]

[[pass]]
name = "polish"
level = 3
"""

# Plans round-trip


def test_text_of_a_plan_is_what_a_person_would_write():
    plan = Plan([Divide(factors=(8, 2, 2, 4, 4)), Polish(3)], input_shape=(1, 3, 224, 224))
    assert plan.to_toml() == TEXT
    assert Plan.from_toml(TEXT) == plan


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
int64s = st.integers(-(2**63), 2**63 - 1)
corners = st.builds(Corner, int64s, st.floats(allow_nan=False), st.none() | texts, st.lists(int64s, max_size=2))
divides = st.builds(
    Divide,
    factors=st.lists(st.integers(1, 2**63 - 1), max_size=5),
    fusion=st.sampled_from(["widen", "keep", "none"]),
    share=int64s,
    strict=st.booleans(),
    budget=st.just("auto") | st.floats(allow_nan=False),
    label=st.none() | texts,
    per_layer=st.dictionaries(texts, int64s, max_size=3),
    window=st.none() | st.tuples(int64s, int64s),
    corners=st.lists(corners, max_size=3),
    origin=st.none() | corners,
)
sizes = st.lists(st.integers(1, 128), min_size=2, max_size=5)
shapes = st.none() | sizes | st.lists(sizes, min_size=1, max_size=3)


@given(st.lists(divides | st.builds(Polish, int64s), min_size=1, max_size=4), shapes)
def test_every_plan_survives_its_text(passes: list[Pass], shape: Any):
    plan = Plan(passes, shape)
    again = Plan.from_toml(plan.to_toml())
    assert again == plan
    assert hash(again) == hash(plan)
    assert again.to_toml() == plan.to_toml()


def test_every_plan_survives_its_file(tmp_path: Path):
    plan = Plan([Divide(label='Grüße "\\\x7f\n', per_layer={"layer1.0.conv": 2, "": 3}, budget=math.inf)])
    plan.save(tmp_path / "plan.toml")
    assert Plan.load(tmp_path / "plan.toml") == plan
    assert os.listdir(tmp_path) == ["plan.toml"]


def test_plans_are_frozen_hashable_and_copyable():
    plan = Plan([Divide(per_layer={"a": 1, "b": 2})], [1, 3, 8, 8])
    assert plan.input_shape == (1, 3, 8, 8)
    assert len({plan, Plan([Divide(per_layer={"b": 2, "a": 1})], (1, 3, 8, 8)), copy.deepcopy(plan)}) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.passes = ()  # type: ignore[misc]
    with pytest.raises(TypeError, match="dataclasses.replace"):
        plan.passes[0].per_layer["a"] = 5  # type: ignore[attr-defined]


def test_data_is_left_out_of_the_text_and_of_comparisons():
    with_data = Plan([Divide(data=object())])
    assert "data" not in with_data.to_toml()
    assert Plan.from_toml(with_data.to_toml()) == with_data == Plan([Divide()])


def test_windows_line_ends_are_read():
    assert Plan.from_toml(TEXT.replace("\n", "\r\n")) == Plan.from_toml(TEXT)


def test_options_with_names_are_tables_of_the_text():
    corners = (Corner(1, inner=[2, 3]), Corner(2, name="far"))  # type: ignore[arg-type]
    plan = Plan([Divide(corners=corners, origin=Corner(0))])
    assert plan.passes[0].corners[0].inner == (2, 3)  # type: ignore[attr-defined]
    assert plan.to_toml() == (
        'format = 1\n\n[[pass]]\nname = "divide"\n'
        "[[pass.corners]]\nrow = 1\ninner = [2, 3]\n"
        '[[pass.corners]]\nrow = 2\nname = "far"\n'
        "[pass.origin]\nrow = 0\n"
    )
    assert Plan.from_toml(plan.to_toml()) == plan


# Bad plans in Python


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        ([], "a plan needs at least one pass"),
        ([Divide], r"pass 1 of the plan is a class; write Divide\(\)"),
        ([Divide(), "divide"], "pass 2 of the plan is not a pass: 'divide'"),
        (Divide(), r"a plan takes a list of passes, such as Plan\(\[...\]\)"),
        ("divide", "a plan takes a list of passes"),
    ],
)
def test_what_is_no_list_of_passes_is_refused(passes: Any, message: str):
    with pytest.raises(PlanError, match=message):
        Plan(passes)


@pytest.mark.parametrize("shape", [(), (3,), (1, 0), (1, -3, 8), (1, 2.5), "1x3", 7, ((1, 3), (4,)), (True, 2)])
def test_wrong_input_shapes_are_refused(shape: Any):
    with pytest.raises(PlanError, match="input_shape must be a list of at least 2 positive integers"):
        Plan([Divide()], shape)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"factors": 8}, "option 'factors' must be a list of integers; got 8"),
        ({"factors": [8, "2"]}, "option 'factors' must be a list of integers"),
        ({"factors": [True]}, "option 'factors' must be a list of integers"),
        ({"factors": [0]}, "factors must be 1 or more"),
        ({"share": 1.0}, "option 'share' must be an integer; got 1.0"),
        ({"share": 2**63}, "option 'share' must be an integer"),
        ({"strict": 1}, "option 'strict' must be true or false; got 1"),
        ({"fusion": "wide"}, 'option \'fusion\' must be one of "widen", "keep", "none"; got \'wide\''),
        ({"budget": "big"}, "option 'budget' must be a number or one of \"auto\"; got 'big'"),
        ({"budget": math.nan}, "option 'budget' must be a number"),
        ({"label": "\ud800"}, "option 'label' must be a text"),
        ({"per_layer": {"a": "b"}}, "option 'per_layer' must be a table of names to integers"),
        ({"per_layer": [1]}, "option 'per_layer' must be a table"),
        ({"corners": [[1]]}, r"option 'corners' must be a list of \(a table of row, weight, name, inner\); got "),
        ({"corners": [{}]}, r"option 'corners\[0\]' needs key 'row': an integer"),
        ({"corners": [{"row": 1}, {"row": "x"}]}, r"option 'corners\[1\].row' must be an integer; got 'x'"),
        ({"corners": [{"row": 1, "inner": 2}]}, r"option 'corners\[0\].inner' must be a list of integers; got 2"),
        ({"corners": [{"row": 1, "rows": 2}]}, r"'corners\[0\]' has no key 'rows'. Did you mean 'row'\? Its keys: "),
        ({"origin": {"rows": 2}}, "option 'origin' has no key 'rows'. Did you mean 'row'"),
        ({"corners": [Corner("x")]}, r"option 'corners\[0\].row' must be an integer; got 'x'"),  # type: ignore[arg-type]
        ({"origin": 3}, "option 'origin' must be a table of row, weight, name, inner or left out .*; got 3"),
        ({"window": [1, 2, 3]}, "option 'window' must be a list of 2: an integer, an integer"),
        (
            {"factor": [8]},
            "pass 'divide' has no option 'factor'. Did you mean 'factors'\\? Its options: factors, ",
        ),
        ({"data": 1}, "pass 'divide' has no option 'data'"),
    ],
)
def test_wrong_options_are_refused_by_name(options: dict[str, Any], message: str):
    with pytest.raises(PlanError, match=message) as caught:
        Divide.from_dict(options)
    assert "\n" not in str(caught.value)


def test_constructors_check_types_too():
    with pytest.raises(PlanError, match="option 'factors' must be a list of integers"):
        Divide(factors="82244")  # type: ignore[arg-type]


def test_a_missing_option_is_named():
    with pytest.raises(PlanError, match="pass 'polish' needs option 'level': an integer"):
        Polish.from_dict({})


# Bad plans in files

BAD_TEXTS = {
    "empty": ("", "the plan is empty"),
    "blank": (" \n\n", "the plan is empty"),
    "no TOML": ("passes: [divide]", "not valid TOML, or was cut off"),
    "cut off": (TEXT[: TEXT.index("4, 4]")], "not valid TOML, or was cut off"),
    "cut off before the passes": (TEXT[: TEXT.index("[[pass]]")], "a plan needs at least one pass"),
    "no format": (TEXT.replace("format = 1\n", ""), "has no format number"),
    "newer format": (
        TEXT.replace("format = 1", f"format = {FORMAT + 1}"),
        "format 2, .*up to 1; upgrade splitfx",
    ),
    "format of another type": (
        TEXT.replace("format = 1", 'format = "1"'),
        "must be a positive integer; got '1'",
    ),
    "format below one": (TEXT.replace("format = 1", "format = 0"), "must be a positive integer; got 0"),
    "unknown key": (
        TEXT.replace("input_shape", "input_shapes"),
        "no key 'input_shapes'. Did you mean 'input_shape'",
    ),
    "unknown pass": (
        TEXT.replace('"polish"', '"polich"'),
        "pass 2 .*no pass is named 'polich'. Did you mean 'polish'",
    ),
    "unknown option": (
        TEXT.replace("factors", "factor"),
        "pass 1 .*no option 'factor'. Did you mean 'factors'",
    ),
    "wrong option": (
        TEXT.replace("level = 3", "level = 'x'"),
        "pass 2 .*'level' must be an integer; got 'x'",
    ),
    "no name": (TEXT.replace('name = "polish"\n', ""), "pass 2 of the plan has no name"),
    "single brackets": ('format = 1\n[pass]\nname = "divide"\n', "double brackets"),
    "wrong shape": (TEXT.replace("[1, 3, 224, 224]", "[224]"), "input_shape must be"),
}


@pytest.mark.parametrize("case", BAD_TEXTS)
def test_a_bad_file_is_one_line_with_its_path(case: str, tmp_path: Path):
    text, message = BAD_TEXTS[case]
    path = tmp_path / "plan.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(PlanError, match=message) as caught:
        Plan.load(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read_are_refused(tmp_path: Path):
    with pytest.raises(PlanError, match="there is no such plan file"):
        Plan.load(tmp_path / "none.toml")
    with pytest.raises(PlanError, match="cannot be read: Is a directory"):
        Plan.load(tmp_path)
    (tmp_path / "plan.toml").write_bytes(b"format = 1\n\xff\xfe")
    with pytest.raises(PlanError, match=r"plan.toml: is not a plan: not UTF-8 text \(byte 11\)"):
        Plan.load(tmp_path / "plan.toml")


def test_an_existing_file_is_kept_unless_told_otherwise(tmp_path: Path):
    path = tmp_path / "plan.toml"
    path.write_text("mine", encoding="utf-8")
    with pytest.raises(PlanError, match="plan.toml: already exists"):
        Plan([Divide()]).save(path)
    assert path.read_text(encoding="utf-8") == "mine"
    Plan([Divide()]).save(path, overwrite=True)
    assert Plan.load(path) == Plan([Divide()])
    with pytest.raises(PlanError, match="is a folder"):
        Plan([Divide()]).save(tmp_path, overwrite=True)


def test_places_that_cannot_be_written_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(PlanError, match="its folder .* does not exist"):
        Plan([Divide()]).save(tmp_path / "none" / "plan.toml")

    def refused(
        *args: object, **kwargs: object
    ) -> None:  # root may write anywhere, so the refusal of the system is played
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("splitfx.ground.files.put", refused)
    with pytest.raises(PlanError, match="cannot be written: Permission denied"):
        Plan([Divide()]).save(tmp_path / "plan.toml")
    monkeypatch.setattr("splitfx.ground.files.drafts.tempfile.mkdtemp", refused)
    with pytest.raises(PlanError, match="cannot be written: Permission denied"):
        Plan([Divide()]).save(tmp_path / "plan.toml")
    assert os.listdir(tmp_path) == []


# The JSON schema


def test_the_schema_names_every_option_and_is_plain_json():
    schema = plan_schema()
    assert json.loads(json.dumps(schema)) == schema
    divide, polish = schema["properties"]["pass"]["items"]["oneOf"]
    assert set(divide["properties"]) == {one.name for one in dataclasses.fields(Divide)} - {"data"} | {"name"}
    assert divide["description"] == "Divides every block."
    assert divide["properties"]["factors"] == {"type": "array", "items": {"type": "integer"}, "default": [1]}
    assert divide["properties"]["label"] == {"type": "string"}
    corner = divide["properties"]["corners"]["items"]
    assert corner["required"] == ["row"]
    assert corner["properties"]["weight"] == {"type": "number", "default": 1.0}
    assert corner["additionalProperties"] is False
    assert divide["properties"]["origin"] == corner
    assert polish["required"] == ["name", "level"]
    assert set(tomllib.loads(TEXT)) == set(schema["properties"])


# The registry


def test_a_name_is_taken_once():
    @dataclass(frozen=True)
    class Other(Divide):
        def run(self, graph: Any, facts: Any) -> Outcome:
            return Outcome()

    registry.register(Divide)
    with pytest.raises(PassError, match="two passes are named 'divide'"):
        registry.register(Other)


def test_passes_that_break_the_protocol_are_refused():
    class Loose(Divide):
        name: ClassVar[str] = "loose"

    @dataclass(frozen=True)
    class Nameless(Pass):
        pass

    @dataclass(frozen=True)
    class Idle(Pass):
        name: ClassVar[str] = "idle"
        promise: ClassVar[Promise] = Promise.EQUAL

    @dataclass(frozen=True)
    class Listed(Divide):
        name: ClassVar[str] = "listed"
        many: list[int] = dataclasses.field(default_factory=list)

    @dataclass(frozen=True)
    class Unsayable(Divide):
        name: ClassVar[str] = "unsayable"
        limit: int | None = 3

    @dataclass
    class Loosened:
        row: int = 0

    @dataclass(frozen=True)
    class Changeable(Divide):
        name: ClassVar[str] = "changeable"
        entry: Any = Loosened

    Changeable.__annotations__["entry"] = Loosened

    refusals = {
        Loose: r"must be decorated with @dataclass\(frozen=True\)",
        Nameless: "must set `name`",
        Idle: r"must define `run\(graph, facts\)`",
        Listed: "cannot be declared as list",
        Changeable: "cannot be declared as .*Loosened",
        Unsayable: "limit allows None, so None must be its default",
    }
    for cls, message in refusals.items():
        with pytest.raises(PassError, match=message):
            registry.register(cls)


def test_installed_packages_add_passes_by_entry_point(monkeypatch: pytest.MonkeyPatch, own_registry: dict):
    own_registry.clear()
    point = registry.importlib.metadata.EntryPoint("divide", f"{__name__}:Divide", registry.ENTRY_POINTS)
    monkeypatch.setattr(point.__class__, "load", lambda self: Divide)
    assert registry._load(point) is Divide
    monkeypatch.setattr(point.__class__, "load", lambda self: 7)
    with pytest.raises(PassError, match="is not a subclass of splitfx.compiler.protocol.Pass"):
        registry._load(point)
    monkeypatch.setattr(point.__class__, "load", lambda self: 1 / 0)
    with pytest.raises(PassError, match=r"entry point 'divide' .* cannot be loaded: division by zero"):
        registry._load(point)
