"""A carved network is the masked one: by hand-made masks on the user's own modules, in float64."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import fx, nn
from torchvision.models import DenseNet

import splitfx
from splitfx.carving import narrow
from splitfx.compiler.pipeline import run_pass
from splitfx.errors import PlanError, VerificationError
from splitfx.ir.graph import copy_graph, layer
from splitfx.passes import SplitNet
from splitfx.splitnet import random, structure
from splitfx.splitnet.structure import Structure
from tests.splitnet.networks import CASES, ragged, traced

EXACT = 1e-12
SAMPLE = ("wrn", "resnet18", "vit")  # whole networks take their time; the others are slow tests
each = pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in SAMPLE else pytest.mark.slow) for n in CASES])


def masked_by_hand(graph: fx.GraphModule, found: Structure, labels: dict[str, Any]) -> fx.GraphModule:
    """A copy whose weights are zeroed one by one where input and output are in different groups."""
    made = copy_graph(graph)
    for split in found.splits:
        if split.edge.groups > 1:
            continue
        module: Any = made.get_submodule(str(split.edge.node.target))
        ins = found.along(split.edge.ins, labels, split.level)
        outs = found.along(split.edge.outs, labels, split.level)
        removed = (outs[:, None] != ins[None]) & (ins[None] >= 0)
        weight = module.weight.transpose(0, 1) if narrow.transposed(module) else module.weight
        with torch.no_grad():
            weight[torch.from_numpy(removed)] = 0
    return made


def error(a: fx.GraphModule, b: fx.GraphModule, x: torch.Tensor) -> float:
    with torch.no_grad():
        got, wanted = a.double().eval()(x), b.double().eval()(x)
    return float((got - wanted).abs().max() / wanted.abs().max())


@each
@pytest.mark.parametrize("lowering", ["grouped", "branches"])
@pytest.mark.parametrize("equal", [True, False], ids=["equal", "ragged"])
def test_carving_is_exact(name: str, lowering: Any, equal: bool) -> None:
    graph = traced(name)
    size = CASES[name][1]
    x = torch.randn(2, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for levels in CASES[name][2:]:
        found = structure(graph, levels)
        given = random(graph, levels) if equal else ragged(found)
        split, _ = run_pass(graph, SplitNet(given, levels=levels, lowering=lowering))
        reference = masked_by_hand(graph, found, given.labels())
        assert error(split, reference, x) <= EXACT
        count = lambda g: sum(p.numel() for p in g.parameters())  # noqa: E731
        assert count(split) < count(graph)


def test_swapped_blocks_are_red() -> None:
    """The oracle sees two groups that are exchanged in one layer."""
    graph = traced("wrn")
    levels = CASES["wrn"][2]
    found = structure(graph, levels)
    given = random(graph, levels)
    wrong = {n: 1 - np.array(v) if n == "stage3.1.conv1" else np.array(v) for n, v in given.items()}
    split, _ = run_pass(graph, SplitNet(given, levels=levels, lowering="branches"))
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    assert error(copy.deepcopy(split), masked_by_hand(graph, found, given.labels()), x) <= EXACT
    assert error(split, masked_by_hand(graph, found, wrong), x) > 1e-3


def test_the_pipeline_sees_swapped_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A carver that exchanges the inputs of two groups does not get past the pipeline."""
    import splitfx.passes.splitnet as module

    real = module.carve

    def swapped(graph: fx.GraphModule, divisions: Any, lowering: Any) -> Any:
        node, division = next((n, d) for n, d in divisions.items() if len(d.ins) == 2 and layer(n) == "stage3.1.conv2")
        other = type(division)(division.ins[::-1], division.outs)
        return real(graph, {**divisions, node: other}, lowering)

    monkeypatch.setattr(module, "carve", swapped)
    with pytest.raises(VerificationError):
        run_pass(traced("wrn"), SplitNet(levels=CASES["wrn"][2], source="random", lowering="branches"))


def test_branches_do_not_see_each_other() -> None:
    """The gradient of one group's logits in the weights of another group's layers is exactly zero."""
    graph = traced("wrn")
    levels = CASES["wrn"][3]
    given = random(graph, levels)
    split, _ = run_pass(graph, SplitNet(given, levels=levels, lowering="branches"))
    split = split.double()
    for parameter in split.parameters():
        parameter.requires_grad_(True)
    logits = split(torch.randn(2, 3, 32, 32, dtype=torch.float64))
    groups = np.array(given["fc"])
    split.zero_grad()
    logits[:, torch.from_numpy(np.flatnonzero(groups == 1))].square().sum().backward()
    for path, parameter in split.named_parameters():
        if "stage3.1.conv" not in path and not path.startswith("fc.branch"):
            continue
        own = "branch1" in path
        reached = parameter.grad is not None and bool((parameter.grad != 0).any())
        assert reached == own, path


