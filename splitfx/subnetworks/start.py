"""Where sub-models start from: step-downs solved by least squares against what the base model has at the cut.

The convolution of a step-down and the batch norm behind it are one affine map of the image. It is solved by ridge
regression for the values in front of the cut's activation, behind the pools that lie on the way. What lies behind
starts with the base model's weights. Statistics of a sub-model's own are then taken from what it really computes.

To solve again for what a rectifier makes of them (where it gives 0, any value below does) brought the values at the cut
nearer, and the sub-models less accuracy on Fashion-MNIST.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn

from splitfx.carving.narrow import BatchNorm
from splitfx.carving.reconstruction import PARTS, layers
from splitfx.carving.reconstruction.lockstep import Values, Walk, batched, check_range, moments
from splitfx.carving.reconstruction.regression import Normal, solved
from splitfx.errors import PlanError
from splitfx.ir.graph import layer, module_of, set_path
from splitfx.ir.modes import in_eval
from splitfx.ir.notes import Note
from splitfx.ir.ops import op, op_name
from splitfx.subnetworks.build import epilogue
from splitfx.subnetworks.entry import Entry, entries
from splitfx.subnetworks.model import detached


def solve_step_downs(base: fx.GraphModule, made: Sequence[tuple[fx.Node, Entry]], inputs: Any) -> list[Note]:
    """Solve the step-downs of new entries, each with its cut in ``base``, the graph without them; notes with the error
    at each cut. Raises `PlanError` for inputs that do not fit the model, and for a single one."""
    given = batched(base, inputs)
    check_range(base, given)
    if sum(len(next(t for t in some if isinstance(t, torch.Tensor))) for some in given) < 2:
        raise PlanError("calibration is a single input; give several: a few hundred do")
    paths = {cut: path_to(cut) for cut, _ in made}
    kept = {operand for path in paths.values() for node in path for operand in (node, *node.all_input_nodes)}
    images = [n for n in base.graph.nodes if n.op == "placeholder"]
    walk = Walk(base, given, kept=[*kept, *images, *paths])
    notes = []
    for cut, entry in sorted(made, key=lambda one: walk.place[one[0]]):
        where = f"sub{entry.number}"
        if entry.form == "embedding":
            notes.append(Note(where, "starts from the model's own embedding, which is not solved", "info"))
            continue
        walk.until(cut)
        error = _Solved(walk, paths[cut], entry, walk.of(images[entry.reads])).error(walk.of(cut))
        for module in entry.modules():
            module.training = base.training
        what = f"step-down solved on the calibration; relative error at {layer(cut)} {error:.3f}"
        notes.append(Note(where, what, "info"))
    return notes


def path_to(cut: fx.Node) -> list[fx.Node]:
    """The nodes behind the conv (or sum) that a cut's tensor comes from, up to the cut; that itself first."""
    first, _ = epilogue(cut)
    path = [cut]
    while path[-1] is not first:
        path.append(path[-1].all_input_nodes[0])
    return path[::-1]


