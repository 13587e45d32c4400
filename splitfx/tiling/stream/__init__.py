"""Stream: an image that is never whole in memory through a tiled network, rows in and, where wanted, rows out.

The first tiled stage reads the rows that it needs from a `RowSource` and forgets them; what it gives is small (a
pooled vector, a deep map) or goes to a ``sink`` row by row. Memory grows with the width of the image, not its area.

Refuses: graphs whose image is read outside the tiled stage; strips that come once for a stage that reads them twice.
Promises: the same result as the graph on the whole image, at any size that the stage accepts; a source that ends too
early is an error, and a file that is being written gets its name when it is complete.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import fx

from splitfx.errors import PlanError, UnsupportedError
from splitfx.ground.progress import Clock, Say, told
from splitfx.ground.table import dims
from splitfx.ir.graph import TensorSpec, info, layer, module_of
from splitfx.ir.modes import module_has_mode
from splitfx.ir.ops import is_size
from splitfx.tiling.plan.instructions import Finish, Instruction, Open, Patch, Run, Store, Take
from splitfx.tiling.plan.instructions import Reduce as ReduceRows
from splitfx.tiling.plan.schedule import Scheduler
from splitfx.tiling.run.execution import Execution, Program
from splitfx.tiling.run.executor import Tiled
from splitfx.tiling.stream.rows import Layout
from splitfx.tiling.stream.sinks import Reduce, Sink, Writer, opened
from splitfx.tiling.stream.sources import RowSource


@told
def stream(
    split: fx.GraphModule,
    source: Any,
    sink: Sink | None = None,
    *,
    reduce: Reduce | None = None,
    overwrite: bool = False,
    resume: bool = False,
    progress: Say = True,
) -> Any:
    """Run ``split``, whose first stage was tiled by `Tile`, on an image that is read row by row.

    ``source``: a `RowSource`, or what one is made of (array, memory map, path; floats as they are, 8 bit values
    divided by 255). An image, [C, H, W], comes row by row; a volume or a clip, [C, D, H, W], slice by slice; audio,
    [C, L], sample by sample. Its size may be another one than the traced; the steps stay those that were planned.
    Returns what the graph returns, for a batch of one.

    ``sink`` takes the map that the stage gives instead, as in ``Tile(until="layer4")``: a path ending in ``.npy`` or
    ``.tif``, an array of the map's sizes with or without the batch (of numpy, Zarr, HDF5; best in chunks of whole
    steps), or a function called with the first row and a tensor [1, C, rows, ...], top to bottom. The graph behind
    the stage is not run then; the path is returned, or None. ``reduce`` changes what goes there strip by strip:
    "argmax" gives the channel with the largest value, [1, 1, rows, ...], or any function of a strip that keeps its
    places, so that a map of logits never exists.

    With ``resume`` the rows lie in ``sink.part`` until all are there, and what was stopped goes on behind the last of
    them when it is called again; a reduction over the whole map inside the stage is then made again.

    Raises `PlanError`, `UnsupportedError`, `SplitfxError`.
    """
    call, tiled = _stage_of(split)
    given = source if isinstance(source, RowSource) else RowSource(source, layout=_layout(split))
    image = _Image(given, *_number_type(split))
    _check_channels(split, given)
    program = tiled.program((image,), replan=False)  # type: ignore[arg-type]  # asks for sizes, type and device only
    if not given.raw.again:
        image.spare(_needed(program, given))
    with torch.no_grad(), opened(sink, reduce, program, given, overwrite, resume) as writer:
        if writer is not None and writer.begun:
            program = Program(program.stage, program.schedule, partial(Scheduler, first=writer.begun))
            if not given.raw.again:
                image.spare(_needed(program, given))
        results = Streaming(program, image, writer, Clock("streaming", program.firings)).run_all()
        given.raw.finish()
    if sink is not None:
        return Path(sink) if isinstance(sink, str | os.PathLike) else None
    with torch.no_grad():
        return _Rest(split, call, results).outputs(image.shape)


# ---------------------------------------------------------------- the graph around the stage


def _stage_of(split: fx.GraphModule) -> tuple[fx.Node, Tiled]:
    """The first tiled stage, which must be the only reader of the one image."""
    specs = info(split).inputs
    nodes = [n for n in split.graph.nodes if n.op == "placeholder"]
    images = [n for n, spec in zip(nodes, specs, strict=True) if isinstance(spec, TensorSpec)]
    if len(images) != 1:
        raise PlanError(f"streaming needs a model with one input, an image; this one has {len(images)}")
    readers = [n for n in images[0].users if not is_size(n)]
    stages = [n for n in readers if isinstance(module_of(n), Tiled)]
    if not stages:
        raise PlanError("no tiled stage reads the image: transform the model with Tile first, as in Tile(rows=16)")
    if len(readers) > 1:
        other = next(n for n in readers if n is not stages[0])
        raise PlanError(
            f"layer {layer(other)} reads the whole image too, outside the tiled stage: it cannot be streamed"
        )
    if list(stages[0].args) != images:
        raise PlanError("the tiled stage reads something besides the image: it cannot be streamed")
    tiled = module_of(stages[0])
    assert isinstance(tiled, Tiled)
    training = [name for name, m in tiled.stage.named_modules() if m.training and module_has_mode(m)]
    if training:
        raise UnsupportedError(
            f"layer {training[0]} is in train mode and reads the whole map at once: call model.eval()"
        )
    return stages[0], tiled


def _number_type(split: fx.GraphModule) -> tuple[torch.dtype, torch.device]:
    """That of the weights, which may have been moved since the model was traced."""
    weight = next((p for p in split.parameters() if p.dtype.is_floating_point), None)
    if weight is not None:
        return weight.dtype, weight.device
    spec = next(s for s in info(split).inputs if isinstance(s, TensorSpec))
    return spec.dtype, torch.device(spec.device)


def _check_channels(split: fx.GraphModule, source: RowSource) -> None:
    spec = next(s for s in info(split).inputs if isinstance(s, TensorSpec))
    if len(spec.shape) != len(source.shape) + 1 or spec.shape[1] != source.shape[0]:
        raise PlanError(f"the model reads {dims(spec.shape)}; {source} has {source.shape[0]} channels")


def _layout(split: fx.GraphModule) -> Layout | None:
    """How an array lies, where the model's input says it."""
    rank = len(next(s for s in info(split).inputs if isinstance(s, TensorSpec)).shape)
    known: dict[int, Layout] = {3: "CL", 5: "CDHW"}
    return known.get(rank)


