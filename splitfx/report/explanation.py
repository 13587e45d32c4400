"""What the compiler did, as text for people: `str(explain(split))` and `str(compare(model, split, inputs))`.

Every line fits the terminal, or 100 columns. Figures stand before and after with their units and ratio; notes stand by
kind, and notes that say the same of many layers are one line that counts the layers. Nothing else is left
out; `to_json()` has every note on its own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from splitfx.ground.table import columns, dims, number, seconds, size, table, wrap
from splitfx.text import printable

if TYPE_CHECKING:
    from splitfx.compiler.pipeline import Figures, Step
    from splitfx.ir.graph import TraceInfo
    from splitfx.ir.notes import Note
    from splitfx.report.explain import Comparison, Explanation

PROMISES = {
    "equal": "the same function",
    "retrain": "the same shapes, fewer connections; fine-tune it",
    "reshape": "another signature",
    "approximate": "near the same function, and not checked against the model: see splitfx.compare_halo",
}
_AGAINST = {
    "equal": "the graph before the pass",
    "retrain": "the masked dense model",
    "reshape": "its reference",
    "approximate": "the same parts run one by one",
}
_KINDS = (("did", "done"), ("declined", "declined"), ("info", "also"))
_NAME = 26  # columns for the layer's name before a note; longer names get a line of their own
_VALUES = 40  # values of an option that are written
_ALIKE = 3  # texts that differ in names of layers only, from so many on, are one
_NAMES = re.compile(r"(?<![\w.'])[A-Za-z_]\w*(?:\.\w+)+|(?<![\w.'])[A-Za-z_]+\d\w*")  # layer1.0.conv1, conv1
_NAMED = 3  # layers named where many share a note


def explanation_text(explanation: Explanation) -> str:
    """The text of an `Explanation`."""
    lines = [f"{explanation.model}, traced with {explanation.front_end}"]
    lines += _notes(explanation.notes)
    if not explanation.steps:
        return printable("\n".join([*lines, "", "no pass has run on it"]))
    for position, step in enumerate(explanation.steps, 1):
        lines += ["", *_step(position, step)]
    if len(explanation.steps) > 1:
        first, last = explanation.steps[0].before, explanation.steps[-1].after
        lines += ["", f"all {len(explanation.steps)} passes together", "", *_figures(first, last)]
    return printable("\n".join(lines))


def summary(known: TraceInfo, counted: Figures) -> str:
    """A graph in a sentence or two: the model, what was done to it, what it costs at the traced size."""
    inputs = ", ".join(dims(shape) for shape in known.shapes if shape is not None)
    done = ", ".join(step.name for step in known.steps if step.changed) or "as it was traced"
    return (
        f"{known.model_class} on {inputs}: {done}. {number(counted.params)} parameters, {number(counted.macs)} MACs, "
        f"peak {size(counted.peak_bytes)} of live tensors, run by torch."
    )


def comparison_text(comparison: Comparison) -> str:
    """The text of a `Comparison`."""
    before, after = comparison.before, comparison.after
    rows = [
        _row("parameters", before.params, after.params, number),
        _row("MACs", before.macs, after.macs, number),
        _row("operations", before.ops, after.ops, number),
        _row("peak memory", before.peak_bytes, after.peak_bytes, size),
    ]
    return "\n".join(
        [
            wrap(f"{before.model} on {', '.join(before.inputs)}"),
            "",
            table(("", "before", "after", "change"), rows),
            "",
            *_peaks(before.peak_node, after.peak_node),
            wrap(
                f"the outputs differ by at most {comparison.max_abs:.2e}, {comparison.max_rel:.2e} of the largest value"
                if comparison.max_abs
                else "the outputs are equal, bit by bit"
            ),
        ]
    )


def title(step: Step) -> str:
    """A pass as it is written in a plan: ``group(factors=[8, 2, 2, 4, 4])``."""
    return f"{step.name}({', '.join(f'{key}={_value(one)}' for key, one in step.options.items())})"


def promise(step: Step) -> str:
    """What the step promised, and what its oracle found."""
    if not step.changed:
        return "changed nothing"
    words = f"promise {step.promise}: {PROMISES[step.promise]}. "
    if step.difference is None:
        return words + "Not verified: verify was off"
    found = "equal to" if step.difference == 0 else f"within {step.difference:.1e} of"
    return words + f"Verified in float64: outputs {found} {_AGAINST[step.promise]}"


def ratio(before: float, after: float) -> str:
    """The change as people say it: ``÷2.16``, ``×1.30``, ``same``."""
    if before == after:
        return "same"
    if not before or not after:
        return "-"
    found = max(before, after) / min(before, after)
    if found < 1.005:
        return f"{100 * (after / before - 1):+.2g} %"
    return (
        f"{'÷' if after < before else '×'}{found:.3g}"
        if found >= 10
        else f"{'÷' if after < before else '×'}{found:.2f}"
    )


def folded(notes: Iterable[Note]) -> list[tuple[str, str]]:
    """(where, what) with one entry per text, and per text that differs in names of layers only; ``where`` and the
    names in ``what`` are the first ones and the count of the others."""
    alike: dict[str, dict[str, list[str]]] = {}
    for note in notes:
        alike.setdefault(_NAMES.sub("…", note.what), {}).setdefault(note.what, []).append(note.where)
    found = []
    for texts in alike.values():
        if len(texts) < _ALIKE:
            found += [(_where(list(dict.fromkeys(places))), what) for what, places in texts.items()]
        else:
            places = [place for one in texts.values() for place in one]
            found.append((_where(list(dict.fromkeys(places))), _one_text(list(texts))))
    return found


def _one_text(texts: list[str]) -> str:
    """Texts that differ in names only, as one with the names listed."""
    names = zip(*(_NAMES.findall(text) for text in texts), strict=True)
    listed = iter([_listed_names(list(dict.fromkeys(column))) for column in names])
    return _NAMES.sub(lambda _: next(listed), texts[0])


def by_kind(notes: Sequence[Note]) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """(heading, folded notes) of each kind that occurs."""
    for kind, heading in _KINDS:
        if chosen := [note for note in notes if note.kind == kind]:
            yield heading, folded(chosen)


def _step(position: int, step: Step) -> Iterator[str]:
    took = seconds(step.seconds)
    name = f"{position}. {title(step)}"
    lines = wrap(name, "   ", columns() - len(took) - 2).splitlines()
    yield f"{lines[0].ljust(columns() - len(took))}{took}"
    yield from lines[1:]
    yield from _indent(wrap(promise(step), "", columns() - 3).splitlines())
    if step.changed:
        yield ""
        yield from _figures(step.before, step.after)
    for heading, notes in by_kind(step.notes):
        yield ""
        yield f"   {heading}"
        yield from _listed(notes, "     ")


def _figures(before: Figures, after: Figures) -> list[str]:
    rows = [
        _row("parameters", before.params, after.params, number),
        _row("MACs", before.macs, after.macs, number),
        _row("peak memory", before.peak_bytes, after.peak_bytes, size),
    ]
    drawn = table(("", "before", "after", "change"), rows).splitlines()
    return _indent([*drawn, *_peaks(before.peak_layer, after.peak_layer)])


def _row(name: str, before: float, after: float, words: Callable[[float], str]) -> tuple[str, str, str, str]:
    return name, words(before), words(after), ratio(before, after)


def _peaks(before: str, after: str) -> list[str]:
    text = f"memory peaks in {after}" + (f"; before, it peaked in {before}" if before != after else "")
    return wrap(text, "  ", columns() - 3).splitlines()


def _notes(notes: Sequence[Note]) -> list[str]:
    return _listed([(where, what) for _, found in by_kind(notes) for where, what in found], "   ")


def _listed(notes: Sequence[tuple[str, str]], indent: str) -> list[str]:
    room = max((len(where) for where, _ in notes if len(where) <= _NAME), default=4)
    hang = indent + " " * (room + 2)
    lines = []
    for where, what in notes:
        if len(where) > room:
            lines += wrap(f"{indent}{where}", f"{indent}  ").splitlines()
            lines += wrap(f"{indent}      {what}", f"{indent}      ").splitlines()
            continue
        lines += wrap(f"{indent}{where.ljust(room)}  {what}", hang).splitlines()
    return lines


def _where(places: list[str]) -> str:
    return places[0] if len(places) == 1 else f"{len(places)} layers: {_listed_names(places)}"


def _listed_names(names: list[str]) -> str:
    rest = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {rest} more" if rest > 0 else "")


def _value(value: object) -> str:
    """An option's value; of long ones (the groups of thousands of channels) their size, the plan has them in full."""
    if isinstance(value, dict) and any(isinstance(one, (list, tuple)) for one in value.values()):
        return f"{{{len(value)} entries}}"
    if isinstance(value, (list, tuple)) and len(value) > _VALUES:
        return f"[{', '.join(map(_value, value[:3]))}, …, {len(value)} in all]"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_value, value)) + "]"
    return str(value)


def _indent(lines: Iterable[str], by: str = "   ") -> list[str]:
    return [by + line if line else line for line in lines]
