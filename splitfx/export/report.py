"""What `check_onnx` found, as frozen data: one row per provider, a table for people, JSON for machines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from splitfx.ground.notebook import Shown
from splitfx.ground.table import table
from splitfx.text import cut, printable

HEAD = (
    "provider",
    "verdict",
    "max abs",
    "max rel",
    "median ms",
    "p90 ms",
    "torch ms",
    "peak MiB",
    "fell back",
)


@dataclass(frozen=True)
class OutputError:
    """The largest difference of one output: absolute, and relative to its largest absolute value."""

    name: str
    shape: tuple[int, ...]
    max_abs: float
    max_rel: float


@dataclass(frozen=True)
class ProviderRow:
    """One provider. Times in milliseconds, memory in bytes; None where not measured (`peak_why` says why).

    verdict: "ok", "mismatch: ..." or "unavailable: why". torch_ms, torch_p90_ms: the module in eager mode,
    on the provider's device, same inputs and thread count.
    peak_bytes: the most that one run added to the loaded model, in a fresh process with `session_options()`;
        load_bytes: the loaded model.
    default_peak_bytes: the same with onnxruntime's own options; measured for files with tiled stages.
    tiles: what each tiled stage of the model became in the file.
    fallback: nodes that ran on another provider, as "name (op on provider)".
    """

    provider: str
    verdict: str
    outputs: tuple[OutputError, ...] = ()
    median_ms: float | None = None
    p90_ms: float | None = None
    torch_ms: float | None = None
    torch_p90_ms: float | None = None
    peak_bytes: int | None = None
    load_bytes: int | None = None
    peak_why: str = ""
    default_peak_bytes: int | None = None
    fallback: tuple[str, ...] = ()
    tiles: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return self.verdict == "ok"

    @property
    def max_abs(self) -> float | None:
        return max((one.max_abs for one in self.outputs), default=None)

    @property
    def max_rel(self) -> float | None:
        return max((one.max_rel for one in self.outputs), default=None)

    def cells(self) -> tuple[str, ...]:
        peak = None if self.peak_bytes is None else self.peak_bytes / 2**20
        times = (_number(one, ".2f") for one in (self.median_ms, self.p90_ms, self.torch_ms, peak))
        median, p90, torch_ms, peak_mib = times
        word = self.verdict.partition(":")[0]
        errors = (_number(self.max_abs, ".1e"), _number(self.max_rel, ".1e"))
        fell = str(len(self.fallback)) if self.outputs else "-"
        return (self.provider, word, *errors, median, p90, torch_ms, peak_mib, fell)


@dataclass(frozen=True)
class RuntimeReport(Shown):
    """`rows`, one per provider; `ok` when every provider asked for ran and agreed with the module.

    tolerance: the largest allowed error of an output relative to its own largest absolute value, or None
    for the default of each output's dtype. inputs: name, dtype and shape of what was fed.
    """

    path: str
    inputs: tuple[str, ...]
    threads: int
    runs: int
    rows: tuple[ProviderRow, ...]
    tolerance: float | None = None

    @property
    def ok(self) -> bool:
        return bool(self.rows) and all(row.ok for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "ok": self.ok}

    def __str__(self) -> str:
        lines = [f"{self.path}: {'ok' if self.ok else 'NOT ok'}"]
        lines += [f"  fed {one}" for one in self.inputs]
        lines += [f"  {one}" for one in next((row.tiles for row in self.rows if row.tiles), ())]
        lines += [
            f"  {self.runs} runs, {self.threads} CPU thread{'s' * (self.threads != 1)}",
            "",
            *table(HEAD, [row.cells() for row in self.rows], left=(0, 1)).splitlines(),
        ]
        for row in self.rows:
            lines += _remarks(row)
        return "\n".join(line and cut(printable(line.replace("\n", " ")), 100) for line in lines)


def _remarks(row: ProviderRow) -> list[str]:
    lines = [] if row.ok else [f"{row.provider}: {row.verdict}"]
    if row.default_peak_bytes is not None:
        peak = row.default_peak_bytes / 2**20
        lines.append(f"{row.provider}: peak with onnxruntime's default options {peak:.2f} MiB; see session_options()")
    if row.peak_why:
        lines.append(f"{row.provider}: no peak memory: {row.peak_why}")
    shown = row.fallback[:5]
    lines += [f"{row.provider}: fell back: {one}" for one in shown]
    if len(row.fallback) > len(shown):
        lines.append(f"{row.provider}: fell back: and {len(row.fallback) - len(shown)} more")
    return lines


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
