"""SubNetworks: what it makes, with other passes, and of token models."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import fx, nn

import splitfx
from splitfx.compiler.plan import Plan
from splitfx.errors import UnsupportedError
from splitfx.ir.graph import info
from splitfx.ir.ops import text
from splitfx.passes import DropIdentity, FoldBatchNorm, Group, SubNetworks, Tile
from splitfx.passes.subnetworks import keep_statistics
from splitfx.subnetworks.entry import Entry, entries
from splitfx.subnetworks.model import SubNetworksGraph
from tests import oracle
from tests.subnetworks.networks import X, assert_shared, divided, small, vgg

# ---------------------------------------------------------------- what it makes


def test_the_paper_s_table() -> None:
    """MACs of Table 1 in both counts, as printed and as computed in the notes on semantics."""
    split = splitfx.transform(vgg(), SubNetworks(cuts=(2, 7)), torch.zeros(1, 3, 32, 32), verify=False)  # 15 M weights
    assert isinstance(split, SubNetworksGraph)
    figures = split.figures()
    assert [m.name for m in figures] == ["base", "sub0", "sub1"]
    assert [m.macs for m in figures] == [313_201_664, 273_880_064, 123_474_944]
    assert [m.ops for m in figures] == [314_432_522, 274_586_634, 123_624_458]
    assert [round(m.ops / 1e9, 3) for m in figures] == [0.314, 0.275, 0.124]
    assert [round(m.macs / 1e9, 4) for m in figures] == [0.3132, 0.2739, 0.1235]
    downs = [entry.step_down.get_submodule("conv") for _, entry in entries(split)]
    assert [(c.in_channels, c.out_channels, c.kernel_size, c.stride, c.padding) for c in downs] == [
        (3, 64, (2, 2), (2, 2), (0, 0)),
        (3, 256, (8, 8), (8, 8), (0, 0)),
    ]


def test_golden() -> None:
    split = divided()
    assert 'entry "sub0"' in text(split)
    assert text(split.detach(1)) == (
        "%input_1 = input(2, 1, 16, 16)\n"
        '%conv = Conv2d(1, 8, 2, stride=2) "step_down.conv" (%input_1)\n'
        '%norm = BatchNorm2d(8) "step_down.norm" (%conv)\n'
        "%relu_default = relu(%norm)\n"
        '%_10 = Conv2d(8, 10, 3, padding=1) "10" (%relu_default)\n'
        '%_11 = BatchNorm2d(10) "11" (%_10)\n'
        "%relu_3 = relu(%_11)\n"
        "%max_pool2d_1 = max_pool2d(%relu_3, [2, 2], [2, 2])\n"
        "%flatten = flatten(%max_pool2d_1, 1)\n"
        '%_15 = Linear(160, 10) "15" (%flatten)\n'
        "return %_15\n"
    )


def test_forward_is_the_base_model_and_forward_all_gives_every_one() -> None:
    model = small()
    split = divided(model)
    outputs = split.forward_all(X)
    assert len(outputs) == 3
    oracle.assert_equal(split(X), model(X))
    oracle.assert_equal(outputs[0], model(X))
    for number in (0, 1):
        oracle.assert_equal(outputs[number + 1], split.detach(number)(X))
        oracle.assert_equal(split.forward_one(number, X), outputs[number + 1])
    oracle.assert_equal(split.base()(X), model(X))


def test_a_sub_model_by_hand() -> None:
    """The second sub-model written out with torch's functions, from the tensors of the whole."""
    split = divided()
    state = {k: v.double() for k, v in split.state_dict().items()}
    x, f = X.double(), torch.nn.functional

    def norm(x: torch.Tensor, path: str) -> torch.Tensor:
        w = [state[f"{path}.{k}"] for k in ("running_mean", "running_var", "weight", "bias")]
        return f.batch_norm(x, *w)

    y = f.conv2d(x, state["sub1.step_down.conv.weight"], state["sub1.step_down.conv.bias"], stride=2)
    y = norm(y, "sub1.step_down.norm").relu()
    y = norm(f.conv2d(y, state["10.weight"], state["10.bias"], padding=1), "11").relu()
    y = f.linear(f.max_pool2d(y, 2).flatten(1), state["15.weight"], state["15.bias"])
    oracle.assert_equal(copy.deepcopy(split).double().forward_all(x)[2], y)