class _Rest(fx.Interpreter):
    """The graph with the stage's results given; the image is there by its sizes only."""

    def __init__(self, split: fx.GraphModule, call: fx.Node, results: list[torch.Tensor]) -> None:
        super().__init__(split)
        self.call, self.results = call, results

    def run_node(self, n: fx.Node) -> Any:
        return self.results if n is self.call else super().run_node(n)

    def outputs(self, shape: tuple[int, ...]) -> Any:
        split = self.module
        assert isinstance(split, fx.GraphModule)
        image = torch.empty(1, device="meta").expand(shape)
        given = [image if isinstance(spec, TensorSpec) else spec for spec in info(split).inputs]
        return split.graph.process_outputs(self.run(*given, enable_io_processing=False))


# ---------------------------------------------------------------- the image


class _Image:
    """Stands for the image among the tensors of an execution, and gives the pieces of it that are taken."""

    def __init__(self, source: RowSource, dtype: torch.dtype, device: torch.device) -> None:
        self.source, self.dtype, self.device = source, dtype, device
        self.shape = (1, *source.shape)
        self.forget_after: list[int] = []  # for every read the first row that is read later
        self.reads = 0

    def spare(self, needed: list[int]) -> None:
        """Keep no row longer than it is ``needed``: for every read, and behind the last, from which row on."""
        self.source.raw.forget(needed[0])
        self.forget_after = needed[1:]

    def piece(self, rows: tuple[int, int] | None, columns: tuple[int, int] | None) -> torch.Tensor:
        start, stop = rows if rows is not None else (0, self.shape[2])
        found = self.source.read(start, stop, columns, self.dtype, self.device)
        if self.forget_after:
            self.source.raw.forget(self.forget_after[self.reads])
        self.reads += 1
        return found


