"""A model divided among ranks is the model, forward and backward, at any size; ranks are threads here."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any, cast

import pytest
import torch
from torch import fx, nn

import splitfx
from splitfx.analysis.live import LiveStorage
from splitfx.errors import UnsupportedError
from splitfx.parallel import ParallelError, Rows
from splitfx.parallel.shard import execution, stage, tape
from splitfx.parallel.shard.awaited import Costs
from splitfx.parallel.shard.shares import Shares
from splitfx.passes import Tile
from tests.parallel.checks import EXACT, GRADIENTS, apart, checked, gradients, off, require
from tests.parallel.networks import Classifier, Decoder, Pair, Sequence, UNet
from tests.parallel.threads import on_ranks, shard
from tests.sampled import sampled
from tests.tiling.test_kernels import EVERYTHING, case

NOT_TRAINED = ("in place", "in place, swapped")  # these models cannot be: they overwrite what their gradients need
ALWAYS, NEVER = Costs(message=-1e9, crossing=0.0), Costs(message=1e9, crossing=0.0)


def drawn(*sizes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=generator, dtype=torch.float64) for s in sizes]


# name -> (model, traced sizes, other sizes)
NETWORKS: dict[str, tuple[Any, list[tuple[int, ...]], list[tuple[int, ...]]]] = {
    "U-Net": (UNet, [(1, 3, 24, 16)], [(2, 3, 37, 29)]),
    "U-Net with fewer rows than ranks": (UNet, [(1, 3, 16, 16)], [(1, 3, 9, 19)]),
    "volume": (lambda: UNet(3, 2, 2), [(1, 3, 12, 8, 8)], [(1, 3, 11, 9, 10)]),
    "decoder": (Decoder, [(1, 4, 8, 6)], [(2, 4, 7, 5)]),
    "classifier": (Classifier, [(1, 3, 32, 32)], [(3, 3, 41, 27)]),
    "two inputs": (Pair, [(2, 3, 16, 12), (2, 3, 8, 6), (2, 3)], [(1, 3, 19, 13), (1, 3, 11, 5), (1, 3)]),
    "sequence": (Sequence, [(1, 3, 40)], [(2, 3, 53)]),
}


@cache
def network(name: str) -> fx.GraphModule:
    make, sizes, _ = NETWORKS[name]
    torch.manual_seed(0)
    return splitfx.trace(make().double().eval(), tuple(drawn(*sizes)))


@pytest.mark.parametrize(("ranks", "costs"), [(2, ALWAYS), (3, ALWAYS), (3, NEVER)], ids=["2", "3", "3, again"])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_at_other_sizes(name: str, ranks: int, costs: Costs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Halos are sent behind every layer that needs any, or computed again behind all."""
    monkeypatch.setitem(stage.COSTS, "cpu", costs)
    graph, inputs = network(name), drawn(*NETWORKS[name][2])

    def job(rank: int) -> Any:
        with shard(graph) as made:
            return checked(made, graph, inputs)

    for found in on_ranks(ranks, job):
        require(found)
        assert (found["awaited"] > 0) == (costs is ALWAYS)