def test_closed_forms_fit_other_sizes_too() -> None:
    model = nn.Sequential(
        *list(small().children())[:-2], nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(10, 4)
    ).eval()
    split = divided(model, cuts=(1, 2, 3))
    for size in ((16, 16), (23, 18), (37, 41)):
        x = torch.randn(3, 1, *size)
        assert [tuple(y.shape) for y in split.forward_all(x)] == [(3, 4)] * 4


def test_the_step_down_of_a_frozen_model_learns() -> None:
    model = nn.Sequential(
        *(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.PReLU(4), nn.Conv2d(4, 4, 3), nn.Flatten()),
        nn.Linear(784, 3),
    )
    split = divided(model.eval().requires_grad_(False), cuts=(1,))
    learning = {name: bool(p.requires_grad) for name, p in split.named_parameters()}
    own = {"conv.weight", "norm.weight", "norm.bias", "act.weight"}
    assert own <= {name.removeprefix("sub0.step_down.") for name in learning}
    assert learning == {name: name.startswith("sub0.") for name in learning}


# ---------------------------------------------------------------- with the other passes


def test_group_then_subnetworks() -> None:
    plan = [Group(factors=(2, 2), lowering="branches"), SubNetworks(budgets=("0.9x",))]
    split = splitfx.transform(small(), Plan(plan), X)
    assert isinstance(split, SubNetworksGraph)
    assert [s.name for s in info(split).steps] == ["group", "subnetworks"]
    assert_shared(split)


def test_subnetworks_then_tile_on_each() -> None:
    split = divided()
    for made, wanted in zip((split.base(), split.detach(0), split.detach(1)), split.forward_all(X), strict=True):
        tiled = splitfx.transform(made, Tile(rows=2))
        assert "tiled" in text(tiled)
        oracle.assert_equal(tiled(X), wanted)


@pytest.mark.parametrize("step", [Tile(rows=4), FoldBatchNorm(), DropIdentity()], ids=lambda s: s.name)
def test_a_pass_behind_it_keeps_the_sub_models(step: Any) -> None:
    split = divided(cuts=(1, 3), statistics="shared")  # folded norms have no statistics of their own
    after = splitfx.transform(split, step)
    assert isinstance(after, SubNetworksGraph)
    oracle.assert_equal(after.forward_all(X), split.forward_all(X))


def test_twice_adds_sub_models() -> None:
    split = splitfx.transform(divided(cuts=(1,)), SubNetworks(cuts=(3,)))
    assert isinstance(split, SubNetworksGraph)
    assert split.names == ("base", "sub0", "sub1")
    assert [m.macs for m in split.figures()] == [m.macs for m in divided().figures()]


def test_folding_behind_statistics_of_their_own_is_refused() -> None:
    after = splitfx.transform(divided(cuts=(1,), statistics="private"), FoldBatchNorm())
    assert isinstance(after, SubNetworksGraph)
    with pytest.raises(UnsupportedError, match="sub0 has statistics of its own for 4, which a later pass has replaced"):
        after.forward_all(X)


