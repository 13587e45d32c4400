"""The numbers behind the pictures of a SplitNet, the pictures, the page and the command line."""

from __future__ import annotations

import builtins
import copy
import html
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn

import splitfx
from splitfx import cli, splitnet
from splitfx.ir.graph import module_of
from splitfx.passes import Group, SplitNet
from splitfx.report.html import inspect_text
from splitfx.report.html.splitnet import _png
from splitfx.report.plots.splitnet import class_bands
from splitfx.report.plots.splitnet_classes import (
    Agreement,
    Classes,
    adjusted_rand,
    agreement,
    carved_classes,
    classes_text,
    grouped_classes,
)
from splitfx.report.plots.splitnet_matrices import Matrix, carved_blocks, diagonal, matrices, pieces, reduced
from splitfx.splitnet.assignment import kept
from tests.browser import dom, needs_browser
from tests.splitnet.carved import FLAT, NESTED, image, unlike, wide

NAMES = ("cat", "dog", "oak", "elm", "<b>rose", "tulip & co", "car")
TAXONOMY = {
    "animals": ["cat", "dog"],
    "plants": {"trees": ["oak", "elm"], "flowers": ["<b>rose", "tulip & co"]},
    "car": "car",
}


@pytest.fixture(scope="module")
def dense() -> fx.GraphModule:
    return splitfx.trace(wide(), image(2))


@pytest.fixture(scope="module")
def assignment(dense: fx.GraphModule) -> splitnet.Assignment:
    return splitnet.random(dense, NESTED, classes=NAMES)


@pytest.fixture(scope="module")
def carved(dense: fx.GraphModule, assignment: splitnet.Assignment) -> fx.GraphModule:
    return splitfx.transform(dense, SplitNet(assignment, lowering="branches"), verify=False)


def inside(matrix: Matrix) -> np.ndarray:
    mask = np.zeros(matrix.rms.shape, dtype=bool)
    for top, bottom, left, right in matrix.blocks:
        mask[top:bottom, left:right] = True
    return mask


def masked(dense: fx.GraphModule, assignment: splitnet.Assignment) -> fx.GraphModule:
    """The graph with zeros between the groups of its split layers, each weight set by its own division."""
    graph = copy.deepcopy(dense)
    found = splitnet.structure(graph, NESTED)
    for node, division in found.divisions(assignment.labels()).items():
        weight: Any = module_of(node).weight  # type: ignore[union-attr]
        keep = torch.zeros(weight.shape[:2], dtype=torch.bool)
        for ins, outs in zip(division.ins, division.outs, strict=True):
            keep[np.ix_(outs, ins)] = True
        weight.data[~keep] = 0
    return graph


# ---------------------------------------------------------------- weights


def test_sorted_weights_of_a_masked_model_are_blocks(dense: fx.GraphModule, assignment: splitnet.Assignment) -> None:
    graph = masked(dense, assignment)
    other = splitnet.random(graph, NESTED, seed=9)
    found = splitnet.structure(graph, NESTED)
    drawn, wrong = matrices(found, assignment, None), matrices(found, other, None)
    assert [m.layer for m in drawn][-1] == "fc"
    for matrix, sabotaged in zip(drawn, wrong, strict=True):
        assert (matrix.sorted[~inside(matrix)] == 0).all()
        assert (matrix.sorted[inside(matrix)] > 0).all()
        assert matrix.kept == pytest.approx(1, abs=1e-12)
        assert (matrix.rms[~inside(matrix)] > 0).any()  # in the user's order they are no blocks
        assert (sabotaged.sorted[~inside(sabotaged)] > 0).any()  # nor when sorted by other groups
        assert sabotaged.kept < 0.9


