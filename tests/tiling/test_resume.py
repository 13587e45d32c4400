"""A stream that was stopped goes on where it was, and its file is the one that an unbroken stream writes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import fx, nn

import splitfx
from splitfx.errors import PlanError, SplitfxError
from splitfx.passes import Tile
from splitfx.tiling.plan.schedule import Scheduler
from splitfx.tiling.stream import RowSource, resume
from tests.tiling.test_whole_maps import MIDDLE, Decoder

ROWS = 37


class Stopped(Exception):
    pass


class Shifts(nn.Module):
    shift: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.ones(3, 1, 1), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.shift


@pytest.fixture(scope="module", params=["convs", "attention"])
def tiled(request: pytest.FixtureRequest) -> tuple[fx.GraphModule, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(1, 2, ROWS, 9, dtype=torch.float64)
    plain = nn.Sequential(
        nn.Conv2d(2, 4, 3, 2, 1), nn.ReLU(), nn.Upsample(scale_factor=2), nn.Conv2d(4, 3, 3, padding=1)
    )
    model = plain if request.param == "convs" else Decoder(MIDDLE["attention"]())
    return splitfx.transform(model.double().eval(), Tile(rows=3), x), x


@pytest.fixture(autouse=True)
def noted_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume, "PAUSE", 0.0)


def breaking(after: int) -> Any:
    """A reduction that fails when so many strips have been written; named alike whatever ``after`` is."""
    seen = []

    def twice(strip: torch.Tensor) -> torch.Tensor:
        seen.append(strip.shape[2])
        if len(seen) > after + 1:  # the first is the row of zeros
            raise Stopped
        return 2 * strip

    return twice


@pytest.mark.parametrize("stops", [[1], [4, 2, 3], [0, 5]])
def test_it_goes_on(tiled: Any, stops: list[int], tmp_path: Path) -> None:
    split, x = tiled
    whole = splitfx.stream(split, x.numpy(), tmp_path / "whole.npy", reduce=breaking(1000))
    path = tmp_path / "map.npy"
    before = 0
    for after in stops:
        with pytest.raises(Stopped):
            splitfx.stream(split, x.numpy(), path, reduce=breaking(after), resume=True)
        assert not path.exists()
        there = json.loads((tmp_path / "map.npy.part.json").read_text())["rows"]
        assert there > before if after else there == before
        before = there
    assert splitfx.stream(split, x.numpy(), path, reduce=breaking(1000), resume=True) == path
    assert np.allclose(np.load(path), np.load(whole), rtol=1e-12, atol=1e-12)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["map.npy", "whole.npy"]


def test_a_row_too_few_is_seen(tiled: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split, x = tiled
    whole = splitfx.stream(split, x.numpy(), tmp_path / "whole.npy", reduce=breaking(1000))
    with pytest.raises(Stopped):
        splitfx.stream(split, x.numpy(), tmp_path / "map.npy", reduce=breaking(3), resume=True)
    monkeypatch.setattr(resume, "_there", lambda *given, real=resume._there: real(*given) + 1)
    path = splitfx.stream(split, x.numpy(), tmp_path / "map.npy", reduce=breaking(1000), resume=True)
    assert not np.allclose(np.load(path), np.load(whole))


def test_only_what_is_missing_is_computed(tiled: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed behind the last row, before the file got its name: the rows are not made again."""
    split, x = tiled
    monkeypatch.setattr(resume, "put", lambda *_: (_ for _ in ()).throw(Stopped()))
    with pytest.raises(Stopped):
        splitfx.stream(split, x.numpy(), tmp_path / "map.npy", reduce=breaking(1000), resume=True)
    monkeypatch.undo()
    path = splitfx.stream(split, x.numpy(), tmp_path / "map.npy", reduce=breaking(0), resume=True)
    whole = splitfx.stream(split, x.numpy(), tmp_path / "whole.npy", reduce=breaking(1000))
    assert np.array_equal(np.load(path), np.load(whole))


