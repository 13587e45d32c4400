"""`save` and `load`: the same function back, no code from the file, and one clear line for every damage."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.nn import functional
from torch.utils import _pytree as pytree

import splitfx
from splitfx import storage
from splitfx.errors import ExportError, PlanError
from splitfx.frontend.trace import trace
from splitfx.ground.files import drafts
from splitfx.ir import graph as graphs
from splitfx.ir.graph import resolve as at
from splitfx.passes import Group
from splitfx.storage import CONSTANTS, KIND, PROGRAM, WEIGHTS, load, save
from splitfx.storage.record import NAME as RECORD
from tests.models import ZOO
from tests.traced import made_once


class Odd(nn.Module):
    """Shared module, tied and computed weights, an unsaved buffer, a plain tensor, a keyword input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.same = self.norm
        self.first = nn.Linear(4, 4, bias=False)
        self.second = nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight
        self.drop = nn.Dropout(0.5)
        self.kernel = nn.Parameter(torch.randn(4, 4, 3, 3))
        self.register_buffer("scale", torch.rand(4), persistent=False)
        self.offset = torch.arange(4.0)

    def forward(self, image: torch.Tensor, *, extra: list[torch.Tensor]) -> dict[str, object]:
        x = self.norm(self.conv(image))
        x = self.same(functional.conv2d(x, self.kernel * 2, padding=1)).mean((2, 3))
        x = self.drop(self.second(self.first(x))) * self.scale + self.offset
        return {"sum": x + extra[0], "parts": [x.view(x.shape[0], 2, 2), (x,)]}


@pytest.fixture
def odd() -> fx.GraphModule:
    return _odd()


@made_once
def _odd() -> fx.GraphModule:
    model = Odd()
    model.conv.bias.requires_grad_(False)  # type: ignore[union-attr]
    return trace(model, ((torch.randn(1, 3, 6, 6),), {"extra": [torch.randn(1, 4)]}))


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return save(_small(), tmp_path / "split")


@made_once
def _small() -> fx.GraphModule:
    return trace(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), torch.randn(1, 3, 6, 6))


def same(one: fx.GraphModule, other: fx.GraphModule) -> bool:
    args, kwargs = graphs.random_inputs(one)
    left, right = (pytree.tree_flatten(g.eval()(*args, **kwargs)) for g in (one, other))
    return left[1] == right[1] and all(map(torch.equal, left[0], right[0]))


def test_a_write_through_a_view_is_known_after_loading(tmp_path: Path) -> None:
    graph = trace(*ZOO["in_place_views"]())
    marked = lambda g: {n.name for n in g.graph.nodes if n.meta.get("writes_view")}  # noqa: E731
    assert marked(graph)
    assert marked(load(save(graph, tmp_path / "split"))) == marked(graph)


def test_without_the_model(odd, tmp_path: Path) -> None:
    loaded = load(save(odd, tmp_path / "split"))
    assert same(odd, loaded)
    assert not loaded.training
    assert list(loaded.state_dict()) == list(odd.state_dict())
    assert all(torch.equal(one, loaded.state_dict()[key]) for key, one in odd.state_dict().items())
    assert at(loaded, "first.weight") is at(loaded, "second.weight")
    assert at(loaded, "norm") is at(loaded, "same")
    assert not at(loaded, "conv.bias").requires_grad
    assert at(loaded, "conv.weight").requires_grad
    batch = graphs.random_inputs(odd, batch=5)
    assert loaded(*batch[0], **batch[1])["sum"].shape == (5, 4)


def test_with_the_model_gives_trained_weights_and_leaves_the_model_alone(odd, tmp_path: Path) -> None:
    with torch.no_grad():
        at(odd, "conv.weight").add_(1)
    save(odd, tmp_path / "split")
    fresh = Odd()
    fresh.scale, fresh.offset = odd.scale, odd.offset  # not in a state_dict, so the user's model brings them
    before = fresh.conv.weight.clone()
    loaded = load(tmp_path / "split", fresh)
    assert same(odd, loaded)
    assert torch.equal(fresh.conv.weight, before)


def test_frozen_parameters_stay_frozen_with_the_model(odd, tmp_path: Path) -> None:
    at(odd, "first.weight").requires_grad_(False)  # tied to second.weight
    save(odd, tmp_path / "split")
    fresh = Odd()
    fresh.kernel.requires_grad_(False)  # trained in the folder
    loaded = load(tmp_path / "split", fresh)
    trained = {name: one.requires_grad for name, one in odd.named_parameters(remove_duplicate=False)}
    assert {name: one.requires_grad for name, one in loaded.named_parameters(remove_duplicate=False)} == trained
    assert not any(trained[name] for name in ("conv.bias", "first.weight", "second.weight"))
    assert trained["kernel"]
    assert fresh.conv.bias is not None
    assert fresh.conv.bias.requires_grad
    assert not fresh.kernel.requires_grad