def test_kept_shares_are_those_of_the_notes(dense: fx.GraphModule, assignment: splitnet.Assignment) -> None:
    found = splitnet.structure(dense, NESTED)
    expected = kept(found, assignment.labels())
    drawn = {m.layer: m.kept for m in matrices(found, assignment, None)}
    assert drawn == pytest.approx(expected, rel=1e-12)
    assert min(drawn.values()) < 0.3 < 0.45 < max(drawn.values())


@pytest.mark.parametrize("lowering", ["branches", "grouped"])
def test_carved_blocks_are_those_of_the_dense_weights(
    dense: fx.GraphModule, assignment: splitnet.Assignment, lowering: Any
) -> None:
    if lowering == "grouped":  # equal groups
        levels = {"stage2.*": 2, "stage3.*": 2}
        assignment = splitnet.random(dense, levels)
    split = splitfx.transform(dense, SplitNet(assignment, lowering=lowering), verify=False)
    found = splitnet.structure(dense, assignment.options["levels"])
    expected = {m.layer: m for m in matrices(found, assignment, None)}
    blocks = carved_blocks(split)
    assert list(blocks) == list(expected)
    for where, own in blocks.items():
        matrix = expected[where]
        got, places = diagonal(own)
        assert places == matrix.blocks
        wanted = np.where(inside(matrix), matrix.sorted, 0)
        np.testing.assert_allclose(got, wanted, rtol=1e-12, atol=0)
        assert not np.allclose(np.roll(got, 1, 0), wanted)  # one channel off is seen


def test_a_weight_enters_as_the_root_mean_square_over_its_kernel() -> None:
    conv = nn.Conv2d(4, 6, (3, 2), groups=2).double()
    first, second = pieces(conv)
    assert first.shape == second.shape == (3, 2)
    assert second[2, 1] == pytest.approx(float(conv.weight[5, 1].detach().square().mean().sqrt()), rel=1e-12)
    back = nn.ConvTranspose2d(4, 6, 3, groups=2).double()
    own = pieces(back)[1]
    assert own.shape == (3, 2)
    assert own[2, 1] == pytest.approx(float(back.weight[3, 2].detach().square().mean().sqrt()), rel=1e-12)


def test_smaller_matrices_keep_the_mean_square() -> None:
    matrix = np.random.default_rng(0).random((12, 20))
    small = reduced(matrix, 4)
    assert small.shape == (4, 4)
    assert small[1, 3] == pytest.approx(np.sqrt((matrix[3:6, 15:] ** 2).mean()))
    assert reduced(matrix, 7).shape == (7, 7)
    np.testing.assert_allclose(reduced(matrix, 20), matrix)


# ---------------------------------------------------------------- classes and agreement


def test_the_adjusted_rand_index_by_hand() -> None:
    # of 15 pairs, 2 are together in the one, 4 in the other, 1 in both: 2 * 4 / 15 by chance, (2 + 4) / 2 at most
    assert adjusted_rand([0, 0, 1, 1, 2, 3], [0, 0, 0, 1, 1, 2]) == pytest.approx((1 - 8 / 15) / (3 - 8 / 15))
    assert adjusted_rand([0, 0, 1, 1], [5, 5, 2, 2]) == 1
    assert adjusted_rand([0, 0, 1, 1], [0, 1, 0, 1]) == pytest.approx(-0.5)
    assert adjusted_rand([0, 0, 0], [1, 1, 1]) == 1


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), min_size=2, max_size=30))
def test_the_adjusted_rand_index_is_the_known_one(pairs: list[tuple[int, int]]) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    one, other = zip(*pairs, strict=True)
    assert adjusted_rand(one, other) == pytest.approx(metrics.adjusted_rand_score(one, other), abs=1e-12)


def classes(*groups: int) -> Classes:
    return Classes(np.array(groups), NAMES, True)


