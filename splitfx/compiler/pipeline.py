"""The pipeline: runs the passes of a plan and holds each to its promise.

For every pass: private copy, run, tidy and check the form, observe what changed, run the oracle of the promise,
record. The caller's graph is never touched. A pass that changes nothing needs no oracle; one that breaks its
promise is a `VerificationError`, so no wrong graph leaves this file.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import fx

from splitfx.analysis import carry_over, facts, version
from splitfx.analysis.oracle import (
    TOLERANCE,
    Pair,
    acts_as_in_eval,
    cuda_devices,
    has_constants,
    in_double,
    other_weights,
    require_equal,
    rounding,
    varied,
    within,
)
from splitfx.compiler.plan import Plan
from splitfx.compiler.protocol import Note, Outcome, Pass, Promise
from splitfx.compiler.sketch import sketch
from splitfx.errors import PassError, UnsupportedError
from splitfx.ground.progress import say
from splitfx.ir.editing import tidy
from splitfx.ir.graph import copy_graph, info, take_apart
from splitfx.ir.verifier import IllegalGraph
from splitfx.text import first_line


@dataclass(frozen=True)
class Figures:
    """Size of a graph at its traced input: parameters, multiply-accumulates, peak bytes (parameters apart)."""

    params: int
    macs: int
    peak_bytes: int
    peak_layer: str


@dataclass(frozen=True)
class Step:
    """What one pass did. ``difference`` is the oracle's measured figure; None where nothing changed or it was off."""

    name: str
    options: dict[str, object]
    promise: str
    changed: bool
    notes: tuple[Note, ...]
    seconds: float
    difference: float | None
    before: Figures
    after: Figures


def figures(graph: fx.GraphModule) -> Figures:
    known = facts(graph)
    return Figures(known.cost.params, known.cost.macs, known.memory.peak_bytes, known.memory.peak_layer)


def run_plan(
    graph: fx.GraphModule,
    plan: Plan,
    verify: bool = True,
) -> fx.GraphModule:
    """Run every pass of ``plan`` on a private copy of ``graph``.

    The result records the plan with what passes decided by measuring, behind what was done to ``graph`` before, so that
    a replay on the user's model gives the same graph.
    """
    resolved: list[Pass] = []
    work, origin = graph, info(graph).origin or sketch(graph)
    for number, step in enumerate(plan.passes, 1):
        say(f"pass {number} of {len(plan.passes)}: {step.name}")
        work, decided = _run(work, step, verify)
        resolved.append(decided)
    if work is not graph:
        take_apart(work, graph)
    earlier = info(graph).plan
    done = Plan((*_passes(earlier), *resolved), plan.input_shape or (earlier.input_shape if earlier else None))
    info(work).plan, info(work).origin = done, origin
    return work


def plan_since(graph: fx.GraphModule, split: fx.GraphModule) -> Plan:
    """What was done to ``graph`` to make ``split`` of it."""
    now = info(split).plan
    return Plan(now.passes[len(_passes(info(graph).plan)) :], now.input_shape)


def _passes(plan: Plan | None) -> tuple[Pass, ...]:
    return plan.passes if plan is not None else ()


def run_pass(graph: fx.GraphModule, step: Pass, verify: bool = True) -> tuple[fx.GraphModule, Pass]:
    """One pass on a private copy, and the pass as it decided; raises what it raises, or `VerificationError`."""
    work, done = _run(graph, step, verify)
    take_apart(work, graph)
    return work, done


def _run(graph: fx.GraphModule, step: Pass, verify: bool) -> tuple[fx.GraphModule, Pass]:
    """As `run_pass`; what the pass left as it was may still be the very tensors of ``graph``."""
    if step.needs_eval and not acts_as_in_eval(graph):
        raise UnsupportedError(f"pass '{step.name}' needs the model in eval mode: call model.eval() first")
    before = figures(graph)
    started = time.perf_counter()
    work, same = _copy_for(step, graph), facts(graph).version
    outcome = _done(step, work, graph)
    changed = version(work) != same or not _same_values(graph, work)
    difference: float | None = None
    if changed:
        _tidied(step, work)
    done = step if outcome.resolved is None else outcome.resolved
    notes, reference = outcome.notes, outcome.reference
    del outcome
    if changed and verify:
        say(f"checking what {step.name} did")
        pair = Pair(graph, work)
        difference = _held_to_promise(step, pair, reference)
        del reference  # as large as the model
        _held_on_other_weights(done, pair)
        del pair
    record = Step(
        step.name,
        step.to_dict(),
        step.promise.value,
        changed,
        notes,
        time.perf_counter() - started,
        difference,
        before,
        figures(work) if changed else before,
    )
    info(work).steps = [*info(work).steps, record]
    return work, done


