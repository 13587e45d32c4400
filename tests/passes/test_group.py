"""Group: the paper's numbers, equality with the masked dense network, separate branches, every refusal."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn

import splitfx
from splitfx import narrow
from splitfx.analysis import facts
from splitfx.analysis.blocks import blocks
from splitfx.carve import Division, Masked
from splitfx.editing import tidy
from splitfx.errors import PlanError, VerificationError
from splitfx.graph import copy_graph
from splitfx.ops import text
from splitfx.passes import Group
from splitfx.pipeline import run_pass
from splitfx.protocol import Outcome
from splitfx.tracing import trace
from tests import oracle
from tests.models import ZOO, Head, conv_bn, image
from tests.strategies import networks


def grouped(graph: fx.GraphModule, step: Group) -> tuple[fx.GraphModule, Outcome]:
    """The pass alone, without the pipeline's oracle."""
    work = copy_graph(graph)
    outcome = step.run(work, facts(work))
    tidy(work)
    return work, outcome


def in_double(name: str) -> tuple[fx.GraphModule, torch.Tensor]:
    model, inputs = ZOO[name]()
    return trace(model.double().eval(), inputs.double()), inputs.double()


def per_block(graph: fx.GraphModule, factor: int) -> tuple[int, ...]:
    return (factor,) * len(blocks(facts(graph)))


def notes(outcome: Outcome, kind: str) -> list[str]:
    return [f"{n.where}: {n.what}" for n in outcome.notes if n.kind == kind]


def assert_masked_dense(graph: fx.GraphModule, step: Group, x: torch.Tensor) -> tuple[fx.GraphModule, Outcome]:
    """The split equals the pass's reference, and that is the dense graph with weights set to zero."""
    split, outcome = grouped(graph, step)
    assert outcome.reference is not None, [n.what for n in outcome.notes]
    outcome.reference.recompile()
    oracle.assert_equal_outputs(split, outcome.reference, x)
    dense, kept = graph.state_dict(), outcome.reference.state_dict()
    layers = {path: m for path, m in outcome.reference.named_modules() if isinstance(m, Masked)}
    assert layers
    kept |= {f"{path}.weight": m.weight().detach() for path, m in layers.items()}
    for key, value in kept.items():
        if key in dense and value.shape == dense[key].shape:  # else a fusion, or a conv that it widens
            assert torch.equal(value[value != 0], dense[key][value != 0]), f"{key} is not the dense weight"
    return split, outcome


# ---------------------------------------------------------------- the paper's Table 2


def vgg16(size: int = 32) -> tuple[Any, torch.Tensor]:
    import torchvision

    model: Any = torchvision.models.vgg16(init_weights=False)
    model.classifier = nn.Linear(512 * 7 * 7, 10)  # the table counts convolutions
    return model.eval(), torch.randn(1, 3, size, size)


@pytest.fixture(scope="module")
def vgg() -> fx.GraphModule:
    torch.manual_seed(0)
    return trace(*vgg16())


