"""Products of matrices: linear layers, matmul, einsum, attention; softmax, which stands between them; embeddings."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx, nn

from splitfx.ir.ops.pieces import Call, Job, Piece, Pieces, joins_by_hand
from splitfx.ir.ops.reading import op_name
from splitfx.ir.ops.row import Bound, CannotCount, Channel, Dims, Laid, Placed, Raised, Sizes, Spatial, rows


def _linear(a: Bound, of: Sizes, out: int) -> int:
    return out * of(a["weight"])[-1]


def _attention(a: Bound, of: Sizes, out: int) -> int:
    query, keys, value = of(a["query"]), of(a["key"]), of(a["value"])
    return math.prod(query[:-1]) * keys[-2] * (query[-1] + value[-1])


def _einsum(a: Bound, of: Sizes, out: int) -> int:
    """Every index of a product of two operands runs once through the multiply-accumulates."""
    equation, sizes = str(a["equation"]), [of(one) for one in a["tensors"]]
    operands = equation.replace(" ", "").partition("->")[0].split(",")
    if len(sizes) != 2 or "." in equation:
        raise CannotCount(f"einsum {equation!r} is no product of two operands with named indices")
    extent: dict[str, int] = {}
    for letters, size in zip(operands, sizes, strict=True):
        extent |= {i: n for i, n in zip(letters, size, strict=True) if n > 1 or i not in extent}
    return math.prod(extent.values())


def _along_last(at: Placed) -> Dims | None:
    return at.outside([at.rank - 1])


def _along_dim(at: Placed) -> Dims | None:
    return at.outside([int(at.bound.get("dim", -1))])


def _along_rows(at: Placed) -> str:
    """Why a softmax cannot take its map in row by row."""
    rows_too = int(at.bound.get("dim", -1)) % at.rank == at.dims[0] and at.bound.get("dtype") is None
    return "" if rows_too else f"{op_name(at.node)} runs along another dim"


def softened(job: Job, statistics: int) -> Call:
    """The second half of a softmax along rows: the largest values and the sums, which stand among the whole values."""
    logs = op_name(job.node) == "log_softmax"

    def call(run: Piece, pieces: Pieces, wholes: Pieces) -> torch.Tensor:
        most, sums = wholes[statistics].unbind(0)
        x = pieces[0]
        y = x - most.to(x.dtype)
        if joins_by_hand():
            return y - sums.log().to(x.dtype) if logs else y.exp() / sums.to(x.dtype)
        return y.sub_(sums.log().to(x.dtype)) if logs else y.exp_().div_(sums.to(x.dtype))

    return call


# ---------------------------------------------------------------- where the rows of a product lie


def _ends(at: Placed, node: Any) -> tuple[Dims, tuple[int, int]] | None:
    """Dims of an operand from its last, and its rows and columns; None for one without rows."""
    dims = at.where.get(node) if isinstance(node, fx.Node) else None
    if dims is None:
        return None
    rank = len(at.values[node].shape)
    return tuple(d - rank for d in dims), at.extents[node]


def _same_rows(a: tuple[Dims, tuple[int, int]], b: tuple[Dims, tuple[int, int]]) -> bool:
    return a[0][0] == b[0][0] and a[1][0] == b[1][0] and (a[0] == b[0] and a[1] == b[1])


def _second(bound: Bound) -> Any:
    return bound["other"] if "other" in bound else bound.get("mat2")


def _product(at: Placed) -> Dims | None:
    """Rows of the first operand, with the second whole; places of the second, with the first whole; or of both, where
    each has matrices of its own."""
    a, b, rank = _ends(at, at.bound["input"]), _ends(at, _second(at.bound)), len(at.sizes)
    if at.bound["input"] is _second(at.bound) and not (a is not None and a[0][0] < -2):
        return None  # it would be read in rows and whole
    if a is not None and b is not None and a[0][0] < -2 and b[0][0] < -2:
        return _batch(a, rank) if _same_rows(a, b) else None
    of_first = a is not None and a[0][0] == -2 and (b is None or b[0][0] >= -2)
    of_second = b is not None and b[0] == (-1, -1) and (a is None or a[0][0] >= -2)
    if of_first and a is not None and not (of_second and _flat(at)):
        return _queries(a, rank)
    if of_second and b is not None:
        return Laid((rank - 1, rank - 1), b[1])
    return None


def _batch(a: tuple[Dims, tuple[int, int]], rank: int) -> Dims:
    dims = tuple(d + rank for d in a[0])
    lost = a[0][1] >= -2
    return Laid((dims[0], dims[0]), (a[1][0], 1), across=True) if lost and a[0][0] != a[0][1] else Laid(dims, a[1])


def _queries(a: tuple[Dims, tuple[int, int]], rank: int) -> Dims:
    joined = a[0][0] == a[0][1]
    return Laid((rank - 2, rank - 2), a[1] if joined else (a[1][0], 1), across=not joined)


def _flat(at: Placed) -> bool:
    """The product has more places along its last dim, as where a matrix of channels is applied to a map."""
    return at.sizes[-1] > at.sizes[-2]


def _whole_factor(at: Placed) -> list[fx.Node]:
    """The operand of which every piece of a product reads all."""
    first, second = at.bound["input"], _second(at.bound)
    a, b = _ends(at, first), _ends(at, second)
    if a is None or b is None or a[0][0] < -2:
        return []
    return [second] if a[0][0] == -2 and not (b[0] == (-1, -1) and _flat(at)) else [first]


def _over_places(at: Placed) -> str:
    """Why a product of two maps is no sum over their places."""
    a, b = _ends(at, at.bound["input"]), _ends(at, _second(at.bound))
    fits = a is not None and b is not None and a[0] == (-1, -1) and b[0] == (-2, -2) and a[1] == b[1]
    return "" if fits else f"{op_name(at.node)} mixes the rows of a map"


def _attends(at: Placed) -> Dims | None:
    """Rows of queries, with all keys and values; or of all three, where each window attends to itself."""
    q, k, v = (_ends(at, at.bound[name]) for name in ("query", "key", "value"))
    mask, rank = at.bound.get("attn_mask"), len(at.sizes)
    if q is None or at.bound.get("is_causal") or (at.bound.get("dropout_p") or 0.0) > 0.0:
        return None
    if isinstance(mask, fx.Node) and (at.where.get(mask) is not None or _has_rows(at.values[mask].shape, q[0][0])):
        return None
    if q[0][0] < -2:
        alike = k is not None and v is not None and _same_rows(q, k) and _same_rows(q, v)
        return _batch(q, rank) if alike else None
    if at.bound["query"] in (at.bound["key"], at.bound["value"]):
        return None  # it would be read in rows and whole
    return _queries(q, rank) if q[0][0] == -2 and all(o is None or o[0][0] >= -2 for o in (k, v)) else None


def _has_rows(sizes: Any, back: int) -> bool:
    return -back <= len(sizes) and sizes[back] != 1


def _keys(at: Placed) -> list[fx.Node]:
    """Keys and values, of which every row of queries reads all."""
    q = _ends(at, at.bound["query"])
    if q is None or q[0][0] < -2:
        return []
    return [at.bound[name] for name in ("key", "value") if at.where.get(at.bound[name]) is not None]


# ---------------------------------------------------------------- einsum


def _terms(equation: str) -> tuple[list[str], str] | None:
    left, arrow, right = equation.replace(" ", "").partition("->")
    return (left.split(","), right) if arrow and "." not in equation else None


def _indexed(at: Placed) -> Dims | None:
    """An einsum that keeps the rows of its maps, which lie alike, with operands that have none."""
    terms = _terms(str(at.bound["equation"]))
    operands = list(at.bound["tensors"])
    if terms is None or len(terms[0]) != len(operands):
        return None
    maps = [(term, node) for term, node in zip(terms[0], operands, strict=True) if at.where.get(node) is not None]
    others = "".join(term for term, node in zip(terms[0], operands, strict=True) if at.where.get(node) is None)
    lain = {(tuple(term[d] for d in at.where[node] or ()), at.extents[node]) for term, node in maps}
    if len(lain) != 1:
        return None
    letters, extent = lain.pop()
    once = all(term.count(letter) == 1 for term, _ in maps for letter in letters)
    if not once or any(letter not in terms[1] or letter in others for letter in letters):
        return None
    return Laid((terms[1].index(letters[0]), terms[1].index(letters[1])), extent)


def _embedding(a: Bound, w: torch.Tensor) -> tuple[type[nn.Module], dict[str, Any]] | None:
    if a["scale_grad_by_freq"] or a["sparse"]:
        return None
    sizes = {"num_embeddings": w.shape[0], "embedding_dim": w.shape[1]}
    return nn.Embedding, {**sizes, "padding_idx": a["padding_idx"] if a["padding_idx"] >= 0 else None}


rows(
    "linear",
    spatial=Spatial.POINTWISE,
    channel=Channel.MIXES,
    channel_dim=-1,
    keeps_output=False,
    modules={"linear": [nn.Linear]},
    macs=_linear,
    follows=_along_last,
    raised=Raised(
        lambda a, w: (nn.Linear, {"in_features": w.shape[1], "out_features": w.shape[0]}), optional_bias=True
    ),
)
rows(
    "scaled_dot_product_attention",
    channel=Channel.CONTRACT,
    spatial=Spatial.MOVE,
    macs=_attention,
    follows=_attends,
    taken=_keys,
)
rows("einsum", spatial=Spatial.MOVE, macs=_einsum, follows=_indexed)
rows(
    "matmul bmm mm",
    macs=lambda a, of, out: out * of(a["input"])[-1],
    spatial=Spatial.MOVE,
    follows=_product,
    taken=_whole_factor,
    reduces="product",
    consumes=_over_places,
)
rows("addmm", macs=lambda a, of, out: out * of(a["mat1"])[-1], biased=lambda a: True)
rows("baddbmm", macs=lambda a, of, out: out * of(a["batch1"])[-1], biased=lambda a: True)
rows(
    "softmax log_softmax",
    per_output=3,
    follows=_along_dim,
    keeps_channels=True,
    reduces="exponentials",
    consumes=_along_rows,
    over=lambda bound, rank: {int(bound["dim"]) % rank},
)
rows("glu", per_output=None, follows=_along_dim)
rows("embedding", modules={"embedding": [nn.Embedding]}, raised=Raised(_embedding, ("weight",), data="indices"))
