"""Trees of carved models: the parts are the model, exactly; branches do not see each other; what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn

import splitfx
from splitfx.errors import UnsupportedError, VerificationError
from splitfx.ir.editing import like
from splitfx.ir.graph import copy_graph
from splitfx.ir.verifier import verify
from splitfx.passes import FoldBatchNorm, SplitNet, Tile
from splitfx.splitnet import boundary
from splitfx.splitnet import tree as trees
from splitfx.splitnet.tree import MERGE, STEM, Tree, run
from tests.splitnet.carved import (
    CLASSES,
    EXACT,
    FLAT,
    NESTED,
    Gated,
    InPlace,
    Mobile,
    carved,
    image,
    off,
    unlike,
    wide,
)

BODY = {"body.2*": 2, "body.3*": 2, "fc": 2}
CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, int], dict[str, Any]]] = {
    "flat": (wide, FLAT, {}),
    "flat, ragged": (wide, FLAT, {"ragged": True}),
    "grouped boundary": (wide, FLAT, {"boundary": "grouped"}),
    "2 to 4": (wide, NESTED, {}),
    "2 to 4, ragged, grouped boundary": (wide, NESTED, {"ragged": True, "boundary": "grouped"}),
    "classifier alone": (wide, {"fc": 3}, {}),
    "in place": (lambda: unlike(InPlace()), BODY, {"ragged": True}),
    "in place, grouped boundary": (lambda: unlike(InPlace()), BODY, {"boundary": "grouped"}),
    "depthwise": (lambda: unlike(Mobile()), {"stage2.*": 2, "fc": 2}, {}),
    "relaxed gate": (lambda: unlike(Gated()), {"stage[23].*": 2, "gate.*": 2, "fc": 2}, {"gating": "relaxed"}),
}


@pytest.fixture(scope="module")
def made() -> Callable[[str], fx.GraphModule]:
    kept: dict[str, fx.GraphModule] = {}

    def get(name: str) -> fx.GraphModule:
        if name not in kept:
            model, levels, options = CASES[name]
            kept[name] = carved(model(), levels, **options)
        return kept[name]

    return get


SLOW = ("grouped boundary", "2 to 4, ragged, grouped boundary", "in place", "classifier alone")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in CASES])
def test_all_parts_together_are_the_model(made: Any, name: str) -> None:
    split, x = made(name), image()
    wanted, before = split(x), x.clone()
    assert off(Tree(split, narrow=False)(x), wanted) <= EXACT
    tree = Tree(split)
    assert off(tree(x), wanted) <= EXACT
    assert torch.equal(x, before)
    assert sum(p.macs for p in tree.parts) == splitfx.profile(split, image(2)).macs
    assert sum(p.params for p in tree.parts) == sum(p.numel() for p in split.parameters())
    everything = tree.program(range(tree.groups))
    assert everything.inputs == tree.inputs
    pieces = dict(zip(everything.outputs, everything.graph(x), strict=True))
    assert off(tree.returned(run(tree.merge, pieces)), wanted) <= EXACT


def backwards(tree: Tree, x: torch.Tensor) -> torch.Tensor:
    """The parts in another order: always the last one whose inputs are there."""
    values = tree.given((x,), {})
    left = list(tree.parts)
    while left:
        part = next(p for p in reversed(left) if set(p.inputs) <= set(values))
        values |= run(part, values)
        left.remove(part)
    return tree.returned(values)


def overwriting(split: fx.GraphModule) -> fx.GraphModule:
    """Branch 1 overwrites, in place, what branch 0 reads before it: legal in one graph, run in order."""
    changed = copy_graph(split)
    shared = next(n for n in changed.graph.nodes if str(n.target) == "stage2.0.shortcut")
    reader = list(shared.users)[-1]
    with changed.graph.inserting_before(reader):
        over = like(changed.graph.call_function(torch.ops.aten.neg_.default, (shared,)), shared)
    reader.replace_input_with(shared, over)
    verify(changed)
    changed.recompile()
    return changed


def test_parts_run_in_any_order_that_their_values_allow(made: Any) -> None:
    for split in (made("2 to 4"), made("in place, grouped boundary"), overwriting(made("flat"))):
        for narrow in (False, True):
            assert off(backwards(Tree(split, narrow), image()), split(image())) <= EXACT


def test_sabotage_parts_that_overwrite_what_others_read(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trees, "_read_elsewhere", lambda node, inside: False)
    split = overwriting(made("flat"))
    assert off(backwards(Tree(split, narrow=False), image()), split(image())) > 1e-3


def test_a_hierarchy_is_a_stem_two_trunks_and_four_branches(made: Any) -> None:
    tree = Tree(made("2 to 4"))
    names = [(p.name, p.groups) for p in tree.parts]
    assert names == [
        (STEM, (0, 1, 2, 3)),
        ("trunk 0, 1", (0, 1)),
        ("trunk 2, 3", (2, 3)),
        *((f"branch {g}", (g,)) for g in range(4)),
        (MERGE, ()),
    ]
    assert sorted(c for own in tree.classes for c in own) == list(range(CLASSES))
    assert "trunk 2, 3" in str(tree)
    branches = tree.parts[3:7]
    trunks = {name: part for part in tree.parts[1:3] for name in part.outputs}
    for g, branch in enumerate(branches):
        assert {trunks[name].name for name in branch.inputs} == {"trunk 0, 1" if g < 2 else "trunk 2, 3"}


def test_each_group_gives_the_logits_of_its_own_classes(made: Any) -> None:
    split, x = made("flat, ragged"), image()
    tree, whole = Tree(split), split(x)
    assert len({len(own) for own in tree.classes}) > 1
    for g, own in enumerate(tree.classes):
        piece = tree.program([g]).graph(x)[0]
        assert off(piece, whole[:, list(own)]) <= EXACT


def test_parameters_are_the_models_own(made: Any) -> None:
    split = made("2 to 4")
    own = {id(p) for p in split.parameters()}
    tree = Tree(split, narrow=False)
    held = [id(p) for part in tree.parts for p in part.graph.parameters()]
    assert sorted(held) == sorted(own)
    narrow = Tree(split)
    shared = {id(p) for part in narrow.parts for p in part.graph.parameters()} & own
    assert 0 < len(shared) < len(own)


def test_the_boundary_moves_out_of_the_stem(made: Any) -> None:
    """WRN: the first conv and the shortcut of stage 2, and the norm between, are divided; hand count."""
    split = made("flat")
    whole, narrow = (Tree(split, n) for n in (False, True))
    batch, pixels = 2, 8 * 8
    moved = batch * pixels * (16 * 32 * 9 + 16 * 32)  # 16 to 32 channels, 3×3 and 1×1, stride 2
    assert whole.parts[0].macs - narrow.parts[0].macs == moved
    assert [n.macs - w.macs for w, n in zip(whole.parts[1:3], narrow.parts[1:3], strict=True)] == [moved // 2] * 2
    assert narrow.parts[0].outputs != whole.parts[0].outputs
    gone = [n for n in narrow.graph.graph.nodes if "slice" in str(n.target)]
    assert not gone


def test_a_conv_in_front_of_a_depthwise_one_is_divided_with_it(made: Any) -> None:
    stem = Tree(made("depthwise")).parts[0]
    assert stem.name == STEM
    assert not any("stage2" in str(n.target) for n in stem.graph.graph.nodes)


def test_a_relaxed_gate_makes_the_stem_larger(made: Any) -> None:
    tree = Tree(made("relaxed gate"))
    names = {str(n.target) for n in tree.parts[0].graph.graph.nodes if n.op == "call_module"}
    assert tree.parts[0].name == STEM
    assert any(n.startswith("stage2") for n in names)
    assert "gate.down" in names
    assert not any(n.startswith("stage3") for n in names)


# ---------------------------------------------------------------- independence


@pytest.mark.parametrize("name", ["flat, ragged", "2 to 4", "in place, grouped boundary"])
def test_the_jacobian_between_branches_is_exactly_zero(made: Any, name: str) -> None:
    tree = Tree(made(name))
    values = _values(tree, image(2))
    for part in tree.parts[:-1]:
        own = {c for g in part.groups for c in tree.classes[g]}
        for value in (values[n] for n in part.outputs):
            seen = {c for c in range(CLASSES) if _slope(values["logits"][:, c], value) > 0}
            assert seen == own, part.name


def test_sabotage_a_branch_that_looks_into_another(made: Any) -> None:
    tree = Tree(made("flat"))
    first, second = (next(n for n in tree.graph.graph.nodes if n.name == p) for p in tree.pieces)
    with tree.graph.graph.inserting_after(second):
        leak = tree.graph.graph.call_function(torch.ops.aten.slice.Tensor, (first, 1, 0, 1))
    with tree.graph.graph.inserting_after(leak):
        mixed = tree.graph.graph.call_function(torch.ops.aten.add.Tensor, (second, leak), {"alpha": 1e-30})
    tree._joint.args = ([first, mixed], 1)
    values = _values(tree, image(2))
    assert {c for c in range(CLASSES) if _slope(values["logits"][:, c], values[first.name]) > 0} == set(range(CLASSES))


def _values(tree: Tree, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Every value of the whole graph by name, and the logits, with a graph to differentiate."""
    found: dict[str, torch.Tensor] = {}

    class Kept(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            found[n.name] = made = super().run_node(n)
            return made

    found["logits"] = Kept(tree.graph).run(x.requires_grad_())
    return found


def _slope(output: torch.Tensor, value: torch.Tensor) -> float:
    got = torch.autograd.grad(output.sum(), value, retain_graph=True, allow_unused=True)[0]
    return 0.0 if got is None else float(got.abs().max())


# ---------------------------------------------------------------- sabotage


def test_sabotage_swapped_pieces(made: Any) -> None:
    split, x = made("flat"), image()
    tree = Tree(split)
    values = tree.given((x,), {})
    for part in tree.parts[:-1]:
        values |= run(part, values)
    first, second = tree.pieces
    short = min(values[first].shape[1], values[second].shape[1])
    values[first][:, :short], values[second][:, :short] = (
        values[second][:, :short].clone(),
        values[first][:, :short].clone(),
    )
    assert off(tree.returned(values | run(tree.merge, values)), split(x)) > 1e-3


def test_sabotage_a_boundary_that_is_one_channel_off(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = boundary.found

    def shifted(graph: fx.GraphModule, needs: Any) -> Any:
        found = right(graph, needs)
        node, division = next(iter(found.items()))
        wrong = tuple((i + 1) % i.size for i in division.ins)
        return {**found, node: boundary.Division((division.ins[0], wrong[1][:-1]), division.outs)}

    monkeypatch.setattr(boundary, "found", shifted)
    with pytest.raises(VerificationError, match="broke its promise"):
        Tree(made("flat"))


# ---------------------------------------------------------------- the rest


def test_a_model_that_was_converted_since_it_was_traced() -> None:
    model = wide().float()
    graph = splitfx.trace(model, image(2).float())
    split = splitfx.transform(graph, SplitNet(levels=FLAT, boundary="full", source="random", lowering="branches"))
    split.double()
    tree = Tree(split)
    assert off(tree(image()), split(image())) <= EXACT
    with pytest.raises(UnsupportedError, match="takes 1 inputs \\(x\\); 2 given: x, argument 2"):
        tree(image(), image())


@pytest.mark.parametrize("groups", [[], [5], [-1]])
def test_groups_that_are_not_there(made: Any, groups: list[int]) -> None:
    with pytest.raises(UnsupportedError, match="the groups of this model are 0 to 1"):
        Tree(made("flat")).program(groups)


def test_a_pass_behind_the_carving() -> None:
    model, x = wide().float(), image(2).float()
    split = splitfx.transform(model, SplitNet(levels=FLAT, source="random", lowering="branches"), x)
    folded = splitfx.transform(split, FoldBatchNorm())
    assert off(Tree(folded)(x), split(x)) <= 1e-5
    with pytest.raises(UnsupportedError, match="a tiled model cannot be taken apart"):
        Tree(splitfx.transform(split, Tile(rows=4)))


def test_refusals() -> None:
    model = wide()
    with pytest.raises(UnsupportedError, match="SplitNet carved"):
        Tree(splitfx.trace(model, image(2)))
    with pytest.raises(UnsupportedError, match='SplitNet\\(..., lowering="branches"\\)'):
        Tree(carved(model, FLAT, lowering="grouped"))
    with pytest.raises(UnsupportedError, match="layer fc, is not put together.*must reach the classifier"):
        Tree(carved(model, {"stage3.*": 2}))
    with pytest.raises(UnsupportedError, match="not a splitfx graph"):
        Tree(model)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("levels", ["flat", "nested"])
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "densenet121", "shufflenet_v2_x0_5", "efficientnet_b0"])
def test_whole_models(name: str, levels: str) -> None:
    import torchvision

    torch.manual_seed(0)
    model = unlike(torchvision.models.get_model(name, weights=None, num_classes=20))
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    graph = splitfx.trace(model, x)
    depth = 6 if levels == "flat" else 0
    last = {"resnet18": {"layer3.*": 2, "layer4.*": 4, "fc": 4}}.get(name)
    if levels == "nested" and last is None:
        pytest.skip("one network stands for the hierarchy")
    given: dict[str, Any] = {"depth": depth, "groups": 2} if depth else {"levels": last}
    split = splitfx.transform(graph, SplitNet(source="random", lowering="branches", **given), verify=False)
    for narrow in (False, True):
        assert off(Tree(split, narrow)(x), split(x)) <= EXACT