def test_a_frozen_split_stays_frozen_with_the_model(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.MaxPool2d(2)).eval()
    split = splitfx.transform(model, Group(factors=(2,)), torch.randn(1, 3, 12, 12))
    for name, one in split.named_parameters():
        one.requires_grad_("bias" in name)
    trained = {name: one.requires_grad for name, one in split.named_parameters()}
    folder = save(split, tmp_path / "split")
    for loaded in (load(folder), load(folder, model)):
        assert {name: one.requires_grad for name, one in loaded.named_parameters()} == trained
    assert all(one.requires_grad for one in model.parameters())


def test_loaded_twice_and_trained(odd, tmp_path: Path) -> None:
    again = load(save(load(save(odd, tmp_path / "one")), tmp_path / "two"))
    assert same(odd, again)
    args, kwargs = graphs.random_inputs(again, batch=4)
    before = int(at(again, "norm.num_batches_tracked"))
    again.train()(*args, **kwargs)["sum"].sum().backward()
    assert at(again, "kernel").grad is not None
    assert at(again, "first.weight").grad is not None
    assert at(again, "conv.bias").grad is None
    assert int(at(again, "norm.num_batches_tracked")) == before + 2  # one module, called twice, in train mode


def test_weights_are_stored_once_and_without_local_paths(odd, tmp_path: Path) -> None:
    folder = save(odd, tmp_path / "split")
    assert sorted(one.name for one in folder.iterdir()) == sorted([KIND.manifest, PROGRAM, WEIGHTS, CONSTANTS, RECORD])
    for name in (KIND.manifest, PROGRAM, RECORD):
        text = (folder / name).read_text()
        assert ".py" not in text
        assert str(Path(__file__).parent) not in text
        assert str(tmp_path) not in text
    assert "second.weight" not in storage._tensors(folder / WEIGHTS)


def test_no_class_of_the_user_is_needed(odd, tmp_path: Path) -> None:
    save(odd, tmp_path / "split")
    code = "import sys, splitfx.storage as s; s.load(sys.argv[1]); assert 'torchvision' not in sys.modules"
    root = str(Path(storage.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "split")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": root},
    )
    assert done.returncode == 0, done.stderr


