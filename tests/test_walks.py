"""Walks over a graph: each node once, the nearest first, and no further than was said."""

from __future__ import annotations

import operator

from torch import fx

from splitfx.ir.walks import ancestors, descendants, reached


def diamond() -> dict[str, fx.Node]:
    """x -> a -> (b, c) -> d -> output; e reads nothing but x, and nobody reads it."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    a = graph.call_function(operator.neg, (x,))
    b, c = graph.call_function(operator.abs, (a,)), graph.call_function(operator.pos, (a,))
    d, e = graph.call_function(operator.add, (b, c)), graph.call_function(operator.inv, (x,))
    return {"x": x, "a": a, "b": b, "c": c, "d": d, "e": e, "output": graph.output(d)}


def named(of: dict[str, fx.Node], nodes: list[fx.Node]) -> str:
    names = {node: name for name, node in of.items()}
    return " ".join(names[n] for n in nodes)


def test_each_node_is_met_once_and_the_nearest_first() -> None:
    of = diamond()
    assert named(of, ancestors([of["d"]])) == "d b c a x"
    assert named(of, descendants([of["a"]])) == "a b c d output"
    assert named(of, descendants([of["d"], of["a"], of["d"]])) == "d a output b c"
    assert ancestors([]) == []


def test_a_walk_ends_where_it_does_not_go_through_and_gives_that_node() -> None:
    of = diamond()
    assert named(of, ancestors([of["output"]], lambda n: n is not of["a"])) == "output d b c a"
    assert named(of, ancestors([of["a"]], lambda n: n is not of["a"])) == "a"
    assert named(of, descendants([of["x"]], lambda n: n not in (of["b"], of["c"]))) == "x a e b c"


def test_any_other_way_from_node_to_node() -> None:
    of = diamond()
    assert named(of, reached([of["b"]], lambda n: [*n.all_input_nodes, *n.users])) == "b a d x c output e"