def kernels(split: fx.GraphModule) -> int:
    """3x3 kernels: pairs of an input and an output channel; 1x1 fusion convs are not counted."""
    convs = [m for m in split.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    return sum(m.in_channels * m.out_channels // m.groups for m in convs)


@pytest.mark.parametrize("lowering", ["grouped", "branches"])
@pytest.mark.parametrize(
    ("options", "thousands"),
    [
        ({"factors": (1, 1, 1, 1, 1)}, 1634.496),
        ({"factors": (4,), "fusion": "none"}, 408.768),
        ({"factors": (4,), "fusion": "none", "share": 3}, 430.272),
        ({"factors": (8, 2, 2, 4, 4)}, 508.608),
        ({"factors": (8, 2, 2, 2, 4)}, 705.216),
    ],
)
def test_table_2(vgg: fx.GraphModule, options: dict[str, Any], thousands: float, lowering: Any) -> None:
    split, _ = grouped(vgg, Group(**options, lowering=lowering))
    assert kernels(split) == thousands * 1000


def test_six_branches_of_unequal_width(vgg: fx.GraphModule) -> None:
    split, outcome = grouped(vgg, Group(factors=(6,) * 5))
    widths = [split.get_submodule(f"features.2.branch{g}").out_channels for g in range(6)]
    assert widths == [11, 11, 11, 11, 10, 10]
    assert any("unequal width" in n for n in notes(outcome, "did"))


def test_vgg_fusions_widen(vgg: fx.GraphModule) -> None:
    split, _ = grouped(vgg, Group(factors=(8, 2, 2, 4, 4), lowering="branches"))
    state = split.state_dict()
    shapes = [tuple(state[f"fusion{i}.weight"].shape[:2]) for i in range(1, 6)]
    assert shapes == [(128, 64), (256, 128), (512, 256), (512, 512), (512, 512)]
    for i in range(1, 6):
        fusion = split.get_submodule(f"fusion{i}")
        assert isinstance(fusion, nn.Conv2d)
        assert fusion.bias is not None


def test_vgg_independently_masked() -> None:
    """Blocks set to zero by hand, from the paper's rule alone, on the user's own model."""
    torch.manual_seed(0)
    model, x = vgg16()
    model, x = model.double(), x.double()
    factors = (8, 2, 2, 6, 4)
    split = splitfx.transform(model, Group(factors=factors, fusion="keep", lowering="branches"), x, verify=False)
    stage = 0
    with torch.no_grad():
        for layer in model.features:
            if isinstance(layer, nn.MaxPool2d):
                stage += 1
                continue
            if not isinstance(layer, nn.Conv2d) or layer.in_channels == 3:
                continue
            mask = torch.zeros(layer.weight.shape[:2], dtype=torch.float64)
            parts = [np.array_split(np.arange(n), factors[stage]) for n in (layer.out_channels, layer.in_channels)]
            for outs, ins in zip(*parts, strict=True):
                mask[np.ix_(outs, ins)] = 1
            layer.weight.mul_(mask[:, :, None, None])
    oracle.assert_equal_outputs(split, model, x)


@pytest.mark.slow
@pytest.mark.parametrize("factors", [(8, 2, 2, 4, 4), (6, 6, 6, 6, 6)])
def test_vgg_pipeline_oracle(vgg: fx.GraphModule, factors: tuple[int, ...]) -> None:
    run_pass(vgg, Group(factors=factors))


# ---------------------------------------------------------------- equal to masked dense


SMALL = ["plain", "residual", "concats", "squeeze_excite", "depthwise", "grouped", "channel_shuffle", "norms"]


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("lowering", ["grouped", "branches"])
@pytest.mark.parametrize("order", ["given", "mass"])
def test_odd_models(name: str, lowering: Any, order: Any) -> None:
    graph, x = in_double(name)
    for factor, fusion in ((2, "widen"), (3, "none")):
        step = Group(factors=per_block(graph, factor), fusion=fusion, lowering=lowering, order=order)  # type: ignore[arg-type]
        split, outcome = grouped(graph, step)
        if outcome.reference is None:
            assert notes(outcome, "declined")
            continue
        assert_masked_dense(graph, step, x)
        assert text(split) != text(graph)


@pytest.mark.parametrize("gating", ["strict", "relaxed"])
def test_gates(gating: Any) -> None:
    graph, x = in_double("squeeze_excite")
    split, _ = assert_masked_dense(graph, Group(factors=(2, 2), gating=gating, lowering="branches"), x)
    names = set(dict(split.named_modules()))
    assert ("body.1.up.branch0" in names) == (gating == "strict")


REAL: dict[str, tuple[int, Any]] = {
    "resnet18": (6, "widen"),
    "mobilenet_v2": (2, "keep"),
    "shufflenet_v2_x0_5": (2, "none"),
}
LARGE = [
    "resnet50",
    "densenet121",
    "googlenet",
    "efficientnet_b0",
    "regnet_y_400mf",
    "mobilenet_v2",
    "resnext50_32x4d",
]


def real(name: str, size: int = 64) -> tuple[fx.GraphModule, torch.Tensor]:
    import torchvision

    options = {"init_weights": False, "aux_logits": False} if name == "googlenet" else {}
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, **options).double().eval()
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    return trace(model, x), x


@pytest.mark.parametrize("name", sorted(REAL))
def test_real_models(name: str) -> None:
    graph, x = real(name)
    factor, fusion = REAL[name]
    _, outcome = assert_masked_dense(
        graph,
        Group(factors=per_block(graph, factor), fusion=fusion, lowering="branches"),
        x,
    )
    assert outcome.reference is not None


@pytest.mark.slow
@pytest.mark.parametrize("gating", ["strict", "relaxed"])
@pytest.mark.parametrize("lowering", ["grouped", "branches"])
@pytest.mark.parametrize("name", LARGE)
def test_large_models(name: str, lowering: Any, gating: Any) -> None:
    graph, x = real(name)
    for factor, fusion, order in ((2, "widen", "given"), (3, "none", "mass")):
        step = Group(per_block(graph, factor), fusion, gating=gating, order=order, lowering=lowering)  # type: ignore[arg-type]
        assert_masked_dense(graph, step, x)


def run_law(network: tuple[nn.Module, torch.Tensor], data: st.DataObject) -> None:
    """Any factors, fusions and orders on any network keep the promise, or the pass says why not."""
    model, x = network
    graph = trace(model, x)
    count = len(blocks(facts(graph)))
    factors = tuple(data.draw(st.lists(st.integers(1, 5), min_size=count, max_size=count), label="factors"))
    step = Group(
        factors,
        data.draw(st.sampled_from(("widen", "keep", "none")), label="fusion"),
        data.draw(st.integers(0, 2), label="share"),
        gating=data.draw(st.sampled_from(("strict", "relaxed")), label="gating"),
        order=data.draw(st.sampled_from(("given", "mass")), label="order"),
        lowering=data.draw(st.sampled_from(("grouped", "branches")), label="lowering"),
    )
    run_pass(graph, step)
    _, outcome = grouped(graph, step)
    if outcome.reference is not None:
        assert_masked_dense(graph, step, x)


@settings(max_examples=15)
@given(networks(), st.data())
def test_random_networks(network: tuple[nn.Module, torch.Tensor], data: st.DataObject) -> None:
    run_law(network, data)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@settings(max_examples=120)
@given(networks(10), st.data())
def test_larger_random_networks(network: tuple[nn.Module, torch.Tensor], data: st.DataObject) -> None:
    run_law(network, data)


# ---------------------------------------------------------------- structure


def chain(width: int = 12) -> tuple[nn.Module, torch.Tensor]:
    """Two blocks of two convs and a head, in float64."""
    layers = [
        conv_bn(3, 8),
        conv_bn(8, 8),
        nn.MaxPool2d(2),
        conv_bn(8, width),
        conv_bn(width, width),
        nn.MaxPool2d(2),
    ]
    model = Head(nn.Sequential(*layers, conv_bn(width, width)), width).double().eval()
    return model, image(2, 3, 12, 12).double()


class _Between(fx.Interpreter):
    """A graph from the output of one node to the input of another."""

    def __init__(self, graph: fx.GraphModule, first: fx.Node, last: fx.Node) -> None:
        super().__init__(graph, garbage_collect_values=False)
        self.first, self.last = first, last

    def run_node(self, n: fx.Node) -> Any:
        if n is self.first:
            return self.given
        if n is self.last:
            self.found = self.fetch_args_kwargs_from_env(n)[0][0]
        return super().run_node(n)

    def __call__(self, given: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        self.given = given
        self.run(x)
        return self.found


@pytest.mark.parametrize("lowering", ["grouped", "branches"])
@pytest.mark.parametrize("factor", [2, 3])
def test_branches_are_apart(factor: int, lowering: Any) -> None:
    """Between two fusions the Jacobian from one branch's channels to another's is exactly zero."""
    model, x = chain()
    x = x[:1]
    graph = trace(model, x)
    split, _ = grouped(graph, Group(factors=(2, factor, 1), fusion="keep", lowering=lowering))
    nodes = {str(n.target): n for n in split.graph.nodes}
    between = _Between(split, nodes["fusion1"], nodes["fusion2"])
    given = torch.rand(1, 8, 6, 6, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda z: between(z, x), given)
    assert isinstance(jacobian, torch.Tensor)
    reach = jacobian.abs().sum((0, 2, 3, 4, 6, 7))  # [12 out, 8 in]
    for g, outs in enumerate(np.array_split(np.arange(12), factor)):
        for h, ins in enumerate(np.array_split(np.arange(8), factor)):
            part = reach[np.ix_(outs, ins)]
            assert bool((part > 0).any()) if g == h else bool((part == 0).all())


def test_two_branches_into_twice_the_width_keep_the_dense_function() -> None:
    """Each branch has room for every channel, so the first conv of the block loses nothing."""
    first, second = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1)
    with torch.no_grad():
        for rows, columns in ((slice(4), slice(4, 8)), (slice(4, 8), slice(4))):
            first.weight[rows, columns] = 0  # block 1 is in two branches already
    layers = [
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        first,
        nn.MaxPool2d(2),
        second,
        nn.ReLU(),
        nn.MaxPool2d(2),
    ]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * 9, 5)).double().eval()
    x = image(2, 3, 12, 12).double()
    for lowering in ("grouped", "branches"):
        split = splitfx.transform(model, Group(factors=(2, 2), lowering=lowering), x)  # type: ignore[arg-type]
        oracle.assert_equal_outputs(split, model, x)
        assert split.state_dict()["fusion1.weight"].shape[:2] == (16, 8)


