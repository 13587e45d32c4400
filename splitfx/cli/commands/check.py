"""``splitfx check``."""

from __future__ import annotations

from argparse import Namespace

from splitfx.cli.arguments import FAILED, OK, Parser, count
from splitfx.cli.output import printed
from splitfx.cli.progress import Progress

TEXT = "run an ONNX file under onnxruntime and compare it with the split"


def arguments(one: Parser) -> None:
    one.add_argument("split", metavar="FOLDER", help="the folder of the saved split that the file was made from")
    one.add_argument("onnx", metavar="ONNX", help="the ONNX file")
    one.add_argument("--provider", action="append", metavar="NAME", help="cpu, cuda, ...; once per provider")
    one.add_argument("--require", action="append", default=[], metavar="NAME", help="fail where it does not start")
    one.add_argument("--runs", type=count, default=20, help="timed runs per provider (default 20)")
    one.add_argument("--seconds", type=float, default=600, help="the most for one provider (default 600)")


def run(given: Namespace, progress: Progress) -> int:
    from splitfx.cli.loading import saved
    from splitfx.export.runtime import check_onnx

    split = saved(given.split, progress)
    found = check_onnx(
        split,
        given.onnx,
        providers=given.provider,
        require=given.require,
        runs=given.runs,
        seconds=given.seconds,
    )
    printed(given, found.to_json(), str(found))
    return OK if found.ok else FAILED
