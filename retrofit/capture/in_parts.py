"""Sees attention whose softmax is no kernel of its own, or is none, as its kernels run.

exp → sum → division of the one by the other   |   log_softmax → exp   |   − logsumexp → exp   →   "softmax"
bmm → sigmoid → bmm                                                                            →   "sigmoid"

The last product has to bring values in. One of weights with themselves, as in the powers of a graph's soft adjacency,
has none, and gives weights again.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

# What leaves a role as it is; in place too.
_VIEWS = {
    "view",
    "_unsafe_view",
    "reshape",
    "unsqueeze",
    "squeeze",
    "expand",
    "permute",
    "transpose",
    "t",
    "alias",
}
_LAYOUT = _VIEWS | {"clone", "_to_copy", "detach", "copy"}
_MASKED = _LAYOUT | {"masked_fill", "where", "mul"}
_STEPS = _MASKED | {"div", "add", "sub", "rsub", "neg"}
_PASSED = {
    "product": _STEPS,
    "sigmoid": _MASKED | {"div"},
    "exp": _MASKED,
    "weighted": _LAYOUT,
    "sum": _LAYOUT | {"add", "clamp", "clamp_min"},
    "inverse": _LAYOUT | {"mul"},
    "logsumexp": _LAYOUT,
    "shifted": _LAYOUT,
    "logarithms": _LAYOUT,
}
_SCORES = ("product", "sigmoid")  # a product of sigmoids has the role of a sigmoid
_AMONG_WEIGHTS = {"bmm", "baddbmm", "add", "sub", "mul"}  # these make weights of weights


class SoftmaxInParts:
    """Watches kernels one after the other, and remembers of what kind their results are."""

    def __init__(self) -> None:
        self._roles = WeakTensorKeyDictionary()
        self._sigmoids = WeakTensorKeyDictionary()  # which call of a sigmoid each in that role was made by

    def opens(self, func: Any, args: Any) -> bool:
        """Whether ``func`` makes what may become weights: exponentials, or sigmoids of a product."""
        name = _name(func)
        return name == "exp" or (name == "sigmoid" and self._role(args[0]) in _SCORES)

    def saw(self, func: Any, args: Any, result: Any) -> str | None:
        """Takes note of a kernel that ran; returns ``softmax`` or ``sigmoid`` if it completed such an attention.

        Args:
            func: The kernel.
            args: What it took.
            result: What it gave.
        """
        if not isinstance(result, Tensor):
            return None
        name = _name(func)
        roles = [self._role(value) for value in args]
        sigmoids = [self._sigmoids.get(value) for value in args if isinstance(value, Tensor)]
        same = len(sigmoids) > 1 and None not in sigmoids and len(set(sigmoids)) == 1
        among = same and name in _AMONG_WEIGHTS
        done = None if among else self._done(name, args, roles)
        role = "sigmoid" if among else None if done else _role_of(name, args, roles, result)
        self._roles.pop(result, None)  # it may have been changed in place
        self._sigmoids.pop(result, None)
        if role is not None:
            self._roles[result] = role
        if role == "sigmoid":
            made_by = (sigmoid for sigmoid in sigmoids if sigmoid is not None)
            self._sigmoids[result] = object() if name == "sigmoid" else next(made_by)
        return done

    def _role(self, value: Any) -> str | None:
        return self._roles.get(value) if isinstance(value, Tensor) else None

    @staticmethod
    def _done(name: str, args: Any, roles: list[str | None]) -> str | None:
        if name == "exp" and roles[0] in ("shifted", "logarithms"):
            return "softmax"
        if name == "bmm" and "sigmoid" in roles:
            return "sigmoid"
        places = {"div": (("sum", 1),), "mul": (("inverse", 1), ("inverse", 0))}.get(name, ())
        for role, place in places:
            if len(roles) < 2 or roles[place] != role:
                continue
            other = 1 - place
            if roles[other] == "weighted" or (roles[other] == "exp" and _is_row(args[other], args[place])):
                return "softmax"
        return None


def _name(func: Any) -> str:
    name: str = func.overloadpacket.__name__
    return name.rstrip("_")


def _role_of(name: str, args: Any, roles: list[str | None], result: Tensor) -> str | None:
    first = roles[0] if roles else None
    if name in ("bmm", "baddbmm"):
        if "exp" in roles[-2:]:
            return "weighted"
        # The experts of a mixture are products with weights of the model.
        return None if any(isinstance(value, nn.Parameter) for value in args[-2:]) else "product"
    if name == "exp":
        return "exp"
    if name == "sigmoid":
        return "sigmoid" if first in _SCORES else None
    if name == "sum":
        return "sum" if first == "exp" and result.numel() < args[0].numel() else None
    if name == "reciprocal":
        return "inverse" if first == "sum" else None
    if name == "_log_softmax":
        return "logarithms" if args[0].shape[args[1]] > 1 else None
    if name == "logsumexp":
        return "logsumexp" if result.numel() < args[0].numel() else None
    if name == "sub" and roles[1] == "logsumexp" and _is_row(args[0], args[1]):
        return "shifted"
    known = [role for role in roles if role is not None]
    if len(known) != 1 or name not in _PASSED[known[0]]:
        return None
    if known[0] in ("sum", "inverse") and any(
        isinstance(value, Tensor) and value.numel() > 1 for value in args[1:]
    ):
        return None
    return known[0]


def _is_row(whole: Tensor, total: Tensor) -> bool:
    """Whether ``total`` has one element for each row of ``whole``, along one dimension."""
    if whole.dim() != total.dim():
        return False
    differing = [(a, b) for a, b in zip(whole.shape, total.shape, strict=True) if a != b]
    return len(differing) == 1 and differing[0][1] == 1
