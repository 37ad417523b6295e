"""A sink spelled as a factor on the output, as Granite does: rewritten to one more column of the scores.

softmax(s)·v · sigmoid(logsumexp(s) − sink)   →   softmax(cat([s, sink]))[..., :-1]·v
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from retrofit.passes.attention.arguments import arguments, is_call, shape
from retrofit.passes.attention.axes import SAME, sizes
from retrofit.passes.attention.layout import Editor
from retrofit.passes.attention.operands import CASTS
from retrofit.passes.attention.products import read_product
from retrofit.passes.attention.rule import Refusal, Reject, Rule, calls
from retrofit.passes.attention.scores import SOFTMAX, depends_on

aten = torch.ops.aten


@dataclass(frozen=True)
class MassMatch:
    """The parts of a factor that a sink stands for.

    Attributes:
        scores: What the softmax and the log-sum-exp are over, [..., N].
        softmax: The softmax.
        sink: What is taken from the log-sum-exp, [...].
        output: The product with values.
        scaled: The product times the factor.
    """

    scores: Node
    softmax: Node
    sink: Node
    output: Node
    scaled: Node


class SinkAsFactor(Rule[MassMatch]):
    """Moves a sink from a factor on the output into the scores."""

    name = "sink as a factor"

    def anchors(self, graph: Graph) -> Iterable[Node]:
        """The log-sum-exps."""
        return calls(graph, aten.logsumexp.default)

    def pattern(self, anchor: Node) -> MassMatch:
        """Follows the log-sum-exp to the product that its sigmoid multiplies."""
        given, scores = arguments(anchor), anchor.args[0]
        rank = len(shape(scores) or ())
        softmax = next((user for user in scores.users if is_call(user, *SOFTMAX)), None)  # type: ignore[union-attr]
        if (
            not isinstance(scores, Node)
            or softmax is None
            or [dim % rank for dim in given["dim"]] != [rank - 1]
        ):
            raise Reject(anchor, "a log-sum-exp beside no softmax of the same scores", attention=False)
        less = _only_user(anchor)
        if not is_call(less, aten.sub.Tensor) or not isinstance(less.args[1], Node) or less.kwargs:
            raise Reject(anchor, "a log-sum-exp of the scores from which no sink is taken", attention=False)
        sigmoid = _only_user(less)
        if not is_call(sigmoid, aten.sigmoid.default):
            raise Reject(anchor, "a log-sum-exp of the scores that goes into no sigmoid", attention=False)
        factor, scaled = sigmoid, _only_user(sigmoid)
        while is_call(scaled, aten.unsqueeze.default):
            factor, scaled = scaled, _only_user(scaled)
        others = [item for item in scaled.args if isinstance(item, Node) and not depends_on(item, sigmoid)]
        if not is_call(scaled, aten.mul.Tensor) or len(others) != 1 or read_product(others[0]) is None:
            raise Reject(
                anchor, "a sigmoid of a log-sum-exp that does not scale an attention", attention=False
            )
        (output,) = others
        rows = sizes(scores)[:-1]
        if not depends_on(output, softmax) or (*rows, 1) != sizes(factor) or sizes(output)[:-1] != rows:
            raise Reject(
                anchor, "a sigmoid of a log-sum-exp in another layout than the attention", attention=False
            )
        return MassMatch(scores, softmax, less.args[1], output, scaled)

    def check(self, match: MassMatch) -> Refusal | None:
        """Nothing more is needed."""
        return None

    def rewrite(self, graph: Graph, match: MassMatch) -> None:
        """Puts the sink beside the scores."""
        editor, rank = Editor(graph, match.softmax), len(shape(match.scores) or ())
        column = match.sink
        if len(shape(column) or ()) < rank:
            column = editor.call(aten.unsqueeze.default, column, -1)
        full = [editor.size(size, match.scores) for size in sizes(match.scores)[:-1]]
        column = editor.call(aten.expand.default, column, [*full, 1])
        wide = editor.call(aten.cat.default, [match.scores, column], rank - 1)
        softmax = editor.call(match.softmax.target, wide, *match.softmax.args[1:])
        softmax.meta = {**match.softmax.meta, "val": softmax.meta["val"]}
        shares = editor.call(aten.slice.Tensor, softmax, rank - 1, 0, -1)
        match.softmax.replace_all_uses_with(shares)
        graph.erase_node(match.softmax)
        match.scaled.replace_all_uses_with(match.output)


def _only_user(node: Node) -> Any:
    """The one user of ``node`` behind casts and copies; the node itself where there is none or more than one."""
    while len(node.users) == 1:
        (node,) = node.users
        if not is_call(node, *CASTS, *SAME):
            break
    return node