def test_factor_one_changes_nothing() -> None:
    model, x = chain()
    graph = trace(model, x)
    split, _ = run_pass(graph, Group(factors=(1, 1, 1)))
    assert text(split) == text(graph)
    oracle.assert_equal_outputs(split, model, x)


def test_residual_writers_split_alike_and_the_fusion_feeds_both_paths() -> None:
    graph, x = in_double("residual")
    split, _ = assert_masked_dense(graph, Group(factors=(2, 2), fusion="keep", lowering="branches"), x)
    fusion = next(n for n in split.graph.nodes if n.target == "fusion1")
    readers = {str(n.target).split(".branch")[0] for n in fusion.users}
    seen = set()
    for n in fusion.users:  # slices for branches
        seen |= {str(r.target).split(".branch")[0] for r in n.users}
    assert {"body.2.main.0", "body.2.short"} <= readers | seen


def test_select_exclude_share() -> None:
    model, x = chain()
    graph = trace(model, x)
    some = Group(factors=(2, 2, 2), select=("body.3.*", "body.4.*"), exclude=("body.4.0",), lowering="branches")
    split, _ = assert_masked_dense(graph, some, x)
    divided = {n.partition(".branch")[0] for n in dict(split.named_modules()) if ".branch" in n}
    assert divided & {"body.1.0", "body.4.0", "body.6.0"} == set()
    assert "body.3.0" in divided
    shared, _ = assert_masked_dense(graph, Group(factors=(2, 2, 2), share=2, lowering="branches"), x)
    assert "body.1.0.branch0" not in dict(shared.named_modules())