def test_strips_that_come_once_are_read_forward(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = nn.Conv2d(2, 3, 3, padding=1).double().eval(), torch.randn(1, 2, ROWS, 9, dtype=torch.float64)
    split = splitfx.transform(model, Tile(rows=3), x)
    taken: list[int] = []

    def strips(last: int = ROWS) -> Iterator[np.ndarray]:
        for row in range(0, last, 2):
            taken.append(row)
            yield x[0, :, row : row + 2].numpy()

    def source(last: int = ROWS) -> RowSource:
        return RowSource(strips(last), size=(ROWS, 9), layout="CHW")

    path = tmp_path / "map.npy"
    with pytest.raises(SplitfxError, match="ended after 20 of 37"):
        splitfx.stream(split, source(20), path, resume=True)
    again = source()
    tall: list[int] = []
    real: Any = again.raw._keep  # type: ignore[attr-defined]
    again.raw._keep = lambda strip: (real(strip), tall.append(sum(b.shape[1] for b in again.raw.buffer)))  # type: ignore[attr-defined]
    splitfx.stream(split, again, path, resume=True)
    assert max(tall) <= 8, "rows that are there already do not wait"
    with torch.no_grad():
        assert np.allclose(np.load(path), model(x).numpy(), rtol=1e-12)


def test_another_stream_is_refused(tiled: Any, tmp_path: Path) -> None:
    split, x = tiled
    path = tmp_path / "map.npy"
    with pytest.raises(Stopped):
        splitfx.stream(split, x.numpy(), path, reduce=breaking(3), resume=True)
    held = (tmp_path / "map.npy.part").read_bytes()
    with pytest.raises(PlanError, match="another stream: its (map|dtype|reduce) is"):
        splitfx.stream(split, x.numpy(), path, reduce="argmax", resume=True)
    with pytest.raises(PlanError, match="another stream: its image is 1×2×37×9"):
        splitfx.stream(split, torch.randn(2, 41, 9).double().numpy(), path, reduce=breaking(3), resume=True)
    with torch.no_grad():
        weight = next(split.parameters())
        weight[0] += 1
    with pytest.raises(PlanError, match="another stream: its model is"):
        splitfx.stream(split, x.numpy(), path, reduce=breaking(3), resume=True)
    with torch.no_grad():
        weight[0] -= 1
    assert (tmp_path / "map.npy.part").read_bytes() == held


@pytest.mark.parametrize("what", ["image", "last row", "mean", "scale", "layer", "buffer"])
def test_rows_of_something_else_are_not_gone_on_with(what: str, tmp_path: Path) -> None:
    """Of the same sizes and weights: the file would hold rows of both."""
    torch.manual_seed(0)
    x = torch.randn(2, ROWS, 9, dtype=torch.float64).numpy()
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), Shifts()).double().eval()
    split = splitfx.transform(model, Tile(rows=3), torch.from_numpy(x)[None])
    options: dict[str, Any] = {"mean": (0, 0), "std": (1, 1), "scale": 1.0}
    path = tmp_path / "map.npy"

    def run(after: int, **changed: Any) -> None:
        splitfx.stream(split, RowSource(x, **{**options, **changed}), path, reduce=breaking(after), resume=True)

    with pytest.raises(Stopped):
        run(4)
    if what in ("image", "last row"):
        x[:, 0 if what == "image" else -1] += 1
    elif what == "layer":
        convolution: Any = next(m for m in split.modules() if isinstance(m, nn.Conv2d))
        convolution.dilation, convolution.padding = (2, 2), (2, 2)
    elif what == "buffer":
        next(b for n, b in split.named_buffers() if n.endswith("shift")).add_(1)
    changed = {"mean": {"mean": (0, 1)}, "scale": {"scale": 2.0}}.get(what, {})
    with pytest.raises(PlanError, match=f"its {'model' if what in ('layer', 'buffer') else 'source'} is"):
        run(1000, **changed)
    assert not path.exists()