class UserDropPath(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.bernoulli(torch.full_like(x[:1], 0.5)) if self.training else x


class UserScale(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if self.training else x * 3


def test_a_users_layer_that_acts_in_training_only(tmp_path: Path) -> None:
    graph = trace(nn.Sequential(nn.Conv2d(3, 4, 3), UserDropPath()), torch.randn(1, 3, 6, 6))
    assert same(graph, load(save(graph, tmp_path / "split")))


def test_a_users_layer_without_plain_form(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), UserScale())
    graph = trace(model, torch.randn(1, 3, 6, 6))
    with pytest.warns(UserWarning, match="UserScale"):
        folder = save(graph, tmp_path / "split")
    with pytest.raises(ExportError, match=r"UserScale.*load\(folder, model\)"):
        load(folder)


class OwnNames(nn.Module):
    """Batch norm on tensors under the user's own names: the graph has a layer of splitfx's for it."""

    average: torch.Tensor
    spread: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.gain, self.shift = nn.Parameter(torch.rand(3)), nn.Parameter(torch.rand(3))
        self.register_buffer("average", torch.rand(3))
        self.register_buffer("spread", torch.rand(3) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.batch_norm(x, self.average, self.spread, self.gain, self.shift, self.training)


def test_functional_batch_norm(tmp_path: Path) -> None:
    graph = trace(OwnNames(), torch.randn(2, 3, 6, 6))
    loaded = load(save(graph, tmp_path / "split"))
    assert same(graph, loaded)
    x = torch.randn(4, 3, 6, 6)
    assert torch.equal(graph.train()(x), loaded.train()(x))
    assert torch.equal(at(graph, "average"), at(loaded, "average"))


def test_a_plan_is_replayed_and_its_weights_put_in(tmp_path: Path) -> None:
    from splitfx.compiler.plan import Plan
    from splitfx.compiler.transform import transform
    from splitfx.passes.group import Group

    def model() -> nn.Module:
        convs = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
        return nn.Sequential(convs, nn.MaxPool2d(2), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    plan = Plan([Group(factors=(2, 1), lowering="branches")], input_shape=(1, 3, 16, 16))
    split = transform(model(), plan)
    with torch.no_grad():
        next(split.parameters()).add_(1)  # trained since
    folder = save(split, tmp_path / "split")
    fresh = load(folder, model())
    assert same(split, fresh)
    assert graphs.info(fresh).plan == plan
    assert graphs.info(load(folder)).plan == plan
    (folder / "plan.toml").write_text("format = 99\n" + (folder / "plan.toml").read_text().partition("\n")[2])
    with pytest.raises(PlanError):
        load(folder, model())


# ---------------------------------------------------------------- nothing is executed

ATTACKS = {
    "function": lambda p: p["nodes"][1].update(op="call_function", target="torch.os.system", args=["touch pwned"]),
    "operator": lambda p: p["nodes"][1].update(op="call_function", target="operator.attrgetter", args=["x"]),
    "namespace": lambda p: p["nodes"][1].update(op="call_function", target="c10d.allreduce_.default", args=[]),
    "file": lambda p: p["nodes"][1].update(op="call_function", target="aten.from_file.default", args=["/etc/hostname"]),
    "method": lambda p: p["nodes"][1].update(op="call_method", target="numpy"),
    "layer": lambda p: p["layers"]["0"].update({"class": "builtins.exec"}),
    "option": lambda p: p["layers"]["0"]["options"].update({"_weight": 1}),
    "path": lambda p: p["nodes"][1].update(target='0"); import os; os.system("touch pwned"); ("'),
    "name": lambda p: p["nodes"][1].update(name="x; import os"),
    "input": lambda p: p["nodes"][0].update(target="x=__import__('os').system('touch pwned')"),
    "dtype": lambda p: p["nodes"][1].update(args=[{"dtype": "load"}]),
    "class": lambda p: p["info"].update(model_class="X: pass\nimport os"),
    "tree": lambda p: p.update(tree={"args": ["y): pass\nimport os #"], "in": "*", "out": "*"}),
    "attribute": lambda p: p["nodes"][1].update(op="get_attr", target="state_dict", args=[]),
    "alias": lambda p: p["info"].update(aliases={"train": "state_dict"}),
    "nesting": lambda p: p["nodes"][1].update(args=[json.loads("[" * 900 + "]" * 900)]),
    "container": lambda p: p["info"].update(in_spec={"namedtuple": ["X Y", ["a"], ["*"]]}),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_forged_program_is_refused(small: Path, attack: str, monkeypatch) -> None:
    monkeypatch.chdir(small.parent)
    plain = json.loads((small / PROGRAM).read_text())
    ATTACKS[attack](plain)
    (small / PROGRAM).write_text(json.dumps(plain) + " " * 4096)
    with pytest.raises(ExportError, match="stored") as caught:
        load(small)
    assert "\n" not in str(caught.value)
    assert not Path("pwned").exists()


# ---------------------------------------------------------------- damage


@pytest.mark.parametrize("name", [KIND.manifest, PROGRAM, WEIGHTS])
@pytest.mark.parametrize("size", [0, 60, None])
def test_empty_truncated_and_missing_files(small: Path, name: str, size: int | None) -> None:
    one = small / name
    content = one.read_bytes()
    one.unlink()
    if size is not None:
        one.write_bytes(content[:size])
    with pytest.raises(ExportError, match=name) as caught:
        load(small)
    assert "\n" not in str(caught.value)


def test_garbage_of_the_right_size(small: Path) -> None:
    for name in (PROGRAM, WEIGHTS):
        one = small / name
        content = one.read_bytes()
        one.write_bytes(b"\xff" * len(content))
        with pytest.raises(ExportError, match=name):
            load(small)
        one.write_bytes(content)


MANIFESTS = {
    "keys": lambda a: a["keys"].append(["a"]),
    "tied": lambda a: a["tied"].update({a["keys"][0]: [1]}),
    "kinds": lambda a: a["kinds"].update({a["keys"][0]: ["x"]}),
    "kinds of another name": lambda a: a["kinds"].update({a["keys"][0]: "weight"}),
    "1.num_batches_tracked is a parameter of int64": lambda a: a["kinds"].update({a["keys"][-1]: "parameter"}),
}


@pytest.mark.parametrize("what", MANIFESTS)
def test_a_manifest_with_values_of_other_types(tmp_path: Path, what: str) -> None:
    graph = trace(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval(), torch.randn(1, 3, 6, 6))
    folder = save(graph, tmp_path / "split")
    about = json.loads((folder / KIND.manifest).read_text())
    MANIFESTS[what](about)
    (folder / KIND.manifest).write_text(json.dumps(about))
    with pytest.raises(
        ExportError, match=f"{KIND.manifest} is damaged: .*{what.partition(' of another')[0]}"
    ) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["y" * 5000, "../a", "a/b", "\ud800", "", "..", 7])
def test_a_manifest_names_files_of_its_folder_only(small: Path, name: Any) -> None:
    with pytest.raises(ExportError, match=r"is no file of this folder\.$") as caught:
        KIND.held_file(small, name, 1)
    assert len(str(caught.value)) < 600


def test_a_newer_format_and_no_folder(small: Path) -> None:
    about = json.loads((small / KIND.manifest).read_text())
    (small / KIND.manifest).write_text(json.dumps({**about, "format": 99}))
    with pytest.raises(ExportError, match="format 99.*newer splitfx"):
        load(small)
    with pytest.raises(ExportError, match="no folder"):
        load(small / "none")


def test_weights_of_another_model_list_the_first_differences(small: Path) -> None:
    with pytest.raises(ExportError, match=r"0\.weight is \[4, 3, 3, 3\] in the folder, \[5, 3, 3, 3\] in the model"):
        load(small, nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU()))
    with pytest.raises(ExportError, match=r"1\.weight is missing"):
        load(small, nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))


def test_weights_of_another_dtype_are_not_converted(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.MaxPool2d(2)).eval()
    split = splitfx.transform(model, Group(factors=(2,)), torch.randn(1, 3, 12, 12))
    folder = save(split.bfloat16(), tmp_path / "split")
    with pytest.raises(ExportError, match=r"weight is bfloat16 in the folder, float32 in the model"):
        load(folder, model)
    assert {one.dtype for one in load(folder).parameters()} == {torch.bfloat16}


def test_weights_exchanged_under_the_program(small: Path) -> None:
    from safetensors.torch import save_file

    save_file({"0.weight": torch.zeros(4, 3, 5, 5), "0.bias": torch.zeros(4)}, small / WEIGHTS)
    with pytest.raises(ExportError, match=r"0\.weight is \[4, 3, 5, 5\]"):
        load(small)
    save_file({"0.weight": torch.zeros(4, 3, 3, 3), "other": torch.zeros(400)}, small / WEIGHTS)
    with pytest.raises(ExportError, match=r"0\.bias"):
        load(small)


# ---------------------------------------------------------------- where it is written


def test_an_existing_folder(small: Path) -> None:
    graph = trace(nn.Linear(3, 3), torch.randn(1, 3))
    with pytest.raises(ExportError, match="already exists"):
        save(graph, small)
    assert "0.weight" in load(small).state_dict()
    save(graph, small, overwrite=True)
    assert "weight" in load(small).state_dict()
    assert [one.name for one in small.parent.iterdir()] == [small.name]


def test_a_folder_with_other_files_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(ExportError, match="is no folder of splitfx.save; it is not replaced"):
        save(trace(nn.Linear(3, 3), torch.randn(1, 3)), tmp_path, overwrite=True)
    assert (tmp_path / "thesis.tex").read_text() == "mine"


@pytest.mark.parametrize("existing", [False, True])
def test_a_failed_save_leaves_the_place_as_it_was(small: Path, monkeypatch, existing: bool) -> None:
    target = small if existing else small.parent / "new"
    before = {one.name: one.read_bytes() for one in small.iterdir()}

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage, "_save_tensors", full)
    with pytest.raises(ExportError, match="No space left"):
        save(trace(nn.Linear(3, 3), torch.randn(1, 3)), target, overwrite=True)
    assert {one.name: one.read_bytes() for one in small.iterdir()} == before
    assert [one.name for one in small.parent.iterdir()] == [small.name]


