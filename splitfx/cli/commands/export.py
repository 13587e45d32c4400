"""``splitfx export``."""

from __future__ import annotations

import json
from argparse import Namespace
from typing import Any

from splitfx.cli.arguments import Parser, with_overwrite, with_split
from splitfx.cli.output import printed
from splitfx.cli.progress import Progress
from splitfx.errors import ExportError

TEXT = "write a saved split as ONNX, or as an ExecuTorch program"


def arguments(one: Parser) -> None:
    with_split(one)
    where = one.add_mutually_exclusive_group(required=True)
    where.add_argument("--onnx", metavar="FILE", help="the file to write; with sub-models, of the base model")
    where.add_argument("--pte", metavar="FILE", help="an ExecuTorch program for the traced sizes, its memory planned")
    where.add_argument("--bundle", metavar="FOLDER", help="base model and sub-models over one file of weights")
    where.add_argument("--branches", metavar="FOLDER", help="the stem and every branch of a carved SplitNet as files")
    one.add_argument("--opset", type=int, help="ONNX opset, 18 to 25 (default 20)")
    one.add_argument("--fixed-batch", action="store_true", help="keep the traced batch size")
    one.add_argument("--no-loops", action="store_true", help="tiled stages as steps for the traced sizes (OpenVINO)")
    one.add_argument("--no-verify", action="store_true", help="do not run the file beside the graph before it is kept")
    with_overwrite(one)


def run(given: Namespace, progress: Progress) -> int:
    from splitfx.cli.loading import free_file, saved
    from splitfx.export.data_files import data_files
    from splitfx.export.onnx import export_onnx
    from splitfx.ground.table import size

    if given.pte:
        return _export_pte(given, progress)
    if given.bundle or given.branches:
        return _export_folder(given, progress)
    target = free_file(given.onnx, given.overwrite)
    split = saved(given.split, progress)
    progress("exporting")
    export_onnx(
        split,
        target,
        opset=given.opset,
        dynamic_batch=False if given.fixed_batch else None,
        loops=not given.no_loops,
        overwrite=given.overwrite,
        verify=not given.no_verify,
    )
    parts = [target, *data_files(target)]
    total = sum(one.stat().st_size for one in parts)
    made = {"onnx": str(target), "files": [str(one) for one in parts], "bytes": total}
    return printed(given, json.dumps(made, indent=2), f"wrote {' and '.join(map(str, parts))} ({size(total)})")


def _export_pte(given: Namespace, progress: Progress) -> int:
    from splitfx.cli.loading import free_file, saved
    from splitfx.export.executorch import export_executorch

    if given.opset or given.fixed_batch or given.no_loops:
        raise ExportError("--opset, --fixed-batch and --no-loops are for --onnx; a program is for the traced sizes.")
    target = free_file(given.pte, given.overwrite)
    split = saved(given.split, progress)
    progress("exporting")
    made = export_executorch(split, target, overwrite=given.overwrite, verify=not given.no_verify)
    plain = {"pte": str(target), "bytes": target.stat().st_size, "planned_bytes": made.planned_bytes}
    return printed(given, json.dumps(plain, indent=2), f"wrote {made}")


def _export_folder(given: Namespace, progress: Progress) -> int:
    """Sub-models as a bundle, or the branches of a carved network."""
    from splitfx.cli.loading import saved
    from splitfx.ground.table import size

    write: Any
    read: Any
    if given.bundle:
        from splitfx.export.bundles.submodels import export_bundle as write
        from splitfx.export.bundles.submodels_runner import Bundle as read
    else:
        from splitfx.export.bundles.branches import export_branches as write
        from splitfx.export.bundles.branches_runner import Branches as read
    kind, target = ("bundle", given.bundle) if given.bundle else ("branches", given.branches)
    if given.no_loops:
        raise ExportError(f"--no-loops is for --onnx; a {kind} has no such choice.")
    split = saved(given.split, progress)
    free = False if given.fixed_batch else None
    folder = write(split, target, opset=given.opset, dynamic_batch=free, overwrite=given.overwrite)
    files = sorted(folder.iterdir())
    total = sum(one.stat().st_size for one in files)
    made = {kind: str(folder), "files": [str(one) for one in files], "bytes": total}
    return printed(given, json.dumps(made, indent=2), f"{read(folder)}\n\nwrote {folder} ({size(total)})")