class _Solved:
    """One step-down, solved in place."""

    def __init__(self, walk: Walk, path: list[fx.Node], entry: Entry, image: Values) -> None:
        self.walk, self.path, self.image, self.graph = walk, path, image, entry.step_down
        nodes = [n for n in self.graph.graph.nodes if n.op not in ("placeholder", "output")]
        self.conv = nodes[0]
        self.order: list[int] = next((list(n.args[1]) for n in nodes if op_name(n) == "permute"), [])  # type: ignore[arg-type]
        self.behind = [n for n in nodes[1:] if op_name(n) != "permute"]
        self.origins = [n for n in path[1:] if op(n).activates or op(n).normalizes] if self.behind else []
        lead = next((i for i, n in enumerate(self.behind) if not _is_affine(module_of(n))), len(self.behind))
        self.norms, self.later = self.behind[:lead], self.behind[lead:]
        with in_eval(walk.module, entry), torch.no_grad():
            self.solve()

    def solve(self) -> None:
        module: Any = module_of(self.conv)
        free = bool(self.norms) or module.bias is not None
        wanted = [self.turned(v) for v in self.wanted()]
        weight, bias = self.fitted(module, wanted, free)
        conv = layers.with_weights(module, weight.to(module.weight.dtype), None if self.norms else bias)
        set_path(self.graph, str(self.conv.target), conv)
        given = [conv(x) for x in self.image]
        for number, norm in enumerate(self.norms):
            offset = bias if number == 0 else torch.zeros_like(bias)
            given = self.put(norm, given, torch.ones_like(bias), offset)
        for node, origin in zip(self.later, self.origins[len(self.norms) :], strict=True):
            given = self.started(node, origin, given)
        self.given = given

    def wanted(self) -> Values:
        """What the affine map should give: the base model's values at the cut without the activations."""
        skipped = set(self.origins[len(self.norms) :])
        found = []
        for env in self.walk.envs:
            value = env[self.path[0]]
            for before, node in zip(self.path, self.path[1:], strict=False):
                if node not in skipped:
                    self.walk.env = {**env, before: value}
                    value = self.walk.run_node(node)
            found.append(value)
        return found

    def turned(self, value: torch.Tensor) -> torch.Tensor:
        """A value at the cut with its channels in front, as the convolution gives them."""
        return value.permute(*sorted(range(len(self.order)), key=self.order.__getitem__)) if self.order else value

    def fitted(self, module: Any, wanted: Values, free: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight and bias (zero unless ``free``) of the convolution, in float64."""
        (blocks,) = layers.blocks_of(module, None)
        sizes = [(len(y), *y.shape[2:]) for y in wanted]
        count = sum(s[0] for s in sizes)
        share = min(1.0, layers.wanted_positions(module, [blocks]) / sum(math.prod(s) for s in sizes))
        generator, first, sums = torch.Generator().manual_seed(0), 0, dict[int, Normal]()
        for x, y, size in zip(self.image, wanted, sizes, strict=True):
            at = layers.positions(size, share, generator)
            part = (at[0] + first) * min(PARTS, count) // count
            first += size[0]
            for number in part.unique().tolist():
                some = tuple(i[part == number] for i in at)
                read, right = layers.windows(module, x, some), layers.rows(y, some, channels_last=False)
                sums[number] = layers.normal(read, right, blocks).plus(sums.get(number))
        start = torch.zeros_like(layers.weights_in(module, blocks))
        found, offset, _ = solved(list(sums.values()), start, free)
        weight = torch.zeros_like(module.weight, dtype=torch.float64)
        layers.put_in(weight, found, blocks, grouped=False)
        return weight, offset[0]

    def put(self, node: fx.Node, given: Values, slope: torch.Tensor, offset: torch.Tensor) -> Values:
        """A batch norm that does ``slope · x + offset``, with the statistics of what it reads; what it gives."""
        norm: Any = module_of(node)
        made = layers.with_moments(norm, *moments(given), slope, offset)
        set_path(self.graph, str(node.target), made)
        return [made(x) for x in given]

    def started(self, node: fx.Node, origin: fx.Node, given: Values) -> Values:
        """What lies behind the affine map starts with the base model's weights."""
        module: Any = module_of(node)
        if module is None:
            return [node.target(x, *node.args[1:], **node.kwargs) for x in given]  # type: ignore[operator, misc]
        theirs: Any = module_of(origin)
        if _is_affine(theirs):
            slope = theirs.weight.double() / (theirs.running_var.double() + theirs.eps).sqrt()
            offset = theirs.bias.double() - theirs.running_mean.double() * slope
            return self.put(node, given, slope.detach(), offset.detach())
        module.load_state_dict(theirs.state_dict())
        return [module(x) for x in given]

    def error(self, wanted: Values) -> float:
        """Of what the step-down gives at the cut, relative to how the base model's values vary there."""
        wanted = [self.turned(v) for v in wanted]
        _, var = moments(wanted)
        left = sum(float((a - b).double().square().sum()) for a, b in zip(self.given, wanted, strict=True))
        every = float(var.sum()) * sum(v.numel() // v.shape[1] for v in wanted)
        return (left / every) ** 0.5 if every else 0.0


def take_statistics(graph: fx.GraphModule, number: int, inputs: Any) -> None:
    """Give the norms of which a sub-model has statistics of its own those of what they read in it."""
    _, entry = entries(graph)[number]
    if not entry.private:
        return
    sub = detached(graph, number)
    walk = Walk(sub, batched(sub, inputs))
    for node in list(sub.graph.nodes):
        norm: Any = module_of(node)
        if node.op == "call_module" and str(node.target) in entry.private:
            walk.before(node)
            mean, var = moments(walk.of(node.all_input_nodes[0]))
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(var)


def _is_affine(module: nn.Module | None) -> bool:
    """A batch norm that is an affine map in eval mode, with weights to set."""
    return isinstance(module, BatchNorm) and module.running_var is not None and module.weight is not None
