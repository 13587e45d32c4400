"""What a crafted folder may not do: names that become code, functions that leave their operands, sizes without end."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn

import splitfx
from splitfx.compiler.pipeline import run_pass
from splitfx.errors import ExportError
from splitfx.ground import names
from splitfx.ir.graph import TensorSpec
from splitfx.passes import Tile
from splitfx.storage import KIND, PROGRAM, deserialize, load, operators, rehearsal, save, stored
from splitfx.tiling.plan import covered
from splitfx.tiling.plan.instructions import Schedule
from splitfx.tiling.plan.schedule import Scheduler
from splitfx.tiling.run.executor import Tiled

Change = Callable[[dict[str, Any]], Any]


class Pair(nn.Module):
    """A keyword input, a layer, an operator, an output in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"sum": self.conv(x).relu() + y}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    graph = splitfx.trace(Pair().eval(), ((torch.ones(2, 3, 6, 6),), {"y": torch.ones(2, 4, 1, 1)}))
    return save(graph, tmp_path_factory.mktemp("pair") / "split")


@pytest.fixture(scope="module")
def tiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1)).eval()
    graph = run_pass(splitfx.trace(model, torch.ones(1, 3, 16, 12)), Tile(rows=4))[0]
    return save(graph, tmp_path_factory.mktemp("tiled") / "split")


def changed(folder: Path, place: Path, change: Change, name: str = PROGRAM) -> Path:
    shutil.copytree(folder, place)
    plain = json.loads((place / name).read_text())
    change(plain)
    (place / name).write_text(json.dumps(plain) + " " * 8192)  # not shorter than it was
    return place


def refused(place: Path, why: str = "") -> None:
    started = time.perf_counter()
    with pytest.raises(ExportError, match=why) as caught:
        load(place)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 800
    assert time.perf_counter() - started < 20  # far more than it takes: a machine may be busy


def call(plain: dict[str, Any], kind: str = "relu") -> dict[str, Any]:
    return next(one for one in plain["nodes"] if kind in one["name"])


def keyword(name: str) -> Change:
    def change(plain: dict[str, Any]) -> None:
        for tree in (plain["tree"]["in"], plain["info"]["in_spec"]):
            tree["tuple"][1]["dict"][0][0] = name

    return change


def runs(target: str, *args: Any, **kwargs: Any) -> Change:
    return lambda plain: call(plain).update(target=target, args=[{"node": "conv"}, *args], kwargs=kwargs)


