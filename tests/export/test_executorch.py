"""ExecuTorch programs: they compute what the graph does, and a tiled stage needs little memory in them too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import splitfx
from splitfx import ExportError, cli
from splitfx.export import executorch as module
from splitfx.passes import FoldBatchNorm, Group, Tile


class Residual(nn.Module):
    """Two maps in, a map and logits out."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8)
        self.first, self.second = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))
        self.pool, self.fc = nn.MaxPool2d(2), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.relu(self.norm(self.stem(x))) * mask
        x = torch.relu(x + self.second(torch.relu(self.first(x))))
        return self.pool(x), self.fc(x.mean((2, 3)))


INPUTS = (torch.ones(2, 3, 65, 43), torch.ones(2, 1, 33, 22))


def residual() -> nn.Module:
    torch.manual_seed(0)
    model = Residual()
    nn.init.normal_(model.norm.running_mean)  # type: ignore[arg-type]
    return model.eval()


def ran(path: Path, *inputs: torch.Tensor) -> list[torch.Tensor]:
    from executorch.runtime import Runtime  # pyright: ignore[reportMissingImports]

    method: Any = Runtime.get().load_program(str(path)).load_method("forward")
    return list(method.execute(inputs))


@pytest.mark.parametrize("passes", [[], [FoldBatchNorm(), Tile(rows=8)], [Group(factors=2)]])
def test_a_program_gives_what_the_graph_gives(passes: list[splitfx.Pass], tmp_path: Path) -> None:
    split = splitfx.transform(residual(), passes, INPUTS) if passes else splitfx.trace(residual(), INPUTS)
    made = splitfx.export_executorch(split, tmp_path / "model.pte")
    assert made.path == tmp_path / "model.pte"
    torch.manual_seed(1)
    inputs = tuple(torch.randn(one.shape) for one in INPUTS)
    for one, other in zip(ran(made.path, *inputs), split(*inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_tiled_program_plans_the_memory_of_its_schedule(tmp_path: Path) -> None:
    torch.manual_seed(0)
    convs = [nn.Conv2d(ins, 16, 3, padding=1) for ins in (2, 16, 16)]
    layers = [layer for conv in convs for layer in (conv, nn.ReLU())]
    graph = splitfx.trace(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1)).eval(), torch.zeros(1, 2, 128, 64))
    split = splitfx.transform(graph, Tile(rows=8))
    whole, tiled = (splitfx.export_executorch(one, tmp_path / f"{i}.pte") for i, one in enumerate((graph, split)))
    peak = splitfx.explain(split).steps[-1].after.peak_bytes
    assert whole.planned_bytes >= 2 * 16 * 128 * 64 * 4
    assert tiled.planned_bytes < 0.4 * whole.planned_bytes
    assert tiled.planned_bytes < 1.5 * peak
    assert f"{tiled.planned_bytes / 2**10:.2f} KiB" in str(tiled)


def test_what_computes_something_else_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = splitfx.trace(nn.Conv2d(3, 4, 3).eval(), torch.zeros(1, 3, 8, 8))
    monkeypatch.setattr(module.agreement, "outputs", lambda *given: [torch.ones(1, 4, 6, 6)])
    with pytest.raises(ExportError, match=r"was not written: output 0 is off by"):
        splitfx.export_executorch(graph, tmp_path / "model.pte")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_written(tmp_path: Path) -> None:
    model = nn.Conv2d(3, 4, 3).eval()
    with pytest.raises(ExportError, match="example_inputs"):
        splitfx.export_executorch(model, tmp_path / "model.pte")
    (tmp_path / "model.pte").write_text("mine")
    with pytest.raises(ExportError, match="already exists"):
        splitfx.export_executorch(model, tmp_path / "model.pte", example_inputs=torch.zeros(1, 3, 8, 8))
    assert (tmp_path / "model.pte").read_text() == "mine"


def test_an_operation_without_a_kernel(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.linalg.qr(x)[0]

    graph = splitfx.trace(Odd().eval(), torch.eye(4))
    with pytest.raises(ExportError, match="ExecuTorch refuses it"):
        splitfx.export_executorch(graph, tmp_path / "model.pte")
    assert list(tmp_path.iterdir()) == []


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    splitfx.save(splitfx.transform(nn.Conv2d(3, 4, 3).eval(), Tile(rows=4), torch.zeros(1, 3, 16, 8)), tmp_path / "s")
    file = str(tmp_path / "s.pte")
    assert cli.main(["export", str(tmp_path / "s"), "--pte", file, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["planned_bytes"] > 0
    assert Path(file).stat().st_size == told["bytes"]
    assert cli.main(["export", str(tmp_path / "s"), "--pte", file, "--overwrite", "--no-loops"]) == 2
    assert "--no-loops are for --onnx" in capsys.readouterr().err
