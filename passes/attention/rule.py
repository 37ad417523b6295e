"""What a rule is, and the runner that applies rules, counts them and keeps every refusal.

pattern(graph) → matches;  check(match) → reason or None;  rewrite(graph, match)
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Generic, TypeVar

from torch.fx import Graph, Node

M = TypeVar("M")
STAGES = ("the product with values", "the scores", "the layout", "the sizes")
"""What a rule asks for, in order: how far it came says how near it is."""


_NOT_THE_MODEL = ("/torch/", "/retrofit/capture/")


@dataclass(frozen=True)
class Refusal:
    """Why a rule left a node as it is.

    Attributes:
        source: File and line that made the node; None if that is not known.
        attention: Whether the node is attention at all, as far as was seen.
        stage: Which of the rule's conditions failed first.
    """

    rule: str
    node: str
    reason: str
    source: str | None = None
    attention: bool = True
    stage: str = STAGES[-1]

    def __str__(self) -> str:
        where = f", {self.source}" if self.source else ""
        return f"{self.reason} (at node {self.node}{where})"


def refusal_at(
    rule: str, node: Node, reason: str, *, attention: bool = True, stage: str = STAGES[-1]
) -> Refusal:
    """The refusal of ``node``, with the line of source that made it."""
    return Refusal(rule, node.name, reason, source_line(node), attention, stage)


def source_line(node: Node) -> str | None:
    """``attention.py:123``: the innermost line of the model's own code that made ``node``."""
    trace = node.meta.get("stack_trace")
    found = re.findall(r'File "([^"]+)", line (\d+)', trace) if isinstance(trace, str) else []
    own = [(path, line) for path, line in found if not any(part in path for part in _NOT_THE_MODEL)]
    if not own:
        return None
    path, line = own[-1]
    return f"{PurePath(path).name}:{line}"


class Reject(Exception):
    """Raised by a pattern for a node that looks like its subject but is not; carries the reason.

    Args:
        node: The node.
        reason: Why it is not.
        attention: False if it has nothing to do with attention, as the softmax of a router.
    """

    def __init__(self, node: Node, reason: str, *, attention: bool = True) -> None:
        super().__init__(reason)
        self.node = node
        self.reason = reason
        self.attention = attention
        self.stage = STAGES[2]


class Rule(Generic[M]):
    """One rewrite. Stateless; a match is a frozen dataclass."""

    name: str

    def anchors(self, graph: Graph) -> Iterable[Node]:
        """The nodes at which the pattern may hold."""
        raise NotImplementedError

    def pattern(self, anchor: Node) -> M:
        """Returns the match at ``anchor``.

        Raises:
            Reject: If it does not hold, with the reason.
        """
        raise NotImplementedError

    def check(self, match: M) -> Refusal | None:
        """Returns why a match must not be rewritten, or None."""
        raise NotImplementedError

    def rewrite(self, graph: Graph, match: M) -> None:
        """Rewrites a checked match in place."""
        raise NotImplementedError


@dataclass
class PassReport:
    """What a run of rules did: how often each applied, and what was refused."""

    counts: dict[str, int] = field(default_factory=dict)
    refusals: list[Refusal] = field(default_factory=list)

    @property
    def total(self) -> int:
        """Number of rewrites."""
        return sum(self.counts.values())


def run_rules(graph: Graph, rules: Sequence[Rule[M]]) -> PassReport:
    """Applies each rule once to every anchor, in graph order, and removes what became dead."""
    report = PassReport()
    for rule in rules:
        report.counts[rule.name] = 0
        for anchor in list(rule.anchors(graph)):
            try:
                match = rule.pattern(anchor)
            except Reject as reject:
                report.refusals.append(
                    refusal_at(
                        rule.name,
                        reject.node,
                        reject.reason,
                        attention=reject.attention,
                        stage=reject.stage,
                    )
                )
                continue
            refusal = rule.check(match)
            if refusal is not None:
                report.refusals.append(refusal)
                continue
            rule.rewrite(graph, match)
            report.counts[rule.name] += 1
    remove_dead(graph)
    graph.lint()
    return report


def remove_dead(graph: Graph) -> int:
    """Erases the nodes nothing uses, calls of child modules included; returns how many."""
    before = len(graph.nodes)
    for node in reversed(graph.nodes):
        if not node.users and node.op not in ("placeholder", "output"):
            graph.erase_node(node)
    return before - len(graph.nodes)


def calls(graph: Graph, *targets: object) -> Iterator[Node]:
    """Yields the nodes of ``graph`` that call one of ``targets``."""
    return (node for node in graph.nodes if node.op == "call_function" and node.target in targets)
