"""Assignments by chance, taxonomy, clustering and weights, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import adjusted_rand_score
from torch import fx, nn

import splitfx
from splitfx import splitnet
from splitfx.compiler.pipeline import run_pass
from splitfx.errors import PlanError, UnsupportedError
from splitfx.passes import SplitNet
from splitfx.splitnet import Assignment, structure
from splitfx.splitnet.assignment import checked, kept
from splitfx.splitnet.balance import balanced, capacities
from splitfx.splitnet.sources import in_proportion
from tests.splitnet.networks import traced

LEVELS = {"2": 2, "5": 4, "8": 4}
NAMES = tuple("abcdefgh")
TAXONOMY = {"first": {"x": ["a", "c"], "y": ["e", "g"]}, "second": {"x": ["b", "d"], "y": ["f", "h"]}}


def network(classes: int = 8, dtype: torch.dtype = torch.float32) -> fx.GraphModule:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 12, 3), nn.ReLU(), nn.Conv2d(12, 16, 3), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 24, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, classes),
    )  # fmt: skip
    return splitfx.trace(model.eval().to(dtype), torch.zeros(1, 3, 12, 12, dtype=dtype))


def planted(graph: fx.GraphModule, levels: Any, ratio: float, seed: int = 0) -> Assignment:
    """Balanced groups drawn at random, in which the weights are ``ratio`` times as large as outside."""
    found = structure(graph, levels)
    truth = splitnet.random(graph, levels, seed=seed)
    for split in found.splits:
        labels = truth.labels()
        ins = found.along(split.edge.ins, labels, split.level)
        outs = found.along(split.edge.outs, labels, split.level)
        weight: Any = graph.get_submodule(str(split.edge.node.target)).weight
        with torch.no_grad():
            weight.normal_(generator=torch.Generator().manual_seed(seed))
            weight[torch.from_numpy(outs[:, None] == ins[None])] *= ratio
    return truth


def test_random_groups_are_equal() -> None:
    given = splitnet.random(network(), LEVELS)
    for labels in given.values():
        counts = np.bincount(labels)
        assert counts.max() - counts.min() <= 1
    assert given == splitnet.random(network(), LEVELS)
    assert given != splitnet.random(network(), LEVELS, seed=1)


def test_a_taxonomy_fills_the_groups(tmp_path: Any) -> None:
    path = tmp_path / "taxonomy.json"
    path.write_text(json.dumps(TAXONOMY))
    for taxonomy in (TAXONOMY, path):
        given = splitnet.semantic(network(), taxonomy, NAMES, LEVELS)
        groups = [{NAMES[i] for i in np.flatnonzero(np.array(given["8"]) == g)} for g in range(4)]
        assert groups == [{"a", "c"}, {"e", "g"}, {"b", "d"}, {"f", "h"}]
        assert len(given["2"]) == 16
        assert np.bincount(given["2"]).tolist() == [4, 4, 4, 4]


def test_channels_in_proportion() -> None:
    assert np.bincount(in_proportion(10, np.array([1.0, 3.0, 6.0]))).tolist() == [1, 3, 6]
    assert np.bincount(in_proportion(4, np.array([100.0, 1.0, 1.0]))).tolist() == [2, 1, 1]


@pytest.mark.parametrize(
    ("taxonomy", "what"),
    [
        ({"one": ["a", "b"], "two": ["c", "d", "e", "f", "g"]}, "no place for 'h'"),
        ({"one": [*NAMES], "two": ["whale"]}, "'whale'"),
        ({"one": ["a", *NAMES]}, "twice"),
        ({"one": [1, 2]}, "class names"),
    ],
)
def test_a_taxonomy_of_other_classes(taxonomy: Any, what: str) -> None:
    with pytest.raises(PlanError, match=what):
        splitnet.semantic(network(), taxonomy, NAMES, LEVELS)


def test_a_taxonomy_that_is_no_file(tmp_path: Any) -> None:
    with pytest.raises(PlanError, match="cannot be read"):
        splitnet.semantic(network(), tmp_path / "none.json", NAMES, LEVELS)
    (tmp_path / "bad.json").write_text("[1, 2")
    with pytest.raises(PlanError, match="not a taxonomy"):
        splitnet.semantic(network(), tmp_path / "bad.json", NAMES, LEVELS)
    for given in ([["a"]], None, 3):
        with pytest.raises(PlanError, match="a taxonomy is a table of groups of class names, or a file"):
            splitnet.semantic(network(), given, NAMES, LEVELS)  # type: ignore[arg-type]


def test_clustering_finds_rows_that_are_alike() -> None:
    graph = network()
    truth = np.array([0, 1, 2, 3, 3, 2, 1, 0])
    rows = torch.randn(4, 24, generator=torch.Generator().manual_seed(3))[truth] + 0.1 * torch.randn(8, 24)
    with torch.no_grad():
        graph.get_submodule("8").weight.copy_(rows)  # type: ignore[operator, union-attr]
    given = splitnet.clustering(graph, LEVELS)
    assert adjusted_rand_score(truth, given["8"]) == 1.0


@pytest.mark.parametrize("levels", [{"2": 2, "5": 2, "8": 2}, LEVELS])
def test_weights_recover_planted_blocks(levels: Any) -> None:
    graph = network()
    truth = planted(graph, levels, 3.0)
    given = splitnet.weights(graph, levels)
    assert min(adjusted_rand_score(truth[n], given[n]) for n in truth) == 1.0
    found = structure(graph, levels)
    for layer, share in kept(found, given.labels()).items():
        assert share >= kept(found, truth.labels())[layer] - 1e-12


@pytest.mark.slow
def test_weights_recover_blocks_in_resnet18() -> None:
    graph = splitnet_graph("resnet18")
    levels = {"layer3.*": 2, "layer4.*": 4, "fc": 4}
    truth = planted(graph, levels, 1.5)
    given = splitnet.weights(graph, levels)
    assert min(adjusted_rand_score(truth[n], given[n]) for n in truth) == 1.0


def splitnet_graph(name: str) -> fx.GraphModule:
    from splitfx.ir.graph import copy_graph

    return copy_graph(traced(name))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(value: float) -> None:
    graph = network()
    with torch.no_grad():
        graph.get_submodule("8").weight[3, 5] = value  # type: ignore[operator, union-attr]
    for source in (splitnet.weights, splitnet.clustering):
        with pytest.raises(PlanError, match="8: its weights are not finite"):
            source(graph, LEVELS)


def test_moments_that_are_not_finite() -> None:
    graph = network()
    with torch.no_grad():
        graph.get_submodule("0").weight.fill_(float("nan"))  # type: ignore[operator, union-attr]
    with pytest.raises(PlanError, match="2: what it reads in the calibration is not finite"):
        splitnet.weights(graph, LEVELS, calibration=torch.randn(4, 3, 12, 12))


def test_moments_of_the_inputs_count() -> None:
    """A channel that is always zero weighs nothing, however large its weights."""
    graph = network()
    images = torch.randn(4, 3, 12, 12)
    plain = splitnet.weights(graph, LEVELS)
    seen = splitnet.weights(graph, LEVELS, calibration=images)
    assert set(plain) == set(seen)
    with pytest.raises(PlanError, match="calibration"):
        splitnet.weights(graph, LEVELS, calibration=(images, images))


def test_balanced_labels_are_the_best() -> None:
    score = np.random.default_rng(0).standard_normal((6, 3))
    best = max(
        (score[np.arange(6), list(labels)].sum(), labels)
        for labels in set(__import__("itertools").permutations([0, 0, 1, 1, 2, 2]))
    )
    assert score[np.arange(6), balanced(score)].sum() == pytest.approx(best[0])
    assert capacities(10, 4).tolist() == [3, 3, 2, 2]


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"levels": {"8": 9}}, "8 has 8 channels, fewer than 9 groups"),
        ({"levels": {"2": 13}}, "channels, fewer than 13 groups"),
        ({"levels": {"nothing.*": 2}}, "no layer matches"),
        ({"levels": {"8": 1}}, "no layer is split"),
        ({"levels": (1, 2, 2)}, "stages"),
        ({"depth": 9, "groups": 2}, "more than the model's"),
        ({"depth": 2}, "go together"),
    ],
)
def test_levels_that_do_not_fit(options: Any, what: str) -> None:
    with pytest.raises(PlanError, match=what):
        run_pass(network(), SplitNet(source="random", **options))


@pytest.mark.parametrize("options", [{}, {"levels": {"8": 2}}, {"source": "random"}])
def test_options_that_are_missing(options: Any) -> None:
    with pytest.raises(PlanError):
        SplitNet(**options)


def test_no_classifier() -> None:
    graph = splitfx.trace(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)).eval(), torch.zeros(1, 3, 9, 9))
    with pytest.raises(UnsupportedError, match="classifiers"):
        run_pass(graph, SplitNet(levels={"1": 2}, source="random"))


def test_an_assignment_of_another_model() -> None:
    given = splitnet.random(network(), LEVELS)
    found = structure(network(10), LEVELS)
    with pytest.raises(PlanError, match="8 has 10 channels"):
        checked(found, given)
    with pytest.raises(PlanError, match="says nothing of 5"):
        checked(found, {n: v for n, v in given.items() if n != "5"})
    with pytest.raises(PlanError, match="conv9 is no layer"):
        checked(structure(network(), LEVELS), {**given, "conv9": (0, 1)})


def test_an_empty_group_and_a_wrong_one() -> None:
    graph = network()
    given = splitnet.random(graph, LEVELS)
    found = structure(graph, LEVELS)
    with pytest.raises(PlanError, match="left empty"):
        checked(found, {**given, "8": (0, 0, 1, 1, 2, 2, 2, 2)})
    with pytest.raises(PlanError, match="group 7 is not among"):
        checked(found, {**given, "8": (0, 1, 2, 3, 7, 0, 0, 0)})


def test_class_names_that_do_not_fit() -> None:
    with pytest.raises(PlanError, match="3 class names"):
        splitnet.random(network(), LEVELS, classes=("a", "b", "c"))
    with pytest.raises(PlanError, match="two classes"):
        splitnet.random(network(), LEVELS, classes=("a", "a", *NAMES[2:]))


def test_stages_and_depth_say_the_same_as_names() -> None:
    graph = traced("resnet18")
    by_name = splitnet.random(graph, {"layer4.*": 2, "fc": 2})
    assert splitnet.random(graph, (1, 1, 1, 1, 2, 2)) == by_name
    assert splitnet.random(graph, depth=6, groups=2) == by_name