class Functional(nn.Module):
    """Norms behind the second conv: a module, and two functions on buffers of the model."""

    mean: torch.Tensor
    var: torch.Tensor

    mean: torch.Tensor
    var: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)
        self.norm, self.last = nn.BatchNorm2d(4), nn.Linear(4, 3)
        self.register_buffer("mean", torch.randn(4))
        self.register_buffer("var", torch.rand(4) + 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        f = nn.functional
        x = self.norm(self.second(self.first(x).relu())).relu()
        x = f.batch_norm(self.third(x), self.mean, self.var, training=self.training).relu()
        return self.last(f.instance_norm(x, self.mean, self.var, use_input_stats=True).mean((2, 3)))


@pytest.mark.parametrize("training", [False, True])
def test_statistics_that_cannot_be_private_are_named(training: bool) -> None:
    def declined(statistics: str) -> list[str]:
        split = divided(Functional().train(training), cuts=("second",), statistics=statistics)
        assert dict(entries(split)[0][1].private) == ({"norm": "norm0"} if statistics == "private" else {})
        notes = info(split).steps[-1].notes
        return [note.what for note in notes if note.kind == "declined"]

    assert declined("shared") == []
    found = declined("private")
    assert len(found) == 2
    assert all(what.startswith("sub0 shares these running statistics with the base model") for what in found)


def test_statistics_inside_of_a_stage_are_named() -> None:
    tiled = splitfx.transform(small(), Tile(rows=2), X)
    image = next(n for n in tiled.graph.nodes if n.op == "placeholder")
    entry = Entry(fx.GraphModule(nn.Module(), fx.Graph()), 0, 0, "closed")
    notes = keep_statistics(tiled, image, entry)
    assert [(note.where, note.kind) for note in notes] == [("tiled", "declined")]
    assert "sub0 shares the running statistics in this stage" in notes[0].what


def test_private_statistics_of_an_earlier_entry_are_no_reason_for_a_note() -> None:
    step = SubNetworks(cuts=(1,), statistics="private")
    split = splitfx.transform(divided(cuts=(3,), statistics="private"), step)
    assert [note.kind for note in info(split).steps[-1].notes] == ["did"]


# ---------------------------------------------------------------- tokens


class Tokens(nn.Module):
    """A vision transformer in small: patch embedding, class token, position."""

    def __init__(self, width: int = 12, depth: int = 3) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, width, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.position = nn.Parameter(torch.randn(1, 17, width))
        block = lambda: nn.TransformerEncoderLayer(width, 3, 20, 0.0, batch_first=True, norm_first=True)  # noqa: E731
        self.blocks = nn.ModuleList(block() for _ in range(depth))
        self.head = nn.Linear(width, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(x[:, 0])


def test_token_models_enter_by_patch_embedding() -> None:
    torch.manual_seed(0)
    split = divided(Tokens().eval(), cuts=("blocks.1", "blocks.2"))
    assert_shared(split)
    sub = split.detach(1)
    assert sub.get_parameter("step_down.token") is split.get_parameter("token")
    assert sub.get_parameter("step_down.position") is split.get_parameter("position")
    assert sub.get_parameter("step_down.patch.weight") is not split.get_parameter("patch.weight")
    assert [e.form for _, e in entries(split)] == ["embedding"] * 2
    # It starts with the model's own patch weights, so by hand: the model without its first two blocks.
    short = Tokens().eval()
    short.load_state_dict(split.state_dict(), strict=False)
    short.blocks = short.blocks[2:]
    short.blocks[0].load_state_dict({k[9:]: v for k, v in split.state_dict().items() if k.startswith("blocks.2")})
    oracle.assert_equal(sub(X), short(X))
    macs = [m.macs for m in split.figures()]
    assert macs[0] > macs[1] > macs[2]


def test_the_plan_makes_the_trip() -> None:
    plan = Plan([SubNetworks(cuts=(2, "features.24"), statistics="private", seed=3)], (1, 3, 32, 32))
    assert Plan.from_toml(plan.to_toml()) == plan
    assert 'cuts = [2, "features.24"]' in plan.to_toml()
    other = Plan([SubNetworks(budgets=("0.9x", "0.4x"), of="peak")])
    assert Plan.from_toml(other.to_toml()) == other