def _needed(program: Program, source: RowSource) -> list[int]:
    """For every read of the image, and behind the last, the first row that it or a later one needs. Rows come once:
    raises `PlanError` where all of them would have to be kept."""
    height = source.shape[1]
    spans = [rows or (0, height) for rows in _image_reads(program)]
    found = [height] * (len(spans) + 1)
    for i in reversed(range(len(spans))):
        found[i] = min(found[i + 1], spans[i][0])
    for (start, stop), later in zip(spans, found[1:], strict=True):
        if stop == height and later < start:
            raise PlanError(
                "the tiled stage reads the image more than once (it holds a reduction that is applied to the map, or "
                "runs in columns), and strips come only once: give an array or a file"
            )
    return found


def _image_reads(program: Program) -> Iterator[tuple[int, int] | None]:
    for one in program.instructions():
        if isinstance(one, Take) and one.src == 0:
            yield one.rows
        elif 0 in _operands(one) or _takes_image(program, one):
            yield None


def _operands(one: Instruction) -> tuple[int, ...]:
    """The registers that an instruction reads as they are."""
    if isinstance(one, Patch):
        return tuple(part for part, _, _ in one.parts)
    return one.srcs if isinstance(one, Run | ReduceRows) else ()


def _takes_image(program: Program, one: Instruction) -> bool:
    """An instruction whose kernel reads the whole image."""
    return isinstance(one, Run | Finish) and program.stage.sources[0] in one.kernel.takes


# ---------------------------------------------------------------- running


class Streaming(Execution):
    """An execution whose first source is an `_Image`, and whose map goes to a writer where there is one."""

    def __init__(self, program: Program, image: _Image, writer: Writer | None, clock: Clock) -> None:
        super().__init__(program, functional=False)
        self.image, self.writer, self.clock = image, writer, clock

    def run_all(self) -> list[torch.Tensor]:
        source = self.stage.sources[0]
        self.registers[0] = self.image  # type: ignore[assignment]
        self.wholes[source] = 0
        for instruction in self.program.instructions():
            self.act(instruction)
        return [] if self.writer is not None else [self._result(k) for k in self.stage.exits]

    def take(self, one: Take) -> None:
        if one.src == 0:
            self.registers[one.dst] = self.image.piece(one.rows, one.columns)
        else:
            super().take(one)

    def compute(self, one: Run) -> None:
        with self._whole_image(0 in _operands(one) or _takes_image(self.program, one)):
            super().compute(one)
        self.clock.tick()

    def finish(self, one: Finish) -> None:
        with self._whole_image(_takes_image(self.program, one)):
            super().finish(one)
        self.clock.tick()

    def patch(self, one: Patch) -> None:
        with self._whole_image(0 in _operands(one)):
            super().patch(one)
        self.clock.tick()

    def reduce(self, one: ReduceRows) -> None:
        with self._whole_image(0 in _operands(one)):
            super().reduce(one)
        self.clock.tick()

    @contextmanager
    def _whole_image(self, wanted: bool) -> Iterator[None]:
        """A kernel that reads the whole image at once, as where the image is not larger than a step."""
        if wanted:
            self.registers[0] = self.image.piece(None, None)
        yield
        if wanted:
            self.registers[0] = self.image  # type: ignore[assignment]

    def open(self, one: Open) -> None:
        if self.writer is None or one.kernel.exit < 0:
            super().open(one)

    def store(self, one: Store) -> None:
        if self.writer is None or one.kernel.exit < 0:
            super().store(one)
        else:
            full = one.columns == (0, one.kernel.sizes[1])
            self.writer.write(one.rows, None if full else one.columns, self.registers[one.src])