def test_functional_convs_are_declined_with_a_reason() -> None:
    model, inputs = ZOO["computed_weights"]()
    graph = trace(nn.Sequential(model, conv_bn(4, 6), nn.Conv2d(6, 2, 1)).eval(), inputs)
    _, outcome = grouped(graph, Group(factors=per_block(graph, 2)))
    assert any("computed by the model" in n for n in notes(outcome, "declined"))


def test_a_module_called_again_is_split_once() -> None:
    graph, x = in_double("shared_module")
    model = nn.Sequential(graph, nn.Conv2d(6, 4, 1)).double().eval()
    split, _ = assert_masked_dense(trace(model, x), Group(factors=(2,), fusion="none", lowering="branches"), x)
    calls = [n for n in split.graph.nodes if str(n.target).endswith("0.branch0")]
    assert len(calls) == 3


def test_mass_order_keeps_more() -> None:
    """Planted blocks under a random permutation of the channels come back whole."""
    model, x = chain()
    rng = np.random.default_rng(0)
    hidden = rng.permutation(12) % 2
    with torch.no_grad():
        conv = model.get_submodule("body.4.0")
        assert isinstance(conv, nn.Conv2d)
        conv.weight.mul_(torch.tensor(hidden[:, None] == hidden[None])[:, :, None, None])
    graph = trace(model, x)
    kept = []
    for order in ("given", "mass"):
        _, outcome = grouped(graph, Group((1, 2, 1), "keep", lowering="branches", order=order))  # type: ignore[arg-type]
        assert outcome.reference is not None
        kept.append(sum(float(m.weight().square().sum()) for m in outcome.reference.modules() if isinstance(m, Masked)))
    assert kept[1] > kept[0]