@pytest.mark.parametrize("name", sampled(EVERYTHING, 5))
def test_every_rule(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All kinds of layers; halos are sent behind every layer, and behind none."""
    graph, ((x,), _) = case(name)

    def job(rank: int) -> Any:
        with shard(graph) as made:
            return checked(made, graph, [x], train=name not in NOT_TRAINED)

    for number, one in enumerate((ALWAYS, NEVER)):
        monkeypatch.setitem(stage.COSTS, "cpu", one)
        for found in on_ranks(2 + (len(name) + number) % 2, job):
            require(found)


def test_a_message_for_several_layers() -> None:
    """Where a few rows of several layers are computed again in place of a message for each."""
    graph, x = network("U-Net"), torch.empty(1, 3, 512, 512, device="meta", dtype=torch.float64)

    def job(rank: int) -> Any:
        with shard(graph) as made:
            return made.plan(x)

    plan = on_ranks(2, job)[0]
    convolutions = [m for m in graph.modules() if isinstance(m, nn.Conv2d)]
    assert 0 < len(plan.awaited) < len(convolutions)
    assert "sent per call" in str(plan)


# ---------------------------------------------------------------- inputs and outputs in rows


@pytest.mark.parametrize(("counts", "costs"), [((11, 18, 8), ALWAYS), ((37, 0, 0), ALWAYS), ((0, 1, 36), NEVER)])
def test_no_rank_holds_the_image(counts: tuple[int, ...], costs: Costs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each gives rows and gets rows: uneven, or none."""
    monkeypatch.setitem(stage.COSTS, "cpu", costs)
    graph, (x,) = network("U-Net"), drawn((2, 3, 37, 29))
    wanted = graph(x).detach()
    whole = copy.deepcopy(graph)
    expected = gradients(whole, [x], list(whole.parameters()))

    def job(rank: int) -> Any:
        first = sum(counts[:rank])
        part = x[:, :, first : first + counts[rank]].clone()
        with shard(graph, given="rows", gather="none") as made:
            with torch.no_grad():
                y, rows = made(part), made.rows
            given = part.clone().requires_grad_()
            z = made(given * 1)
            assert rows[0] is not None
            low, high = rows[0].start, rows[0].stop
            weights = torch.linspace(-1, 1, wanted.numel(), dtype=x.dtype).view(wanted.shape)
            (z * weights[:, :, low:high]).sum().backward()
            made.reduce_gradients()
            given.grad = torch.zeros_like(given) if given.grad is None else given.grad  # it has no rows
            grads = [given.grad, *(p.grad for p in made.parameters())]
            return y, rows, grads

    found = on_ranks(3, job)
    assert [rows[0] for _, rows, _ in found] == [Rows(2, sum(counts[:r]), sum(counts[: r + 1]), 37) for r in range(3)]
    assert off(torch.cat([y for y, _, _ in found], 2), wanted) <= EXACT
    image = torch.cat([grads[0] for _, _, grads in found], 2)
    for _, _, grads in found:
        assert apart([image, *grads[1:]], expected) <= GRADIENTS


def test_the_plan_says_which_rows_to_give() -> None:
    graph = network("two inputs")
    sizes = NETWORKS["two inputs"][2]

    def job(rank: int) -> Any:
        with shard(graph, given="rows", gather="none", weights=(3, 1)) as made:
            plan = made.plan(*(torch.empty(s, device="meta", dtype=torch.float64) for s in sizes))
            given = [
                x if rows is None else x.narrow(rows.dim, rows.start, rows.stop - rows.start)
                for x, rows in zip(drawn(*sizes), plan.inputs, strict=True)
            ]
            before = made.sent_bytes
            with torch.no_grad():
                y = made(*given)
            return plan, y, made.sent_bytes - before, made.rows

    found = on_ranks(2, job)
    assert [plan.inputs for plan, *_ in found] == [
        (Rows(2, 0, 14, 19), Rows(2, 0, 8, 11), None),
        (Rows(2, 14, 19, 19), Rows(2, 8, 11, 11), None),
    ]
    wanted = graph(*drawn(*sizes))
    for name in ("sum", "small"):
        assert off(torch.cat([y[name] for _, y, _, _ in found], 2), wanted[name]) <= EXACT
    for plan, _, sent, rows in found:
        assert plan.sent_bytes == sent
        assert plan.outputs == rows
        assert None not in rows


def test_one_rank_gathers() -> None:
    graph, (x,) = network("U-Net"), drawn((1, 3, 21, 16))

    def job(rank: int) -> Any:
        with shard(graph, gather="first", weights=(1, 2, 1)) as made:
            with torch.no_grad():
                before = made.sent_bytes
                y = made(x)
                assert made.sent_bytes - before == made.plan(x).sent_bytes
            with pytest.raises(UnsupportedError, match="gather='first' other ranks have no loss"):
                made(x)
            return y

    first, *others = on_ranks(3, job)
    assert off(first, graph(x)) <= EXACT
    assert others == [None, None]


# ---------------------------------------------------------------- training, tiles, memory


def test_steps_of_an_optimizer() -> None:
    """As one process takes them, with tied layers, of which ranks without rows have no gradient."""
    graph, inputs = network("classifier"), drawn((2, 3, 33, 27))

    def stepped(model: Any, parameters: list[nn.Parameter], reduce: Any) -> list[torch.Tensor]:
        optimizer = torch.optim.SGD(parameters, 0.1, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            logs, y = model(*inputs)
            (-logs[:, 1].mean() + y.square().mean()).backward()
            reduce()
            optimizer.step()
        return [p.detach() for p in parameters]

    def job(rank: int) -> Any:
        with shard(graph) as made:
            return stepped(made, made.parameters(), made.reduce_gradients)

    whole = copy.deepcopy(graph)
    wanted = stepped(whole, list(whole.parameters()), lambda: None)
    for found in on_ranks(3, job):
        assert apart(found, wanted) <= GRADIENTS


def test_frozen_layers_send_no_gradients() -> None:
    graph, inputs = copy.deepcopy(network("U-Net")), drawn((1, 3, 21, 16))
    for name, p in graph.named_parameters():
        p.requires_grad_(name.startswith("out"))

    def job(rank: int) -> Any:
        with shard(graph) as made:
            made(*inputs).sum().backward()
            plan = made.plan(*inputs, gradients=True)
            made.reduce_gradients()
            return plan.backward_bytes, [p.grad is not None for p in made.parameters()]

    for back, there in on_ranks(2, job):
        assert back == 0
        assert there == [p.requires_grad for p in graph.parameters()]


@pytest.mark.parametrize("options", [{"rows": 2}, {"budget": "least"}, {"rows": 3, "recompute": 0}], ids=str)
def test_tiles_on_each_rank(options: dict[str, Any]) -> None:
    graph, inputs = network("decoder"), drawn((1, 4, 17, 10))
    tiled = splitfx.transform(graph, Tile(**options), verify=False)

    def job(rank: int) -> Any:
        with shard(tiled) as made:
            return checked(made, graph, inputs)

    for found in on_ranks(2, job):
        require(found)
        assert found["awaited"] == 0  # the schedule is the user's


@pytest.mark.parametrize("name", ["U-Net", "decoder"])
def test_memory_of_a_rank(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Less than half of one process, and as many bytes as the plan says."""
    graph, (x,) = network(name), drawn((1, 3, 256, 64) if name == "U-Net" else (1, 4, 64, 16))
    monkeypatch.setattr(stage, "PIECE", 2**15)  # maps are larger than pieces, as large ones are
    with torch.no_grad(), LiveStorage(counted=[x], state=[*graph.parameters(), *graph.buffers()]) as watch:
        graph(x)
        alone = watch.peak

    def job(rank: int) -> Any:
        with shard(graph, given="rows", gather="none") as made, torch.no_grad():
            part = x.chunk(2, 2)[rank].clone()
            made(part)
            state = [*made.network.graph.parameters(), *made.network.graph.buffers()]
            with LiveStorage(counted=[part], state=state) as watch:
                made(part)
                return watch.peak, made.plan(x).peak_bytes

    for peak, predicted in on_ranks(2, job):
        assert peak <= 0.5 * alone
        assert peak <= 1.03 * predicted


# ---------------------------------------------------------------- refusals


def test_refused() -> None:
    graph = network("U-Net")
    trains = copy.deepcopy(graph).train()
    pooled = splitfx.trace(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval(), drawn((1, 3, 8, 8))[0].float())
    flat = splitfx.trace(nn.Linear(3, 2).eval(), torch.randn(2, 3))
    for options, why in (
        ({"gather": "last"}, "gather is 'all' or 'first' or 'none', not 'last'"),
        ({"given": "half"}, "given is 'whole' or 'rows', not 'half'"),
        ({"weights": (1, 2)}, "weights are 1 numbers"),
        ({"weights": (0,)}, "weights are 1 numbers"),
    ):
        with pytest.raises(UnsupportedError, match=why):
            on_ranks(1, lambda rank, options=options: shard(graph, **options).__enter__())
    for model, why in ((trains, "train mode: call graph.eval"), (flat, "nothing to divide"), (UNet(), "splitfx.trace")):
        with pytest.raises(UnsupportedError, match=why):
            on_ranks(1, lambda rank, model=model: shard(cast(Any, model)).__enter__())
    with pytest.raises(UnsupportedError, match="the model takes 1 inputs"):
        on_ranks(1, lambda rank: shard(pooled).__enter__()())


class Noisy(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x + torch.randn_like(x)).relu()


def test_random_numbers_would_differ_from_rank_to_rank() -> None:
    graph = splitfx.trace(Noisy(), torch.randn(1, 3, 8, 8), verify=False)
    with pytest.raises(UnsupportedError, match="is random: ranks would draw other numbers"):
        on_ranks(1, lambda rank: shard(graph).__enter__())


class Reads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: torch.Tensor) -> Any:
        return self.conv(x), x.cumsum(2)


def test_inputs_that_are_read_whole_are_given_whole() -> None:
    graph = splitfx.trace(Reads().eval(), torch.randn(1, 3, 8, 8))
    with pytest.raises(UnsupportedError, match="reads input x whole: give it whole"):
        on_ranks(1, lambda rank: shard(graph, given="rows").__enter__())


def test_ranks_that_differ() -> None:
    graph, (x,) = network("U-Net"), drawn((1, 3, 21, 16))

    def other_inputs(rank: int) -> Any:
        with shard(graph) as made:
            return made(x[..., : 16 - rank])

    def other_weights(rank: int) -> Any:
        own = copy.deepcopy(graph)
        next(own.parameters()).data.add_(rank * 1e-12)
        return shard(own).__enter__()

    def no_rows(rank: int) -> Any:
        with shard(graph, given="rows") as made:
            made(x[:, :, :0])

    with pytest.raises(ParallelError, match="rank 1 was called with other inputs than rank 0"):
        on_ranks(2, other_inputs)
    with pytest.raises(ParallelError, match="different models"):
        on_ranks(2, other_weights)
    with pytest.raises(UnsupportedError, match="no rank was given any row"):
        on_ranks(2, no_rows)


# ---------------------------------------------------------------- sabotage


def wrong(name: str = "decoder", ranks: int = 2) -> dict[str, float]:
    """How far the results and gradients of rank 0 are off."""
    graph, inputs = network(name), drawn(*NETWORKS[name][2])

    def job(rank: int) -> Any:
        with shard(graph) as made:
            return checked(made, graph, inputs)

    return on_ranks(ranks, job)[0]


@pytest.fixture
def sending(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(stage.COSTS, "cpu", ALWAYS)


@pytest.mark.usefixtures("sending")
@pytest.mark.parametrize("name", ["U-Net", "volume", "sequence"])
def test_sabotage_a_halo_one_row_short(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = execution.ShareExecution._cross

    def short(self: Any, one: Any) -> None:
        honest(self, one)
        for parcel in one.received:
            piece = self.registers[parcel.register].clone()
            parcel.kernel.cut(piece, (0, 1)).zero_()
            self.registers[parcel.register] = piece

    monkeypatch.setattr(execution.ShareExecution, "_cross", short)
    found = wrong(name)
    assert found["off"] > 1e-3
    assert found["apart"] > 1e-3


@pytest.mark.usefixtures("sending")
def test_sabotage_rows_that_no_rank_sends(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Shares.crossings
    monkeypatch.setattr(Shares, "crossings", lambda self, kernel: list(honest(self, kernel))[1:])
    with pytest.raises((splitfx.SplitfxError, RuntimeError, IndexError, AssertionError, TypeError)):
        wrong("U-Net", 3)


def test_sabotage_a_forgotten_reduction(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = execution.ShareExecution._merge

    def alone(self: Any, kernel: Any, totals: dict[int, torch.Tensor]) -> None:
        honest(self, kernel, {self.job.rank: totals[self.job.rank]})

    monkeypatch.setattr(execution.ShareExecution, "_merge", alone)
    assert wrong()["off"] > 1e-3


def test_sabotage_a_count_that_is_not_the_rows_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Statistics of uneven shares, merged as if they were even."""
    monkeypatch.setattr(execution, "_count", lambda behind, rows, whole: behind // 2)
    assert wrong()["off"] > 1e-4


@pytest.mark.usefixtures("sending")
@pytest.mark.parametrize("name", ["U-Net", "decoder"])
def test_sabotage_gradients_that_stay(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = tape._Crossing.backward

    def kept(ctx: Any, token: Any, *grads: Any) -> Any:
        found = honest(ctx, token, *grads)
        return (*found[:3], *(None if g is None else torch.zeros_like(g) for g in found[3:]))

    monkeypatch.setattr(tape._Crossing, "backward", staticmethod(kept))
    found = wrong(name)
    assert found["off"] <= EXACT
    assert found["apart"] > 1e-3


def test_sabotage_a_loss_that_every_rank_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = tape.Left.forward
    monkeypatch.setattr(
        tape.Left, "forward", staticmethod(lambda ctx, counts, *rest: honest(ctx, (True,) * len(counts), *rest))
    )
    assert wrong("classifier")["apart"] > 1e-3


@pytest.mark.usefixtures("sending")
def test_sabotage_bytes_that_are_not_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = execution.Share.spec

    def taller(self: Any, kernel: Any, rows: tuple[int, int]) -> Any:
        return honest(self, kernel, (rows[0], rows[1] + 1))

    graph, (x,) = network("U-Net"), drawn((1, 3, 21, 16))

    def job(rank: int) -> Any:
        with shard(graph) as made, torch.no_grad():
            before = made.sent_bytes
            made(x)
            return made, made.sent_bytes - before

    made, sent = on_ranks(2, job)[0]
    assert made.plan(x).sent_bytes == sent
    monkeypatch.setattr(execution.Share, "spec", taller)
    assert made.plan(x).sent_bytes != sent
