"""Groups of unequal size padded with zeros: the same function, grouped convolutions, and zeros that stay zero."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import fx, nn

import splitfx
from splitfx.carving import narrow
from splitfx.compiler.pipeline import run_pass
from splitfx.errors import VerificationError
from splitfx.ir.ops.families import norms
from splitfx.passes import SplitNet
from splitfx.splitnet import Assignment, random, structure
from splitfx.splitnet.padding import Padding
from tests.splitnet.networks import CASES, ragged, traced
from tests.splitnet.test_carving import EXACT, each, error, masked_by_hand


@each
def test_padding_is_exact(name: str) -> None:
    graph, size = traced(name), CASES[name][1]
    x = torch.randn(2, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for levels in CASES[name][2:]:
        found = structure(graph, levels)
        given = ragged(found)
        split, _ = run_pass(graph, SplitNet(given, levels=levels, lowering="padded"))
        assert error(split, masked_by_hand(graph, found, given.labels()), x) <= EXACT


@pytest.mark.parametrize("name", ["wrn", "resnet18"])
def test_padded_layers_are_grouped_and_nothing_is_gathered(name: str) -> None:
    graph = traced(name)
    for levels in CASES[name][2:]:
        found = structure(graph, levels)
        split = splitfx.transform(graph, SplitNet(ragged(found), levels=levels, lowering="padded"))
        for one in found.splits:
            path = str(one.edge.node.target)
            if isinstance(graph.get_submodule(path), nn.Conv2d):
                conv = split.get_submodule(path)
                assert isinstance(conv, nn.Conv2d)
                assert conv.groups == one.level
        assert sum("index_select" in str(n.target) for n in split.graph.nodes) == 1  # the logits, in the user's order
        assert "are padded to" in str(splitfx.explain(split))


def test_padding_with_other_than_zeros_is_red(monkeypatch: pytest.MonkeyPatch) -> None:
    real = narrow.grown
    for module in (narrow, norms):
        monkeypatch.setattr(module, "grown", lambda tensor, places, dim=0, fill=0.0: real(tensor, places, dim, 0.5))
    graph = traced("wrn")
    with pytest.raises(VerificationError):
        run_pass(graph, SplitNet(ragged(structure(graph, CASES["wrn"][2])), levels=CASES["wrn"][2], lowering="padded"))


class Plain(nn.Module):
    """Convs, a norm, a depthwise conv, a concat, a PReLU and a flattened map: all that padding follows."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3)
        self.one, self.norm, self.two = nn.Conv2d(6, 7, 3, padding=1), nn.BatchNorm2d(7), nn.Conv2d(6, 5, 1)
        self.act, self.depthwise = nn.PReLU(12), nn.Conv2d(12, 24, 3, padding=1, groups=12)
        self.last, self.fc = nn.ConvTranspose2d(24, 9, 2), nn.Linear(9 * 7 * 7, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        x = self.depthwise(self.act(torch.cat([torch.relu(self.norm(self.one(x))), self.two(x)], 1)))
        return self.fc(torch.relu(self.last(x)).flatten(1))


LEVELS = {"one": 2, "two": 2, "last": 2, "fc": 2}


def plain() -> tuple[fx.GraphModule, Assignment]:
    torch.manual_seed(0)
    graph = splitfx.trace(Plain().eval(), torch.zeros(1, 3, 8, 8))
    labels = {n: np.arange(v.size) % 3 % 2 for n, v in structure(graph, LEVELS).vectors.items()}
    return graph, Assignment(labels)


def test_concat_depthwise_transposed_and_flattened() -> None:
    graph, given = plain()
    split, _ = run_pass(graph, SplitNet(given, levels=LEVELS, lowering="padded"))
    kinds = {n: m for n, m in split.named_modules() if isinstance(m, nn.modules.conv._ConvNd)}
    assert kinds["one"].groups == kinds["last"].groups == 2
    assert kinds["one"].out_channels == 10  # 7 channels: groups of 5 and 2
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    assert error(split, masked_by_hand(graph, structure(graph, LEVELS), given.labels()), x) <= EXACT


def test_zeros_stay_zero_in_training() -> None:
    graph, given = plain()
    split, _ = run_pass(graph, SplitNet(given, levels=LEVELS, lowering="padded"))
    before = {n: int((p == 0).sum()) for n, p in split.named_parameters() if p.dim() > 1}
    assert sum(before.values()) > 50
    split.train()
    optimiser = torch.optim.SGD(split.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    for step in range(5):
        x = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(step))
        nn.functional.cross_entropy(split(x), torch.arange(8) % 6).backward()
        optimiser.step()
        optimiser.zero_grad()
    assert {n: int((p == 0).sum()) for n, p in split.named_parameters() if p.dim() > 1} == before


@pytest.mark.parametrize(("grouped", "wanted"), [(1.0, "padded"), (3.0, "branches")])
def test_padded_when_measured_faster(grouped: float, wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import splitfx.passes.splitnet as module

    monkeypatch.setattr(module, "lowering_seconds", lambda *given: (grouped, 2.0))
    graph = traced("wrn")
    given = ragged(structure(graph, CASES["wrn"][2]))
    split = splitfx.transform(graph, SplitNet(given, levels=CASES["wrn"][2]))
    assert f"{wanted}; measured: padded" in str(splitfx.explain(split))
    grouped_convs = [m for m in split.modules() if isinstance(m, nn.Conv2d) and m.groups == 2]
    assert bool(grouped_convs) == (wanted == "padded")


def test_what_stays_ragged_says_why() -> None:
    graph, levels = traced("shufflenet_v2"), CASES["shufflenet_v2"][2]
    found = structure(graph, levels)
    padding = Padding(found, ragged(found).labels())
    assert any("its groups are not padded" in n.what and "anew" in n.what for n in padding.notes)
    assert not Padding(found, random(graph, levels).labels()).added  # equal groups need nothing


class Twice(nn.Module):
    """One layer on two different vectors: wider in one place, it would no longer fit the other."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.shared = nn.Conv2d(3, 6, 1), nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 1)
        self.fc = nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.cat([self.shared(self.a(x)), self.shared(self.b(x))], 1).mean((2, 3)))


def test_a_shared_layer() -> None:
    graph = splitfx.trace(Twice().eval(), torch.zeros(1, 3, 4, 4))
    levels: dict[str, Any] = {"shared": 2, "fc": 2}
    found = structure(graph, levels)
    labels = {n: np.arange(v.size) % 3 % 2 for n, v in found.vectors.items()}
    split, _ = run_pass(graph, SplitNet(Assignment(labels), levels=levels, lowering="padded"))
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    assert error(split, masked_by_hand(graph, found, labels), x) <= EXACT


def test_saved_and_loaded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Plain().eval(), torch.randn(2, 3, 8, 8)
    given = plain()[1]
    split = splitfx.transform(model, SplitNet(given, levels=LEVELS, lowering="padded"), x)
    splitfx.save(split, tmp_path / "split")
    for loaded in (splitfx.load(tmp_path / "split"), splitfx.load(tmp_path / "split", model)):
        torch.testing.assert_close(loaded.eval()(x), split.eval()(x), rtol=0, atol=1e-6)
