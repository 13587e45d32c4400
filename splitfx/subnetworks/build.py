"""The step-down of a sub-model: a small graph from the image to the tensor at a cut.

A convolution in closed form, or for the traced size where there is none, with the epilogue of the cut: the norm and
activation that lie between the last convolution (or sum) and the cut, the norm fresh. For tokens it is the model's own
embedding with a patch convolution of its own; class token and position embedding stay those of the model.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import fx, nn

from splitfx.analysis import Facts
from splitfx.analysis.shapes import shape
from splitfx.ir.editing import like
from splitfx.ir.graph import attribute, layer, module_of, set_path, weighted
from splitfx.ir.ops import Result, layer_words, op, op_name
from splitfx.ir.walks import ancestors
from splitfx.subnetworks.entry import Entry, Form
from splitfx.subnetworks.sites import Site, Sites
from splitfx.subnetworks.stepdown import Axis, static

_CONVS = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}


def make_entry(facts: Facts, sites: Sites, site: Site, number: int, seed: int) -> Entry:
    """The entry of a sub-model at a site; its weights are drawn from ``seed`` alone."""
    generator = torch.Generator().manual_seed(seed * 1009 + number)
    images = [n for n in facts.graph.graph.nodes if n.op == "placeholder"]
    if site.embedding is not None:
        graph, form = _embedding(facts, sites.image, site.embedding), "embedding"
    else:
        graph, form = _convolution(facts, sites, site, generator)
    entry = Entry(graph, number, images.index(sites.image), form)
    for module in entry.modules():
        module.training = facts.graph.training
    return entry


def axes_of(facts: Facts, sites: Sites, cut: fx.Node) -> tuple[tuple[Axis, ...], Form]:
    """The convolution from the image to a cut, per axis, and which form it has."""
    known = sites.spread[cut]
    image, sizes = shape(facts.shapes[sites.image])[2:], shape(facts.shapes[cut])
    if known.maps is not None:
        return tuple(m.axis() for m in known.maps), "closed"
    return tuple(static(n, sizes[d]) for n, d in zip(image, known.dims, strict=True)), "static"


def _convolution(facts: Facts, sites: Sites, site: Site, generator: torch.Generator) -> tuple[fx.GraphModule, Form]:
    ways, form = axes_of(facts, sites, site.cut)
    image, value = facts.shapes[sites.image], facts.shapes[site.cut]
    dims, rank = sites.spread[site.cut].dims, value.dim()
    channel_dim = next(d for d in range(1, rank) if d not in dims)
    base, chain = epilogue(site.cut)
    if channel_dim != 1:
        chain = []  # what lies between works on another layout
    held = getattr(module_of(base), "bias", None) is not None or not any(op(n).normalizes for n in chain)
    conv = _CONVS[rank](
        int(image.shape[1]),
        int(value.shape[channel_dim]),
        tuple(a.kernel for a in ways),
        tuple(a.stride for a in ways),
        tuple(a.padding for a in ways),
        bias=held,
        device="meta",
    )
    _fill(conv, value, generator)
    root, graph = nn.Module(), fx.Graph()
    last = graph.placeholder("image")
    last = _call(root, graph, "conv", conv, last, site.cut)
    for origin in chain:
        last = _repeated(root, graph, origin, last, value)
    if channel_dim != 1 or dims != tuple(range(2, rank)):
        order = [0] * rank
        order[channel_dim] = 1
        for i, d in enumerate(dims):
            order[d] = i + 2
        last = like(graph.call_function(torch.ops.aten.permute.default, (last, order)), site.cut)
    graph.output(last)
    return fx.GraphModule(root, graph, "StepDown"), form


def epilogue(cut: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
    """The conv, sum or other operation that a cut's tensor comes from, and the norms and activations behind it in
    order; pools, dropouts and identities on the way are walked over."""
    chain: list[fx.Node] = []
    node = cut
    while node.all_input_nodes and (len(node.all_input_nodes) == 1 or op(node).normalizes):
        row = op(node)
        if row.activates or (row.normalizes and module_of(node) is not None and len(node.all_input_nodes) == 1):
            chain.append(node)
        elif not row.pools and row.result is not Result.OPERAND:
            break
        node = node.all_input_nodes[0]
    return node, chain[::-1]


def _repeated(root: nn.Module, graph: fx.Graph, origin: fx.Node, operand: fx.Node, value: torch.Tensor) -> fx.Node:
    """A norm or activation of the cut once more: the same function, a fresh module."""
    module = module_of(origin)
    if module is None:
        return like(graph.call_function(origin.target, (operand, *origin.args[1:]), dict(origin.kwargs)), origin)  # type: ignore[arg-type]
    fresh = copy.deepcopy(module)
    if hasattr(fresh, "reset_parameters"):
        fresh.reset_parameters()  # type: ignore[operator]
    if isinstance(fresh, nn.PReLU):
        nn.init.constant_(fresh.weight, 0.25)
    fresh.requires_grad_(True)  # it starts anew, so it must learn, whatever is frozen in the model
    word = "norm" if op(origin).normalizes else "act"
    return _call(root, graph, word, fresh, operand, origin)


def _call(root: nn.Module, graph: fx.Graph, word: str, module: nn.Module, operand: fx.Node, origin: fx.Node) -> fx.Node:
    path = word if not hasattr(root, word) else f"{word}{sum(n.startswith(word) for n in root._modules)}"
    set_path(root, path, module)
    return like(graph.call_module(path, (operand,)), origin)


def _fill(conv: nn.Module, value: torch.Tensor, generator: torch.Generator) -> None:
    """Weights for a rectifier behind (He et al.), drawn in float64 whatever the model's type; zero bias."""
    weight = weighted(conv).weight
    drawn = torch.randn(weight.shape, generator=generator, dtype=torch.float64) * math.sqrt(2 / weight[0].numel())
    place = {"device": value.device, "dtype": value.dtype}
    conv.weight = nn.Parameter(drawn.to(**place))
    if conv.bias is not None:
        conv.bias = nn.Parameter(torch.zeros(weight.shape[0], **place))