def test_a_failed_move_puts_the_old_folder_back(small: Path, monkeypatch) -> None:
    put = drafts.put

    def fail_at_the_end(draft: Path, target: Path) -> None:
        if draft.parent.name == drafts.NEW and target == small:
            raise OSError(5, "Input/output error")
        put(draft, target)

    monkeypatch.setattr(drafts, "exchange", lambda one, other: False)
    monkeypatch.setattr(drafts, "put", fail_at_the_end)
    with pytest.raises(ExportError, match="Input/output error"):
        save(trace(nn.Linear(3, 3), torch.randn(1, 3)), small, overwrite=True)
    assert "0.weight" in load(small).state_dict()


def test_not_writable_missing_parent_and_not_a_graph(tmp_path: Path, monkeypatch) -> None:
    graph = trace(nn.Linear(3, 3), torch.randn(1, 3))
    with pytest.raises(ExportError, match="does not exist"):
        save(graph, tmp_path / "a" / "b")
    with pytest.raises(ExportError, match="result of transform or trace"):
        save(nn.Linear(3, 3), tmp_path / "x")  # type: ignore[arg-type]
    monkeypatch.setattr(os, "access", lambda *args: False)  # root may write anywhere, so chmod shows nothing
    with pytest.raises(ExportError, match="not writable"):
        save(graph, tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_how_it_was_made_is_kept(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.MaxPool2d(2)).eval()
    split = splitfx.transform(model, Group(factors=(2,)), torch.randn(1, 3, 12, 12))
    read = load(save(split, tmp_path / "split"))
    assert splitfx.explain(read).steps == splitfx.explain(split).steps