@pytest.mark.parametrize("boundary", ["grouped", "full"])
def test_the_boundary_keeps_what_it_reads(boundary: Any) -> None:
    found = structure(traced("wrn"), CASES["wrn"][3], boundary=boundary)
    level = {layer(s.edge.node): s.level for s in found.splits}
    if boundary == "full":
        assert "stage2.0.conv1" not in level
        assert level["stage3.0.conv1"] == level["stage3.0.shortcut"] == 2
    else:
        assert level["stage2.0.conv1"] == level["stage2.0.shortcut"] == 2
        assert level["stage3.0.conv1"] == level["stage3.0.shortcut"] == 4
    assert level["stage3.0.conv2"] == level["fc"] == 4


def test_groups_nest() -> None:
    """Five groups merge into 3 + 2 at a coarser layer, and each coarse group is a union of fine ones."""
    found = structure(traced("wrn"), {"stage3.*": 2, "fc": 5})
    vector = found.vectors["stage3.0.shortcut"]
    assert vector.level == 5
    assert found.merged(vector, 2).tolist() == [0, 0, 0, 1, 1]


def test_no_gather_but_the_logits() -> None:
    """Equal groups cost no gather at run time: one puts the logits in the user's order."""
    for name in ("wrn", "resnet18"):
        split, _ = run_pass(traced(name), SplitNet(levels=CASES[name][3], source="random", lowering="grouped"))
        assert sum("index_select" in str(n.target) for n in split.graph.nodes) == 1


def test_a_concat_is_not_gathered() -> None:
    """Grouped convs behind a concat need a permuted copy of it: left to choose, they become branches, which do not."""
    model = DenseNet(growth_rate=16, block_config=(2, 2, 2, 3), num_init_features=16, num_classes=10)
    graph = splitfx.trace(model.eval(), torch.zeros(1, 3, 32, 32))
    step = SplitNet(levels=CASES["densenet121"][2], source="random")
    split = splitfx.transform(graph, step, verify=False)
    assert sum("index_select" in str(n.target) for n in split.graph.nodes) == 1
    assert "would have to gather" in str(splitfx.explain(split))


def test_tokens_stay_as_they_lie() -> None:
    """Norms, residuals and views take tokens in the order of the groups. Gathered are parameters, the class token and
    the positions, and what the joint in-projection of a block reads, whose weight is no layer's."""
    split, _ = run_pass(traced("vit"), SplitNet(levels=CASES["vit"][3], source="random", lowering="branches"))
    users = [
        {str(u.target).split(".")[1] for u in n.users} for n in split.graph.nodes if "index_select" in str(n.target)
    ]
    assert sorted(next(iter(one)) for one in users) == ["add", "cat", "linear", "linear", "linear"]


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.head(self.head(self.body(x))).mean((2, 3)))


def test_a_shared_layer_is_carved_once() -> None:
    graph = splitfx.trace(Tiny(), torch.zeros(1, 3, 9, 9))
    split, _ = run_pass(graph, SplitNet(levels={"head": 2, "fc": 2}, source="random", lowering="grouped"))
    held = [m for m in split.modules() if isinstance(m, nn.Conv2d) and m.groups == 2]
    assert len(held) == 1


def test_saved_and_replayed(tmp_path: Any) -> None:
    """The assignment travels in the plan: a saved split is built again with and without the model."""
    torch.manual_seed(0)
    model, x = Tiny().eval(), torch.randn(2, 3, 9, 9)
    plan = splitfx.Plan([SplitNet(levels={"head": 2, "fc": 2}, source="random", classes=("a", "b", "c", "d"))])
    split = splitfx.transform(model, plan, x)
    splitfx.save(split, tmp_path / "split")
    text = (tmp_path / "split" / "plan.toml").read_text()
    assert "assignment" in text
    for loaded in (splitfx.load(tmp_path / "split"), splitfx.load(tmp_path / "split", model)):
        torch.testing.assert_close(loaded.eval()(x), split.eval()(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"boundary": "full"}, "boundary is 'full', but the assignment was made for levels=.*: leave boundary out"),
        ({"levels": {"fc": 2}}, "levels is {'fc': 2}, but the assignment was made for"),
        ({"depth": 2, "groups": 2}, "depth is 2, but the assignment was made for"),
    ],
)
def test_options_that_the_assignment_was_not_made_for(options: Any, said: str) -> None:
    given = random(traced("wrn"), CASES["wrn"][2])
    with pytest.raises(PlanError, match=said):
        SplitNet(given, **options)
    assert SplitNet(given, levels=CASES["wrn"][2]).levels == CASES["wrn"][2]


@pytest.mark.parametrize("lowering", ["grouped", "branches"])
def test_weights_stay_channels_last(lowering: Any) -> None:
    last = torch.channels_last
    graph = splitfx.trace(Tiny().eval().to(memory_format=last), torch.zeros(1, 3, 9, 9).contiguous(memory_format=last))
    split, _ = run_pass(graph, SplitNet(levels={"head": 2, "fc": 2}, source="random", lowering=lowering))
    weights = [m.weight for m in split.modules() if isinstance(m, nn.Conv2d)]
    assert all(w.is_contiguous(memory_format=last) for w in weights)