# ---------------------------------------------------------------- tokens


def _embedding(facts: Facts, image: fx.Node, end: fx.Node) -> fx.GraphModule:
    """The nodes from the image to the tokens. Convolutions, norms and linear layers are copies, which start with the
    model's weights; parameters that the graph reads (class token, position) are the model's own."""
    whole = facts.graph
    needed = set(ancestors([end]))
    root, graph, env = nn.Module(), fx.Graph(), dict[fx.Node, fx.Node]()
    for node in whole.graph.nodes:
        if node is image:
            env[node] = graph.placeholder("image")
        elif node not in needed:
            continue
        elif isinstance(module_of(node), Entry):
            env[node] = env[node.all_input_nodes[0]]
        elif node.op == "get_attr":
            set_path(root, str(node.target), attribute(whole, str(node.target)), not node.meta.get("transient"))
            env[node] = graph.node_copy(node, lambda n: env[n])
        else:
            env[node] = graph.node_copy(node, lambda n: env[n])
            module = module_of(node)
            if module is not None:
                set_path(root, str(node.target), copy.deepcopy(module))
    graph.output(env[end])
    return fx.GraphModule(root, graph, "StepDown")


def words(entry: Entry, cut: fx.Node) -> str:
    """What a step-down is, for notes: ``Conv2d(3, 64, 2, stride=2), BatchNorm2d(64), relu``."""
    nodes = [n for n in entry.step_down.graph.nodes if n.op in ("call_module", "call_function") and op_name(n)]
    parts = [layer_words(module_of(n)) if n.op == "call_module" else op_name(n) for n in nodes]
    shown = parts if len(parts) <= 4 else [*parts[:3], "..."]
    return f"{', '.join(shown)} in place of everything up to {layer(cut)}"
