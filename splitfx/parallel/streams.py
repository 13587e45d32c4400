"""`Streams`: the branches of a carved model on streams of one GPU, so that narrow layers fill it together.

Parts run on the current stream as long as all groups need them, every other part on the stream of its first group;
a stream waits for what a part reads, and the current one for the logits. Refuses (`UnsupportedError`) a model that is
not on a GPU: a CPU has no streams, use `Ranks` there. Inference only.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import fx

from splitfx.analysis.oracle import acts_as_in_eval
from splitfx.errors import UnsupportedError
from splitfx.splitnet.tree import Tree, run


class Streams:
    """``split``: the result of a plan with ``SplitNet(lowering="branches")``, in eval mode on a GPU; called like it.
    ``verify``: as for `Tree`."""

    def __init__(self, split: fx.GraphModule, verify: bool = True) -> None:
        places = {p.device for p in split.parameters()}
        if any(one.type != "cuda" for one in places) or len(places) != 1:
            listed = ", ".join(sorted(map(str, places))) or "nowhere"
            raise UnsupportedError(
                f"streams run on one GPU; this model is on {listed}: move it with split.to('cuda'), or use Ranks"
            )
        if not acts_as_in_eval(split):
            raise UnsupportedError("streams are for inference: call split.eval() first")
        self.device = next(iter(places))
        self.tree = Tree(split, verify=verify)
        self.lanes = [torch.cuda.Stream(self.device) for _ in range(self.tree.groups)]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        home = torch.cuda.current_stream(self.device)
        values = self.tree.given(args, kwargs)
        made_on = dict.fromkeys(values, home)
        with torch.inference_mode():
            for part in self.tree.parts:
                everyone = len(part.groups) in (0, self.tree.groups)
                lane = home if everyone else self.lanes[part.groups[0]]
                for source in {made_on[name] for name in part.inputs} - {lane}:
                    lane.wait_stream(source)
                for name in part.inputs:
                    if made_on[name] is not lane and isinstance(values[name], torch.Tensor):
                        values[name].record_stream(
                            lane
                        )  # the allocator may not give it away before this stream is done
                with contextlib.nullcontext() if lane is home else torch.cuda.stream(lane):
                    values |= run(part, values)
                made_on |= dict.fromkeys(part.outputs, lane)
        return self.tree.returned(values)