def test_agreement_with_a_taxonomy() -> None:
    same: Agreement = agreement(classes(1, 1, 0, 0, 0, 0, 2), TAXONOMY)
    assert same.index == 1
    assert same.parts == ("animals", "plants", "car")
    assert same.shares.tolist() == [[0, 1, 0], [1, 0, 0], [0, 0, 1]]
    mixed = agreement(classes(1, 0, 0, 0, 0, 1, 1), TAXONOMY)
    assert mixed.index < 0.2
    assert mixed.shares.tolist() == [[0.5, 0.5], [0.75, 0.25], [0, 1]]
    with pytest.raises(splitfx.PlanError, match="has no place for 'car'"):
        agreement(classes(1, 1, 0, 0, 0, 0, 2), {k: v for k, v in TAXONOMY.items() if k != "car"})
    with pytest.raises(splitfx.PlanError, match="names 'horse', which the model lacks"):
        agreement(classes(1, 1, 0, 0, 0, 0, 2), {**TAXONOMY, "more": ["horse"]})


def test_every_class_is_drawn_once_by_group_and_super_class() -> None:
    groups = np.random.default_rng(0).integers(0, 4, 120)
    known = Classes(groups, tuple(map(str, range(120))), False)
    bands = class_bands(known)
    order = [c for band in bands for c in band]
    assert [len(b) for b in bands] == [40, 40, 40]
    assert sorted(order) == list(range(120))
    assert (np.diff(groups[order]) >= 0).all()
    found = agreement(classes(1, 1, 0, 1, 0, 0, 2), TAXONOMY)
    assert class_bands(classes(1, 1, 0, 1, 0, 0, 2), found) == [[2, 4, 5, 0, 1, 3, 6]]


def test_classes_of_an_assignment_and_of_a_carved_model(
    assignment: splitnet.Assignment, carved: fx.GraphModule, tmp_path: Path
) -> None:
    by_hand = {g: [n for n, own in zip(NAMES, assignment["fc"], strict=True) if own == g] for g in range(4)}
    splitfx.save(carved, tmp_path / "saved")
    found = [grouped_classes(g) for g in (assignment, carved, splitfx.load(tmp_path / "saved"))]
    for one in found:
        assert {g: one.members(g) for g in range(one.level)} == by_hand
    text = classes_text(found[0])
    count = {g: "1 class" if len(own) == 1 else f"{len(own)} classes" for g, own in by_hand.items()}
    assert all(f"group {g + 1}, {count[g]}: {', '.join(own)}" in text for g, own in by_hand.items())


def test_classes_that_cannot_be_told() -> None:
    plain = {"a": (0, 1, 0), "fc": (1, 1, 0)}
    with pytest.raises(splitfx.PlanError, match="no class names"):
        grouped_classes(plain)
    with pytest.raises(splitfx.PlanError, match=r"a and fc have as many .* layer='fc'"):
        grouped_classes(plain, ("x", "y", "z"))
    with pytest.raises(splitfx.PlanError, match="no layer has as many"):
        grouped_classes(plain, ("x", "y"))
    with pytest.raises(splitfx.PlanError, match="2 class names were given for the 3 classes of fc"):
        grouped_classes(plain, ("x", "y"), "fc")
    with pytest.raises(splitfx.PlanError, match=r"nothing of 'fcc'.*'fc'"):
        grouped_classes(plain, vector="fcc")
    assert grouped_classes(plain, ("x", "y", "z"), "fc").members(1) == ["x", "y"]
    assert grouped_classes(plain, vector="fc").members(0) == ["2"]


def features_only(dense: fx.GraphModule) -> fx.GraphModule:
    return splitfx.transform(dense, SplitNet(levels={"stage2.0.conv2": 2}, source="random"), verify=False)


def test_a_split_that_ends_before_the_classifier_has_no_groups_of_classes(dense: fx.GraphModule) -> None:
    split = features_only(dense)
    assert carved_classes(split) is None
    assert "The classes are not in groups" in inspect_text(split)
    with pytest.raises(splitfx.PlanError, match="no SplitNet that reaches the logits"):
        grouped_classes(split)


# ---------------------------------------------------------------- files