# ---------------------------------------------------------------- calibration


def test_least_squares_lowers_the_error() -> None:
    model, _ = chain()
    batch = torch.randn(64, 3, 12, 12, dtype=torch.float64)
    graph = trace(model, batch[:2])
    for fusion in ("keep", "widen"):
        plain, _ = grouped(graph, Group((2, 2, 2), fusion, lowering="branches"))  # type: ignore[arg-type]
        solved, outcome = grouped(graph, Group((2, 2, 2), fusion, lowering="branches", calibration=batch))  # type: ignore[arg-type]
        wanted = model(batch)
        far = [float((m(batch) - wanted).norm()) for m in (plain, solved)]
        assert far[1] < far[0]
        said = [n for n in notes(outcome, "did") if "least squares" in n]
        assert said
        for note in said:
            before, after = map(float, re.findall(r"(\S+) before, (\S+) after", note)[0])
            assert after < before


def test_calibration_that_fits_nothing_is_refused() -> None:
    model, x = chain()
    graph = trace(model, x)
    with pytest.raises(PlanError, match="do not fit the model"):
        grouped(graph, Group((2, 2, 2), calibration=torch.randn(2, 5, 12, 12, dtype=torch.float64)))
    with pytest.raises(PlanError, match="calibration has 2 inputs"):
        grouped(graph, Group((2, 2, 2), calibration=(x, x)))
    with pytest.raises(PlanError, match="calibration gives 1 position"):
        grouped(graph, Group((1, 2, 2), calibration=x[:1]))


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"factors": ()}, "factors is empty"),
        ({"factors": (2, 0)}, "1 or more; got 0"),
        ({"factors": (-1,)}, "1 or more; got -1"),
        ({"factors": (2,), "share": -1}, "share counts convs, 0 or more; got -1"),
        ({"factors": (2,), "fusion": "wide"}, "'fusion' must be"),
        ({"factors": (2, 2), "lowering": ("grouped",)}, "lowering has 1 entries for 2 factors"),
        ({"factors": 2.5}, "'factors' must be"),
    ],
)
def test_bad_options(options: dict[str, Any], says: str) -> None:
    with pytest.raises(PlanError, match=says) as caught:
        Group(**options)
    assert "\n" not in str(caught.value)


def test_the_wrong_number_of_factors_lists_the_blocks() -> None:
    model, x = chain()
    with pytest.raises(PlanError, match="3 blocks") as caught:
        splitfx.transform(model, Group(factors=(2, 2)), x)
    assert "1: body.0.0 to body.1.0" in str(caught.value)
    assert "3: body.6.0" in str(caught.value)


def test_an_unknown_layer_name() -> None:
    model, x = chain()
    with pytest.raises(PlanError, match="no layer matches 'boddy.*'"):
        splitfx.transform(model, Group(factors=(2, 2, 2), select=("boddy.*",)), x)