def _copy_for(step: Pass, graph: fx.GraphModule) -> fx.GraphModule:
    """What the pass may rewrite: private in all that it may write to, with the facts that are known already."""
    work = copy_graph(graph, share=not step.writes_weights)
    carry_over(facts(graph), work)
    return work


def _done(step: Pass, work: fx.GraphModule, lender: fx.GraphModule) -> Outcome:
    """Run the pass on ``work``, which may hold tensors of ``lender``: those must be as they were afterwards."""
    lent = [] if step.writes_weights else [*lender.named_parameters(), *lender.named_buffers()]
    before = [_writes(tensor) for _, tensor in lent]
    with torch.random.fork_rng(devices=cuda_devices(work)):  # a pass that draws leaves the user's generator alone
        outcome = step.run(work, facts(work))
    for (name, tensor), count in zip(lent, before, strict=True):
        if _writes(tensor) != count:
            raise PassError(f"pass '{step.name}' has writes_weights = False and wrote into {name} of the model")
    return outcome


def _writes(tensor: torch.Tensor) -> int:
    """How often a tensor has been written to; torch does not count it for tensors made in inference mode."""
    return 0 if tensor.is_inference() else tensor._version


def _tidied(step: Pass, work: fx.GraphModule) -> None:
    try:
        tidy(work)
    except IllegalGraph as error:
        raise PassError(f"pass '{step.name}' left an illegal graph: {first_line(error)}") from error


def _same_values(graph: fx.GraphModule, work: fx.GraphModule) -> bool:
    """Whether a pass that left the nodes alone left the weights alone too."""
    before, after = graph.state_dict(keep_vars=True), work.state_dict(keep_vars=True)
    same = lambda a, b: a is b or torch.equal(a, b)  # noqa: E731
    return before.keys() == after.keys() and all(same(before[key], after[key]) for key in before)


def _held_to_promise(step: Pass, pair: Pair, reference: fx.GraphModule | None) -> float:
    if step.promise is Promise.EQUAL:
        return _equal(step, pair)
    if step.promise is Promise.RESHAPE:
        return step.held(pair.before, pair.after)
    if reference is None:
        raise PassError(
            f"pass '{step.name}' promises {step.promise.value} and changed the graph, but gave no "
            "reference to be checked against"
        )
    # A part of the image is another part at another size: what is approximate is checked at the traced one.
    return require_equal(step.name, reference, pair.after, small=step.promise is not Promise.APPROXIMATE)


def _held_on_other_weights(done: Pass, pair: Pair) -> None:
    """Check once more where weights that are all alike would hide a fault.

    A fresh model's norms are all ones and zeros: channels that are mixed up there change nothing, and a norm whose
    scale starts at zero shuts off everything in front of it. Where the pass only moved the weights, both graphs run
    on others; else, and where they then differ, the pass runs again.
    """
    before = pair.before
    if not has_constants(before):
        return
    moved = done.promise is Promise.EQUAL and _weights_of(pair.after) <= _weights_of(before)
    if moved and pair.difference(other=other_weights(before)) <= TOLERANCE:
        return
    pair.forget()
    other = varied(before)
    carry_over(facts(before), other)
    # A dense reference of its own is all that a RETRAIN pass is held to, so what it started from may be rewritten.
    kept = done.promise is not Promise.RETRAIN or done.writes_weights
    work = _copy_for(done, other) if kept else other
    outcome = _done(done, work, before)
    _tidied(done, work)
    _held_to_promise(done, Pair(other, work), outcome.reference)


def _weights_of(graph: fx.GraphModule) -> set[int]:
    return {id(tensor) for tensor in (*graph.parameters(), *graph.buffers())}


def _equal(step: Pass, pair: Pair) -> float:
    """Exact where the pass moved weights; where it computed new ones, exact in float64 and rounded here."""
    found = pair.difference()
    if found <= TOLERANCE or rounding(pair.before) <= TOLERANCE:
        return within(step.name, found)
    exact = in_double(pair.before)
    step.run(exact, facts(exact))
    _tidied(step, exact)
    require_equal(step.name, exact, pair.after, rounding(pair.before))
    return require_equal(step.name, pair.before, exact)