def test_pictures_are_written(dense: fx.GraphModule, assignment: splitnet.Assignment, tmp_path: Path) -> None:
    splitnet.plot_weights(dense, assignment, tmp_path / "w.svg")
    splitnet.plot_weights(splitnet.structure(dense, NESTED), dict(assignment), tmp_path / "w.png", ["fc"])
    splitnet.plot_classes(assignment, tmp_path / "c.svg", TAXONOMY)
    splitnet.plot_curves({"weight": [1, 0.25], "disjoint": [1, 0.5], "balance": [1, 1.5]}, tmp_path / "p.svg")
    weights, names, curves = (html.unescape((tmp_path / f"{n}.svg").read_text()) for n in "wcp")
    found = splitnet.structure(dense, NESTED)
    for one in matrices(found, assignment, ["stage3.0.conv2", "fc"]):
        assert f"{one.layer}: {one.level} groups hold {one.kept:.1%}" in weights
    index = agreement(grouped_classes(assignment), TAXONOMY).index
    assert f"3 super-classes: {index:.2f}" in names
    assert all(n in names for n in (*NAMES, "animals", "plants", "group 4, 1 class"))
    assert all(w in curves for w in ("weight, at last 0.25", "disjoint, at last 0.5", "balance, at last 1.5"))
    assert (tmp_path / "w.png").read_bytes().startswith(b"\x89PNG")


def test_curves_of_learning(tmp_path: Path) -> None:
    graph = splitfx.trace(wide().float(), image(2).float())
    groups = splitnet.attach(graph, FLAT)
    with pytest.raises(splitfx.PlanError, match="no steps to draw"):
        splitnet.plot_curves(groups, tmp_path / "p.svg")
    last = [groups.penalty(), groups.penalty()][1]
    splitnet.plot_curves(groups, tmp_path / "p.svg")
    drawn = re.findall(r"(\w+), at last ([\d.e-]+)", (tmp_path / "p.svg").read_text())
    total = sum(f * float(dict(drawn)[n]) for n, f in zip(("weight", "disjoint", "balance"), (1, 1, 10), strict=True))
    assert total == pytest.approx(float(last.detach()), rel=1e-2)


def test_what_cannot_be_drawn(dense: fx.GraphModule, assignment: splitnet.Assignment, tmp_path: Path) -> None:
    with pytest.raises(splitfx.PlanError, match=r"'stage9' is no split layer.* fc"):
        splitnet.plot_weights(dense, assignment, tmp_path / "w.png", ["stage9"])
    with pytest.raises(splitfx.PlanError, match=r"give splitfx.splitnet.structure\(graph, levels\)"):
        splitnet.plot_weights(dense, dict(assignment), tmp_path / "w.png")
    with pytest.raises(splitfx.PlanError, match="no layers to draw"):
        splitnet.plot_weights(dense, assignment, tmp_path / "w.png", [])
    with pytest.raises(splitfx.SplitfxError, match="png, svg or pdf"):
        splitnet.plot_classes(assignment, tmp_path / "c.txt")
    (tmp_path / "c.png").write_text("mine")
    with pytest.raises(splitfx.SplitfxError, match="already exists"):
        splitnet.plot_classes(assignment, tmp_path / "c.png")
    assert [p.name for p in tmp_path.iterdir()] == ["c.png"]
    assert (tmp_path / "c.png").read_text() == "mine"


