"""The liveness timeline by hand, and against what really lives while the graph runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import fx, nn

from splitfx.analysis import facts
from splitfx.analysis import memory as memory_module
from splitfx.analysis.live import LiveStorage
from splitfx.analysis.memory import Memory, memory
from splitfx.frontend.trace import trace

IMAGE = (1, 3, 64, 64)


class Call(nn.Module):
    """A module around a function of one tensor."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(x)


def memory_of(model: nn.Module, image: torch.Tensor) -> Memory:
    return facts(trace(model.eval(), image)).memory


def real_peak(graph: nn.Module, image: torch.Tensor) -> int:
    with torch.no_grad(), LiveStorage([image], [*graph.parameters(), *graph.buffers()]) as live:
        graph(image)
    return live.peak


def live_by_op(found: Memory) -> dict[str, int]:
    return {str(getattr(n.target, "_opname", n.target)): b for n, b in found.live_bytes.items()}


def test_a_chain_by_hand() -> None:
    """4 KiB each: the input stays, a value dies after its last reader, the output stays."""
    found = memory_of(Call(lambda x: (x * 2).sigmoid().tanh()), torch.zeros(1024))
    assert [b // 4096 for b in found.live_bytes.values()] == [1, 2, 3, 3, 2]
    assert found.peak_bytes == 3 * 4096
    assert found.input_bytes == 4096


def test_in_place_operations_and_views_add_nothing() -> None:
    found = memory_of(Call(lambda x: (x * 2).relu_().view(2, -1).t()[:1]), torch.zeros(1024))
    assert set(found.live_bytes.values()) == {4096, 8192}
    assert sum(found.new_bytes.values()) == 8192


def test_a_view_keeps_its_base_alive() -> None:
    def slice_then_work(x: torch.Tensor) -> torch.Tensor:
        head = (x * 2)[:1]
        return head + (x.sigmoid().tanh().sum() + 1)

    found = live_by_op(memory_of(Call(slice_then_work), torch.zeros(1024)))
    assert found["tanh"] == 4 * 4096  # x, the base of the slice, the sigmoid, the tanh


def test_a_skip_connection_lives_until_it_is_added() -> None:
    found = memory_of(Call(lambda x: (y := x * 2) + y.sigmoid().tanh()), torch.zeros(1024))
    assert [b // 4096 for b in found.live_bytes.values()] == [1, 2, 3, 4, 4, 2]


def test_chunks_share_a_storage() -> None:
    """Chunks are views of one storage, which lives as long as one of them is read."""
    found = memory_of(Call(lambda x: (x * 2).chunk(4)[0] * 1), torch.zeros(1024))
    assert found.peak_bytes == 2 * 4096 + 1024


def test_parameters_and_buffers_are_apart() -> None:
    found = memory_of(nn.Sequential(nn.Linear(512, 4), nn.BatchNorm1d(4)), torch.zeros(8, 512))
    assert found.peak_bytes < 8 * 512 * 4 + 512


def test_dropout_and_identity_are_their_operand_in_eval_mode() -> None:
    plain = memory_of(nn.Sequential(nn.ReLU(), nn.Tanh()), torch.zeros(1024))
    model = nn.Sequential(nn.ReLU(), nn.Dropout(0.5), nn.Identity(), nn.Tanh()).train()
    graph = trace(model, torch.zeros(1024))
    assert facts(graph).memory.peak_bytes == plain.peak_bytes == 3 * 4096


def test_temporaries_inside_composite_operators_count() -> None:
    """A group norm makes statistics, a cosine similarity its products and norms, attention its sums."""
    image = torch.zeros(2, 8, 16, 16)
    for model in (
        nn.GroupNorm(2, 8),
        Call(lambda x: F.cosine_similarity(x, x + 1)),
        Call(lambda x: F.scaled_dot_product_attention(x, x, x)),
    ):
        graph = trace(model.eval(), image)
        assert facts(graph).memory.peak_bytes == real_peak(graph, image)


def test_resnet18_peaks_at_bn1() -> None:
    found = memory_of(torchvision.models.resnet18(weights=None), torch.zeros(1, 3, 224, 224))
    assert found.peak_layer == "bn1"
    assert f"{found.peak_bytes / 2**20:.2f}" == "6.70"


@pytest.mark.parametrize("name", ["shufflenet_v2_x0_5", "convnext_tiny", "regnet_y_400mf"])
def test_the_prediction_is_what_lives(name: str) -> None:
    image = torch.randn(IMAGE)
    graph = trace(torchvision.models.get_model(name, weights=None).eval(), image)
    assert facts(graph).memory.peak_bytes == pytest.approx(real_peak(graph, image), rel=0.02)


def forget_in_place(graph: fx.GraphModule, shapes: dict[fx.Node, Any]) -> dict[fx.Node, Any]:
    """Shapes in which an in-place result looks like a value of its own."""
    from splitfx.ir.ops import in_place

    hit = [n for n in shapes if n.op == "call_function" and in_place(n)]
    return {**shapes, **{n: torch.empty_like(shapes[n]) for n in hit}}


def test_sabotage_forgetting_in_place_sharing_shows() -> None:
    image = torch.randn(IMAGE)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True), nn.MaxPool2d(2)).eval()
    graph = trace(model, image)
    shapes = facts(graph).shapes
    assert memory(graph, shapes).peak_bytes == real_peak(graph, image)
    with next(iter(shapes.values())).fake_mode:
        wrong = memory(graph, forget_in_place(graph, shapes))
    assert abs(wrong.peak_bytes / real_peak(graph, image) - 1) > 0.02


def test_sabotage_forgetting_temporaries_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    image = torch.zeros(2, 8, 16, 16)
    graph = trace(Call(lambda x: F.cosine_similarity(x, x + 1)), image)
    monkeypatch.setattr(memory_module, "is_composite", lambda node: False)
    assert memory(graph, facts(graph).shapes).peak_bytes < 0.98 * real_peak(graph, image)


def test_equal_layers_are_looked_into_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten times the layers, the same number of fake runs: the analysis stays linear, and cheap."""
    runs: list[fx.Node] = []
    real = memory_module.Temporaries._run
    monkeypatch.setattr(
        memory_module.Temporaries, "_run", lambda self, n, *given: runs.append(n) or real(self, n, *given)
    )
    counts = []
    for layers in (5, 50):
        graph = trace(nn.Sequential(*(nn.LayerNorm(8) for _ in range(layers))).eval(), torch.zeros(4, 8))
        runs.clear()
        memory(graph, facts(graph).shapes)
        counts.append(len(runs))
    assert counts == [1, 1]