def test_no_convolution_is_a_note() -> None:
    graph = trace(nn.Linear(4, 3), torch.randn(2, 4))
    split, outcome = grouped(graph, Group(factors=(2,)))
    assert "no convolution" in outcome.notes[0].what
    assert text(split) == text(graph)


def test_more_branches_than_channels_is_a_note() -> None:
    model, x = chain()
    _, outcome = grouped(trace(model, x), Group(factors=(9, 1, 1)))
    assert any("8 channels, fewer than 9 branches" in n for n in notes(outcome, "declined"))


def test_one_dimensional_networks() -> None:
    body = [
        nn.Conv1d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv1d(8, 8, 3),
        nn.MaxPool1d(2),
        nn.Conv1d(8, 6, 3),
        nn.Flatten(),
    ]
    model = nn.Sequential(*body, nn.Linear(18, 4)).double().eval()
    x = torch.randn(2, 3, 12, dtype=torch.float64)
    graph = trace(model, x)
    assert_masked_dense(graph, Group(factors=per_block(graph, 2), fusion="none", lowering="grouped"), x)
    split, _ = assert_masked_dense(graph, Group(factors=per_block(graph, 2), lowering="branches"), x)
    assert isinstance(split.get_submodule("fusion1"), nn.Conv1d)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    model, x = chain()
    split = splitfx.transform(model.to(dtype), Group(factors=(2, 2, 2), lowering="branches"), x.to(dtype))
    assert split(x.to(dtype)).dtype == dtype


def test_calibration_in_half_precision_is_solved_in_float64() -> None:
    model, x = chain()
    step = Group(factors=(2, 2, 2), lowering="branches", calibration=torch.randn(32, 3, 12, 12).bfloat16())
    split = splitfx.transform(model.bfloat16(), step, x.bfloat16())
    assert bool(split(x.bfloat16()).isfinite().all())


# ---------------------------------------------------------------- sabotage


def test_sabotage_swapped_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    right = narrow._block
    monkeypatch.setattr(narrow, "_block", lambda w, o, i: right(w, o, (i + w.shape[1] // 2) % w.shape[1]))
    model, x = chain()
    with pytest.raises(VerificationError, match="broke its promise"):
        splitfx.transform(model, Group(factors=(2, 2, 2), lowering="branches"), x)


@pytest.mark.parametrize("shut", [False, True], ids=["fresh norms", "norms that start at zero"])
def test_sabotage_behind_norms_that_hide_it(monkeypatch: pytest.MonkeyPatch, shut: bool) -> None:
    """A norm that scales by zero lets nothing through: the oracle runs on other weights as well."""
    model, x = ZOO["residual"]()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()
            nn.init.constant_(module.weight, 0.0 if shut else 1.0)
    right = narrow.channelwise
    monkeypatch.setattr(narrow, "channelwise", lambda m, p: right(m, (p + 1) % m.num_features))
    with pytest.raises(VerificationError, match="broke its promise"):
        splitfx.transform(model.eval(), Group(factors=(2, 2), lowering="branches"), x)


def test_sabotage_mask_off_by_one_channel(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Division.clear
    monkeypatch.setattr(Division, "clear", lambda self, weight: weight.copy_(right(self, weight).roll(1, 0)))
    model, x = chain()
    with pytest.raises(VerificationError, match="broke its promise"):
        splitfx.transform(model, Group(factors=(2, 2, 2), lowering="grouped"), x)


def test_sabotage_fusion_off_by_one_percent(monkeypatch: pytest.MonkeyPatch) -> None:
    from splitfx.passes import group

    right = group.carve

    def wrong(graph: fx.GraphModule, *rest: Any) -> None:
        right(graph, *rest)
        with torch.no_grad():
            graph.get_submodule("fusion1").weight.mul_(1.01)  # type: ignore[union-attr, operator]

    monkeypatch.setattr(group, "carve", wrong)
    model, x = chain()
    with pytest.raises(VerificationError, match="broke its promise"):
        splitfx.transform(model, Group(factors=(2, 2, 2)), x)