def test_no_picture_without_matplotlib(
    assignment: splitnet.Assignment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(splitfx.MissingExtraError, match=r"splitfx\[plot\]"):
        splitnet.plot_classes(assignment, tmp_path / "a.png")


def test_splitnet_loads_no_matplotlib() -> None:
    code = "import sys, splitfx.splitnet as s; s.plot_classes, s.plot_weights; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "False", done.stderr
    with pytest.raises(AttributeError, match="no attribute 'plot_groups'"):
        splitnet.plot_groups  # type: ignore[attr-defined]  # noqa: B018


# ---------------------------------------------------------------- the page and the command line


def test_the_page_names_every_class_and_draws_every_split_layer(carved: fx.GraphModule) -> None:
    page = inspect_text(carved)
    section = page.split("<h2>Groups of classes</h2>")[1].split("<h2>Layers</h2>")[0]
    found = carved_classes(carved)
    assert found is not None
    for group in range(4):
        assert f"<td>{html.escape(', '.join(found.members(group)))}</td>" in section
    assert "<b>rose" not in page
    assert section.count('class="in"') == len(NAMES)
    assert section.count('class="out"') == 3 * len(NAMES)
    blocks = carved_blocks(carved)
    assert re.findall(r"<figcaption>(.*?)<br>", section) == list(blocks)
    assert section.count('class="border"') == sum(map(len, blocks.values()))
    assert "no longer in this model" in section
    assert "[0, 1" not in page.split("<h3>1. ")[1].split("</h3>")[0]  # thousands of groups are not a heading
    assert not re.search(r"(src|href)\s*=\s*[\"']?(https?:)?//|@import|url\(", page)


def test_other_pages_have_no_groups_of_classes() -> None:
    model = unlike(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(576, 4)))
    plan = splitfx.Plan([Group(factors=(2,))], input_shape=(1, 3, 16, 16))
    split = splitfx.transform(model, plan)
    assert "Groups of classes" not in inspect_text(split)
    assert carved_classes(split) is None


def test_the_pictures_in_the_page_hold_the_values() -> None:
    matplotlib_image = pytest.importorskip("matplotlib.image")
    values = np.random.default_rng(0).integers(0, 256, (5, 7)).astype(np.uint8)
    read = matplotlib_image.imread(io.BytesIO(_png(values)))
    assert (np.rint(255 * read[..., 3]) == values).all()


@needs_browser
def test_the_page_in_a_browser(carved: fx.GraphModule, tmp_path: Path) -> None:
    page = splitfx.inspect_html(carved, tmp_path / "page.html")
    probe = """<script>var box = document.querySelectorAll('svg.classes .in'), page = document.documentElement;
    var pictures = Array.from(document.querySelectorAll('svg.block image'));
    document.body.setAttribute('data-in', box.length + '/' + box[0].getBoundingClientRect().width);
    document.body.setAttribute('data-fits', page.scrollWidth <= innerWidth);
    pictures.forEach(function(one){var read = new Image(); read.onload = function(){
    one.setAttribute('data-read', read.naturalWidth)}; read.src = one.getAttribute('href')});</script></body>"""
    page.write_text(page.read_text().replace("</body>", probe))
    seen = dom(page, tmp_path / "browser")
    assert f'data-in="{len(NAMES)}/20"' in seen
    assert 'data-fits="true"' in seen
    drawn = [min(diagonal(b)[0].shape[1], 96) for b in carved_blocks(carved).values()]
    assert list(map(int, re.findall(r'data-read="(\d+)"', seen))) == drawn
    assert all(html.escape(n, quote=False) in seen for n in NAMES)


def test_inspect_lists_classes_by_name(
    carved: fx.GraphModule, dense: fx.GraphModule, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    splitfx.save(carved, tmp_path / "saved")
    splitfx.save(features_only(dense), tmp_path / "other")
    found = carved_classes(carved)
    assert found is not None
    assert cli.main(["inspect", str(tmp_path / "saved"), "--quiet"]) == 0
    assert capsys.readouterr().out.strip() == classes_text(found)
    assert cli.main(["inspect", str(tmp_path / "saved"), "--json", "--html", str(tmp_path / "p.html"), "--quiet"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == {"html": str(tmp_path / "p.html"), "groups": [found.members(g) for g in range(4)]}
    assert cli.main(["inspect", str(tmp_path / "other"), "--quiet"]) != 0
    assert "give --html FILE" in capsys.readouterr().err
