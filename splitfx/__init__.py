"""splitfx: a compiler that takes PyTorch networks apart.

    plan  = splitfx.Plan([Group(factors=(8, 2, 2, 4, 4))], input_shape=(1, 3, 224, 224))
    split = splitfx.transform(model, plan)

This file is the table of contents of the public face; names load what they need when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from splitfx.analysis import Facts
    from splitfx.carving.reconstruction.synthetic import draw_inputs
    from splitfx.cli.doctor import diagnose
    from splitfx.compiler.plan import Plan
    from splitfx.compiler.protocol import Outcome, Pass, Promise
    from splitfx.compiler.transform import transform
    from splitfx.errors import (
        ExportError,
        MissingExtraError,
        PassError,
        PlanError,
        SplitfxError,
        TraceError,
        TrainingError,
        UnsupportedError,
        VerificationError,
    )
    from splitfx.export.bundles.branches import export_branches
    from splitfx.export.bundles.branches_runner import Branches
    from splitfx.export.bundles.submodels import export_bundle
    from splitfx.export.bundles.submodels_runner import Bundle
    from splitfx.export.executorch import ExecutorchFile, export_executorch
    from splitfx.export.onnx import export_onnx
    from splitfx.export.report import RuntimeReport
    from splitfx.export.runtime import check_onnx
    from splitfx.export.sessions import session_options
    from splitfx.frontend.trace import trace
    from splitfx.ir.notes import Note
    from splitfx.ir.ops.registered import register_op
    from splitfx.ir.ops.row import Window
    from splitfx.planning.choices import Choice, Plans
    from splitfx.planning.plan import plan
    from splitfx.report.compare_halo import HaloComparison, compare_halo
    from splitfx.report.diff import Difference, diff
    from splitfx.report.explain import Comparison, Explanation, compare, explain
    from splitfx.report.html import inspect_html
    from splitfx.report.measuring import Measurement, measure
    from splitfx.report.pareto import Curve, pareto
    from splitfx.report.profile import Profile, profile
    from splitfx.storage import load, save
    from splitfx.tiling.stream import stream
    from splitfx.tiling.stream.sources import RowSource
    from splitfx.train.data import Data, load_data
    from splitfx.train.finetune import evaluate, finetune
    from splitfx.train.history import History, Score
    from splitfx.train.multi_model import MultiModelLoss
    from splitfx.train.recipe import Recipe
    from splitfx.train.search.front import SearchFront, search_front
    from splitfx.train.search.greedy import search_factors
    from splitfx.train.search.preview import SearchPreview, preview_search
    from splitfx.train.search.space import SearchSpace
    from splitfx.train.search.study import SearchStudy
    from splitfx.train.search.trend import SearchResult
    from splitfx.train.search.tuner import FunctionTuner, RecipeTuner, Tuner

__version__ = "0.2.0"

_HOME = {
    "splitfx.compiler.transform": ["transform"],
    "splitfx.report.explain": ["explain", "compare", "Explanation", "Comparison"],
    "splitfx.carving.reconstruction.synthetic": ["draw_inputs"],
    "splitfx.cli.doctor": ["diagnose"],
    "splitfx.errors": [
        "SplitfxError",
        "TraceError",
        "PlanError",
        "UnsupportedError",
        "PassError",
        "VerificationError",
        "ExportError",
        "MissingExtraError",
        "TrainingError",
    ],
    "splitfx.export.executorch": ["ExecutorchFile", "export_executorch"],
    "splitfx.export.onnx": ["export_onnx"],
    "splitfx.export.report": ["RuntimeReport"],
    "splitfx.export.runtime": ["check_onnx"],
    "splitfx.export.sessions": ["session_options"],
    "splitfx.report.measuring": ["measure", "Measurement"],
    "splitfx.analysis": ["Facts"],
    "splitfx.compiler.plan": ["Plan"],
    "splitfx.compiler.protocol": ["Pass", "Promise", "Outcome"],
    "splitfx.ir.notes": ["Note"],
    "splitfx.ir.ops.registered": ["register_op"],
    "splitfx.ir.ops.row": ["Window"],
    "splitfx.planning.plan": ["plan"],
    "splitfx.planning.choices": ["Plans", "Choice"],
    "splitfx.report.diff": ["diff", "Difference"],
    "splitfx.report.profile": ["profile", "Profile"],
    "splitfx.report.html": ["inspect_html"],
    "splitfx.storage": ["save", "load"],
    "splitfx.export.bundles.branches": ["export_branches"],
    "splitfx.export.bundles.branches_runner": ["Branches"],
    "splitfx.export.bundles.submodels": ["export_bundle"],
    "splitfx.export.bundles.submodels_runner": ["Bundle"],
    "splitfx.report.compare_halo": ["compare_halo", "HaloComparison"],
    "splitfx.report.pareto": ["pareto", "Curve"],
    "splitfx.tiling.stream.sources": ["RowSource"],
    "splitfx.tiling.stream": ["stream"],
    "splitfx.frontend.trace": ["trace"],
    "splitfx.train.data": ["load_data", "Data"],
    "splitfx.train.finetune": ["finetune", "evaluate"],
    "splitfx.train.history": ["History", "Score"],
    "splitfx.train.multi_model": ["MultiModelLoss"],
    "splitfx.train.recipe": ["Recipe"],
    "splitfx.train.search.front": ["search_front", "SearchFront"],
    "splitfx.train.search.greedy": ["search_factors"],
    "splitfx.train.search.preview": ["preview_search", "SearchPreview"],
    "splitfx.train.search.space": ["SearchSpace"],
    "splitfx.train.search.study": ["SearchStudy"],
    "splitfx.train.search.trend": ["SearchResult"],
    "splitfx.train.search.tuner": ["FunctionTuner", "RecipeTuner", "Tuner"],
}
_WHERE = {name: home for home, names in _HOME.items() for name in names}

__all__ = [
    "Branches",
    "Bundle",
    "Choice",
    "Comparison",
    "Curve",
    "Data",
    "Difference",
    "ExecutorchFile",
    "Explanation",
    "ExportError",
    "Facts",
    "FunctionTuner",
    "HaloComparison",
    "History",
    "Measurement",
    "MissingExtraError",
    "MultiModelLoss",
    "Note",
    "Outcome",
    "Pass",
    "PassError",
    "Plan",
    "PlanError",
    "Plans",
    "Profile",
    "Promise",
    "Recipe",
    "RecipeTuner",
    "RowSource",
    "RuntimeReport",
    "Score",
    "SearchFront",
    "SearchPreview",
    "SearchResult",
    "SearchSpace",
    "SearchStudy",
    "SplitfxError",
    "TraceError",
    "TrainingError",
    "Tuner",
    "UnsupportedError",
    "VerificationError",
    "Window",
    "check_onnx",
    "compare",
    "compare_halo",
    "diagnose",
    "diff",
    "draw_inputs",
    "evaluate",
    "explain",
    "export_branches",
    "export_bundle",
    "export_executorch",
    "export_onnx",
    "finetune",
    "inspect_html",
    "load",
    "load_data",
    "measure",
    "pareto",
    "plan",
    "preview_search",
    "profile",
    "register_op",
    "save",
    "search_factors",
    "search_front",
    "session_options",
    "stream",
    "trace",
    "transform",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'splitfx' has no attribute {name!r}")
    found = getattr(importlib.import_module(_WHERE[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
