"""``torch.compile(model, backend="splitfx")``: equal results, the user's own weights, and what is refused."""

from __future__ import annotations

import contextlib
from importlib.metadata import entry_points
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from splitfx.analysis.live import LiveStorage
from splitfx.compiler import dynamo
from splitfx.errors import PlanError, SplitfxError, UnsupportedError
from splitfx.passes import Group, Tile
from tests import oracle


class Pipeline(nn.Module):
    """Two networks with Python between them that no trace takes: a print, a number of the caller's, a branch on it."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 5, 1, 2))
        self.decoder = nn.Sequential(
            nn.Conv2d(8, 8, 3, 1, 1), nn.SiLU(), nn.Conv2d(8, 16, 3, 1, 1), nn.Conv2d(16, 2, 1)
        )
        self.register_buffer("scale", torch.tensor(0.7))

    def forward(self, x: torch.Tensor, times: int = 1, flip: bool = False) -> dict[str, Any]:
        z = self.encoder(x)
        torch._dynamo.graph_break()
        if flip:
            z = z.flip(-1)
        y = self.decoder(F.interpolate(z, size=(times * z.shape[2], 2 * z.shape[3])) * torch.as_tensor(self.scale))
        return {"image": y + times, "rows": y.shape[2]}


@pytest.fixture(autouse=True)
def _anew() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def pipeline() -> Pipeline:
    torch.manual_seed(0)
    model = Pipeline().double().eval()
    with torch.no_grad():
        model.encoder[1].running_mean.normal_()  # type: ignore[union-attr, operator]
        model.encoder[1].running_var.uniform_(0.5, 2.0)  # type: ignore[union-attr, operator]
    return model


def compiled(model: nn.Module, dynamic: bool | None = None, **options: Any) -> Any:
    return torch.compile(model, backend=dynamo.backend, dynamic=dynamic, options=options)


def image(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize("dynamic", [None, True, False])
def test_code_that_cannot_be_traced_whole_at_any_size(dynamic: bool | None) -> None:
    model = pipeline()
    split = compiled(model, dynamic, budget="least")
    with torch.no_grad():
        for shape, times, flip in (((1, 3, 32, 32), 1, False), ((1, 3, 41, 29), 2, True), ((2, 3, 64, 33), 3, True)):
            x = image(*shape)
            found, wanted = split(x, times, flip), model(x, times, flip)
            assert found["rows"] == wanted["rows"]
            oracle.assert_equal(found["image"], wanted["image"])


class Wrapped:
    """An object that is no module, as a pipeline is, and a module whose attributes are looked up in its own way."""

    class Careful(Pipeline):
        def __getattr__(self, name: str) -> Any:
            if name in self.__dict__.get("_modules", {}):
                return self.__dict__["_modules"][name]
            return super().__getattr__(name)

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.modules = self.Careful().double().eval()  # a name that every module has a method of

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return self.modules.decoder(z) * self.modules.scale


def test_networks_inside_other_objects() -> None:
    model, z = Wrapped(), image(1, 8, 24, 21)
    decode = torch.compile(model.decode, backend=dynamo.backend, options={"budget": "least"})
    with torch.no_grad():
        oracle.assert_equal(decode(z), model.decode(z))
        oracle.assert_equal(decode(z[:, :, :17]), model.decode(z[:, :, :17]))


def test_numbers_that_a_graph_was_captured_with_are_not_taken_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong() -> float:
        torch._dynamo.reset()
        split = compiled(model, True, budget="least")
        with torch.no_grad():
            split(x, 2)
            return float((split(x, 3)["image"] - model(x, 3)["image"]).abs().max())

    class Forgets(dict[Any, Any]):
        def __contains__(self, key: object) -> bool:
            return len(self) > 0

        def __getitem__(self, key: Any) -> Any:
            return next(iter(self.values()))

    model, x, real = pipeline(), image(1, 3, 32, 32), dynamo.Captured.__init__
    assert wrong() < 1e-12

    def forgets(self: dynamo.Captured, *given: Any) -> None:
        real(self, *given)
        self._known = Forgets()

    monkeypatch.setattr(dynamo.Captured, "__init__", forgets)
    with contextlib.suppress(RuntimeError, SplitfxError):  # or it does not fit at all
        assert wrong() > 1e-3


def test_half_the_memory() -> None:
    """`LiveStorage` is a mode, under which Dynamo does not run, so what Dynamo would run is called."""
    torch.manual_seed(0)
    convs = [nn.Conv2d(a, b, 3, 1, 1) for a, b in ((3, 24), (24, 24), (24, 3))]
    model, x = nn.Sequential(convs[0], nn.ReLU(), convs[1], nn.ReLU(), convs[2]).eval(), torch.randn(1, 3, 128, 128)
    kept: list[tuple[Any, Any]] = []

    def watching(graph: Any, inputs: Any) -> Any:
        call = dynamo.backend(graph, inputs, options={"budget": "0.5x"})
        return lambda *given: kept.append((call, given)) or call(*given)

    with torch.no_grad():
        torch.compile(model, backend=watching)(x)
        peaks = []
        for call in (lambda: model(x), lambda: kept[0][0](*kept[0][1])):
            with LiveStorage([x], [*model.parameters()]) as live:
                call()
            peaks.append(live.peak)
    assert peaks[1] <= 0.5 * peaks[0]


def test_gradients_and_new_weights_reach_the_users_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = pipeline(), image(2, 3, 33, 32)
    split = compiled(model, budget="least")
    found = split(x)["image"].square().sum()
    found.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model(x)["image"].square().sum().backward()
    assert set(gradients) == {name for name, _ in model.named_parameters()}
    for name, p in model.named_parameters():
        oracle.assert_equal(gradients[name], p.grad)

    def off() -> float:
        """How far the split is from the model after its weights changed."""
        with torch.no_grad():
            split(x)
            for p in (*model.parameters(), model.scale, model.encoder[1].running_mean):  # type: ignore[union-attr]
                p.mul_(1.5)  # type: ignore[operator]
            return float((split(x)["image"] - model(x)["image"]).abs().max())

    assert off() < 1e-11
    model.load_state_dict(pipeline().state_dict())
    assert off() < 1e-11
    monkeypatch.setattr(dynamo, "share", lambda split, model: None)  # copies do not follow
    torch._dynamo.reset()
    split = compiled(model, budget="least")
    assert off() > 1e-3


def test_what_is_refused_names_the_users_layers() -> None:
    model, x = pipeline(), image(1, 3, 32, 32)
    with pytest.raises(PlanError, match=r"the least is .*, reached at (encoder|decoder)\.\d"):
        compiled(model, budget="1 KiB")(x)
    with pytest.raises(UnsupportedError, match=r"the plan changes the weights \(\S+\).*splitfx\.transform"):
        compiled(model.decoder, plan=Group(factors=(2,)))(image(1, 8, 16, 16))
    with pytest.raises(UnsupportedError, match=r"batch_norm in train mode.*model\.eval\(\)"):
        compiled(pipeline().train(), budget="least")(x)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "either a budget or a plan"),
        ({"budget": "least", "plan": Tile(budget="least")}, "either a budget or a plan"),
        ({"budjet": "least"}, "unknown option 'budjet'.*Did you mean 'budget'"),
        ({"budget": "much"}, "budget"),
        ({"plan": "nowhere.toml"}, "there is no such plan file"),
    ],
)
def test_options_that_are_wrong(options: dict[str, Any], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        compiled(pipeline(), **options)(image(1, 3, 32, 32))


def test_torch_finds_the_backend_by_name() -> None:
    known = {one.name: one.value for one in entry_points(group="torch_dynamo_backends")}
    assert known["splitfx"] == "splitfx.compiler.dynamo:backend"
    x, model = image(1, 3, 32, 32), pipeline()
    with torch.no_grad():
        found = torch.compile(model, backend="splitfx", options={"budget": "least"})(x)
        oracle.assert_equal(found["image"], model(x)["image"])