EVIL = "y': __import__('pathlib').Path('pwned').touch() or y, 'z"
NAMES: dict[str, Change] = {
    "arguments in another order": lambda plain: plain["tree"]["args"].reverse(),
    "keyword": keyword(EVIL),
    "a keyword of Python": keyword("class"),
    "no name": keyword(""),
    "a line end": keyword("y\n"),
    "a name that the compiler changes": keyword("ﬁ"),
    "a name of Python's own": keyword("__class__"),
    "a long name": keyword("y" * 100_000),
    "another name": lambda p: p["tree"]["in"]["tuple"][1]["dict"][0].__setitem__(0, "z"),
    "argument": lambda p: p["tree"]["args"].__setitem__(1, EVIL),
    "argument twice": lambda p: p["tree"]["args"].__setitem__(1, "x"),
    "argument too many": lambda p: p["tree"]["args"].append("z"),
    "the module itself": lambda p: p["tree"]["args"].__setitem__(0, "self"),
    "placeholder": lambda p: p["nodes"][0].update(target=EVIL),
    "placeholder with a value": lambda p: p["nodes"][0].update(args=[1]),
    "node": lambda p: call(p).update(name=EVIL),
    "option": lambda p: call(p).update(kwargs={EVIL: 1}),
    "alias": lambda p: p["info"].update(aliases={"x'": "conv"}),
    "alias of a method": lambda p: p["info"].update(aliases={"x": "conv.forward"}),
    "alias within itself": lambda p: p["info"].update(aliases={"conv.x": "conv"}),
    "aliases within each other": lambda p: p["info"].update(aliases={"a.x": "conv", "conv.y": "a"}),
    "path of a method": lambda p: p["layers"].update(forward=p["layers"]["conv"]),
    "path of a table": lambda p: p["layers"].update({"_modules": p["layers"]["conv"]}),
    "path of a dunder": lambda p: p["layers"].update({"a.__class__": p["layers"]["conv"]}),
    "model": lambda p: p["info"].update(model_class="X: pass\nimport os"),
    "namedtuple": lambda p: p["tree"].update(out={"namedtuple": ["X", ["_a)"], ["*"]]}),
    "key of an output": lambda p: p["tree"].update(out={"dict": [[["a"], "*"]]}),
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_names_never_become_code(name: str, pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    refused(changed(pair, tmp_path / "s", NAMES[name]), "stored")
    assert [one.name for one in tmp_path.iterdir()] == ["s"]


def test_sabotage_without_the_grammar_code_runs(pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    place = changed(pair, tmp_path / "s", keyword(EVIL))
    monkeypatch.setattr(names, "is_name", lambda given: True)
    with pytest.raises(ExportError, match="names of inputs"):  # the second check: keywords are the graph's arguments
        load(place)
    monkeypatch.setattr(deserialize, "_check_signature", lambda plain, info: None)
    with pytest.raises(Exception, match=r".*"):
        load(place)(torch.ones(2, 3, 6, 6), y=torch.ones(2, 4, 1, 1))
    assert Path("pwned").exists(), "the check above is not what keeps the code from running"


OPERATORS: dict[str, Change] = {
    **{
        f"{name}{args}": runs(name, *args)
        for name, args in (
            ("aten._reshape_alias.default", ([2, 4, 6, 6], [1, 1, 1, 1])),
            ("aten.as_strided.default", ([2, 4, 6, 6], [1, 1, 1, 1])),
            ("aten.set_.default", ()),
            ("aten._print.default", ()),
            ("aten._unsafe_index.Tensor", ([None],)),
            ("aten.resize_.default", ([2, 4, 6, 6],)),
            ("aten.empty_like.default", ()),
            ("aten.to_sparse.default", ()),
            ("aten.bernoulli.default", ()),
            ("aten.item.default", ()),
            ("aten.record_stream.default", ()),
            ("aten.sum.int", ()),
            ("torchvision.roi_align.default", ()),
            ("prims.device_put.default", ()),
            ("operator.attrgetter", ()),
            ("aten.view.default", ([2, 4, 6, 7],)),
            ("aten.relu.default", (1,)),
            ("aten.relu.nothing", ()),
            ("aten.__class__.default", ()),
            ("aten.relu.__class__", ()),
            ("operator.pow", (2**70,)),
            ("aten.upsample_nearest2d.default", ([6, 6], 1e-30, 1e-30)),
            ("aten.max_pool2d.default", ([2**40, 1],)),
            ("aten.unfold.default", (2, 2**60, 1)),
            ("aten.expand.default", ([2**40, 2, 4, 6, 6],)),
            ("aten.repeat.default", ([2**30, 2**30, 1, 1],)),
        )
    },
    "a writing overload": runs("aten.add.out", 1, out={"node": "conv"}),
    "an unknown option": runs("aten.relu.default", inplace=True),
    "a list as long as one likes": lambda p: call(p).update(target="operator.mul", args=[[0], 2**40]),
    "powers of powers": lambda p: call(p).update(target="operator.pow", args=[9, 2**40]),
    "seed": lambda p: call(p).update(target="aten.manual_seed.default", args=[1]),
    "file": lambda p: call(p).update(target="aten.from_file.default", args=["/etc/hostname", False, 4]),
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATORS)
def test_functions_that_a_program_may_not_run(name: str, pair: Path, tmp_path: Path) -> None:
    refused(changed(pair, tmp_path / "s", OPERATORS[name]), "stored")


def test_every_operator_that_may_be_stored_writes_to_its_first_operand_only() -> None:
    found = [getattr(getattr(torch.ops.aten, n, None), "overloads", lambda: [])() for n in sorted(operators.ALLOWED)]
    assert sum(map(len, found)) > 400
    for name in ("set", "resize", "as_strided", "_reshape_alias", "empty", "manual_seed", "from_file", "_print"):
        assert name not in operators.ALLOWED


@pytest.mark.parametrize(
    ("target", "given", "fits"),
    [
        (torch.ops.aten.scaled_dot_product_attention.default, ((1, 2, 8, 4), (1, 2, 6, 4), (1, 2, 6, 4)), True),
        (torch.ops.aten.scaled_dot_product_attention.default, ((1, 2, 8, 4), (1, 2, 6, 4), (1, 2, 1, 4)), False),
    ],
)
def test_keys_and_values_of_an_attention(target: Any, given: Any, fits: bool) -> None:
    """torch's fast kernel reads as many values as there are keys."""
    assert (operators.unfit(target, tuple(torch.ones(one) for one in given), {}) == "") is fits


def test_weights_of_an_lstm() -> None:
    """torch's fast kernel takes their sizes on trust: such weights corrupted the process."""
    lstm = nn.LSTM(3, 5, batch_first=True, bidirectional=True, num_layers=2)
    given = [one.detach() for one in lstm.parameters()]
    state = [torch.zeros(4, 2, 5), torch.zeros(4, 2, 5)]
    args: tuple[Any, ...] = (torch.ones(2, 7, 3), state, given, True, 2, 0.0, False, True, True)
    assert operators.unfit(torch.ops.aten.lstm.input, args, {}) == ""
    for place in range(len(given)):
        wrong = [*given[:place], torch.zeros(1, 1), *given[place + 1 :]]
        assert operators.unfit(torch.ops.aten.lstm.input, (*args[:2], wrong, *args[3:]), {})
    assert operators.unfit(torch.ops.aten.lstm.input, (args[0], [state[0], torch.zeros(4, 1, 5)], *args[2:]), {})


SIZES: dict[str, Change] = {
    "channels": lambda p: p["layers"]["conv"]["options"].update(out_channels=10**12),
    "a kernel": lambda p: p["layers"]["conv"]["options"].update(kernel_size={"tuple": [2**40, 2**40]}),
    "a word": lambda p: p["layers"]["conv"]["options"].update(out_channels="4"),
    "a switch": lambda p: p["layers"]["conv"]["options"].update(bias=1),
    "no bias": lambda p: p["layers"]["conv"]["options"].update(bias=False, out_channels=5),
    "a mode": lambda p: p["layers"]["conv"]["options"].update(padding_mode="x"),
    "an input": lambda p: p["info"]["inputs"][0]["tensor"].update(shape=[2, 3, 10**9, 10**9]),
    "an input's size": lambda p: p["info"]["inputs"][0]["tensor"].update(shape=[2, 3, -1, 6]),
    "an input of other sizes": lambda p: p["info"]["inputs"][0]["tensor"].update(shape=[2, 4, 6, 6]),
    "an input's type": lambda p: p["info"]["inputs"][0]["tensor"].update(dtype={"dtype": "int64"}),
    "an input too few": lambda p: p["info"]["inputs"].pop(),
    "outputs": lambda p: p["outputs"][0].update(shape=[2, 4, 6, 7]),
    "an output's type": lambda p: p["outputs"][0].update(dtype={"dtype": "float64"}),
    "no outputs": lambda p: p["outputs"].pop(),
    "nodes": lambda p: p["nodes"].pop(),
    "depth": lambda p: call(p).update(args=[json.loads("[" * 900 + "]" * 900)]),
    "a number": lambda p: call(p).update(args=[{"node": "conv"}, 10**4000]),
}


@pytest.mark.parametrize("name", SIZES)
def test_sizes_are_those_of_the_weights_and_the_record(name: str, pair: Path, tmp_path: Path) -> None:
    refused(changed(pair, tmp_path / "s", SIZES[name]), "stored|weights|program")


def test_sabotage_without_the_rehearsal_it_would_be_accepted(
    pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = changed(pair, tmp_path / "s", runs("aten.view.default", [2, 4, 6, 7]))
    refused(place, "does not fit at")
    monkeypatch.setattr(rehearsal, "rehearse", lambda graph, outputs: None)
    load(place)


@pytest.mark.parametrize("path", ["forward", "a'b", "x.__dict__", "_buffers", "a" * 300])
def test_weights_under_names_that_are_none(path: str, pair: Path, tmp_path: Path) -> None:
    def change(about: dict[str, Any]) -> None:
        about["kinds"][path] = about["kinds"].pop("conv.weight")
        about["tied"][path] = "conv.weight"

    refused(changed(pair, tmp_path / "s", change, KIND.manifest))


def test_a_name_that_does_not_fit_the_grammar_has_no_plain_form(tmp_path: Path) -> None:
    graph = splitfx.trace(nn.Sequential(nn.Conv2d(3, 4, 1)).eval(), torch.ones(1, 3, 4, 4))
    conv = next(node for node in graph.graph.nodes if node.op == "call_module")
    graph.add_module('0"', graph.get_submodule("0"))
    conv.target = '0"'
    with pytest.warns(UserWarning, match="unusable layer path"):
        save(graph, tmp_path / "s")


def test_inputs_of_a_folder_are_not_drawn_where_they_do_not_fit(pair: Path, tmp_path: Path) -> None:
    place = changed(pair, tmp_path / "s", lambda p: p["info"]["inputs"][0]["tensor"].update(shape=[2, 3, 10**6, 10**6]))
    with pytest.raises(ExportError, match="this machine has"):
        load(place, Pair().eval())


# ---------------------------------------------------------------- schedules of tiled stages

SCHEDULES: dict[str, Schedule] = {
    "a grid finer than the map": Schedule(tiles=(10**9, 1)),
    "columns finer than the map": Schedule(tiles=(1, 13)),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_stay_within_their_maps(name: str, tiled: Path) -> None:
    stage = next(m for m in load(tiled).modules() if isinstance(m, Tiled)).stage
    with pytest.raises(ExportError, match="cuts maps of 16x12"):
        covered.require_covered(stage, [TensorSpec((1, 3, 16, 12))], SCHEDULES[name])


@pytest.mark.parametrize("lost", ["Run", "Store", "Take"])
def test_sabotage_a_schedule_that_leaves_something_out(lost: str, tiled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = next(m for m in load(tiled).modules() if isinstance(m, Tiled)).stage
    specs, schedule = [TensorSpec((1, 3, 16, 12))], Schedule(rows=4, firing_intervals=(1, 2))
    covered.require_covered(stage, specs, schedule)
    real = Scheduler.instructions

    def without_one(self: Scheduler) -> Any:
        found = list(real(self))
        place = next(i for i, one in enumerate(found) if type(one).__name__ == lost)
        return iter(found[:place] + found[place + 1 :])

    monkeypatch.setattr(Scheduler, "instructions", without_one)
    with pytest.raises(ExportError, match="a stored schedule"):
        covered.require_covered(stage, specs, schedule)


def test_names_and_paths() -> None:
    for good in ("x", "layer_1", "größe", "_private"):
        assert names.is_name(good)
    for good in ("layer1.0.conv", "blocks.a-b.0", "_stem.conv", "x.graph"):
        assert names.is_path(good)
    for bad in (
        "",
        "a.",
        ".a",
        "a..b",
        "a'",
        'a"',
        "a\\",
        "a\nb",
        "train",
        "x.parameters",
        "x.lambda",
        ".".join("a" * 99),
    ):
        assert not names.is_path(bad)


def test_a_program_decodes_to_what_was_written(pair: Path) -> None:
    plain = json.loads((pair / PROGRAM).read_text())
    found = stored.decoded(plain)
    assert [one.name for one in found.nodes] == [one["name"] for one in plain["nodes"]]
    assert isinstance(deserialize._make_info(found).inputs[0], TensorSpec)
    assert isinstance(load(pair), fx.GraphModule)