def test_a_function_is_known_by_its_code(tmp_path: Path) -> None:
    split = splitfx.transform(nn.Conv2d(2, 3, 3, padding=1).eval(), Tile(rows=3), torch.randn(1, 2, ROWS, 9))
    x = torch.randn(ROWS, 2, 9).numpy()

    def run(reduce: Any, rows: int = ROWS) -> Any:
        strips = RowSource((x[i].reshape(2, 1, 9) for i in range(rows)), size=(ROWS, 9), layout="CHW")
        return splitfx.stream(split, strips, tmp_path / "map.npy", reduce=reduce, resume=True)

    with pytest.raises(SplitfxError, match="ended after 20"):
        run(lambda strip: strip > 0.25, 20)
    with pytest.raises(PlanError, match="its reduce is"):
        run(lambda strip: strip > 0.75)
    assert run(lambda strip: strip > 0.25) == tmp_path / "map.npy"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not readable JSON"),
        ('{"rows": 3}', "damaged"),
        (None, "is gone"),
        ('{"rows": -1, "told": {}}', "damaged"),
    ],
)
def test_a_damaged_record_is_refused(tiled: Any, text: str | None, words: str, tmp_path: Path) -> None:
    split, x = tiled
    path, record = tmp_path / "map.npy", tmp_path / "map.npy.part.json"
    with pytest.raises(Stopped):
        splitfx.stream(split, x.numpy(), path, reduce=breaking(3), resume=True)
    record.unlink()
    if text is not None:
        record.write_text(text)
    with pytest.raises(PlanError, match=words):
        splitfx.stream(split, x.numpy(), path, reduce=breaking(3), resume=True)


def test_a_part_that_was_cut_off_is_refused(tiled: Any, tmp_path: Path) -> None:
    split, x = tiled
    with pytest.raises(Stopped):
        splitfx.stream(split, x.numpy(), tmp_path / "map.npy", reduce=breaking(3), resume=True)
    part = tmp_path / "map.npy.part"
    part.write_bytes(part.read_bytes()[:-8])
    with pytest.raises(PlanError, match=r"map\.npy\.part was cut off: remove it and map\.npy\.part\.json"):
        splitfx.stream(split, x.numpy(), tmp_path / "map.npy", reduce=breaking(1000), resume=True)
    assert not (tmp_path / "map.npy").exists()


def test_what_cannot_go_on_says_so(tiled: Any, tmp_path: Path) -> None:
    split, x = tiled
    with pytest.raises(PlanError, match="resume is for files"):
        splitfx.stream(split, x.numpy(), lambda row, strip: None, resume=True)
    with pytest.raises(PlanError, match="resume is for files"):
        splitfx.stream(split, x.numpy(), resume=True)
    columns = splitfx.transform(nn.Conv2d(2, 3, 3).eval(), Tile(grid=(1, 2)), torch.randn(1, 2, 9, 9))
    with pytest.raises(PlanError, match="runs in tiles"):
        splitfx.stream(columns, torch.randn(2, 9, 9).numpy(), tmp_path / "a.npy", resume=True)
    assert not list(tmp_path.iterdir())


def test_two_writers_do_not_meet(tiled: Any, tmp_path: Path) -> None:
    split, x = tiled

    def again(strip: torch.Tensor) -> torch.Tensor:
        if (tmp_path / "map.npy.part").exists():
            with pytest.raises(PlanError, match="written by another"):
                splitfx.stream(split, x.numpy(), tmp_path / "map.npy", resume=True)
        return strip

    splitfx.stream(split, x.numpy(), tmp_path / "map.npy", reduce=again, resume=True)
    assert (tmp_path / "map.npy").exists()


def test_the_rest_of_a_map_costs_the_rest(tiled: Any) -> None:
    split, x = tiled
    program = split.tiled.program((x,))
    all_of_it, rest, end = (
        Scheduler(program.stage, program.schedule, first=first).count().calls for first in (0, 12, 30)
    )
    assert end <= rest <= all_of_it
    assert end < all_of_it
