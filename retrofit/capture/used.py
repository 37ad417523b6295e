"""Refuses modules whose attention weights are used elsewhere, as it shows when nobody can have them.

y, weights = attn(x); y * weights.amax(…)                    →   with None in their place the model differs, or fails
y = attn(x); y * attn.attn_map.amax(…)                       →   the same of what a module keeps on itself
k = self.keys = cat([self.keys, k])                          →   a second call of the module differs from the first
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from retrofit.capture.call import Signature
from retrofit.capture.export import without_cache
from retrofit.capture.kept import Unreadable, remembers
from retrofit.capture.probes import Probe, same_draws
from retrofit.capture.record import OwnerCall, slow_path
from retrofit.capture.site_plan import Refused, SitePlan

if TYPE_CHECKING:
    from retrofit.capture.analyse import Found
    from retrofit.capture.observe import ProbedCall


def refuse_used(
    model: nn.Module,
    planned: dict[str, Found],
    kept: Mapping[str, frozenset[str]],
    probe: Probe,
    output: Any,
) -> None:
    """Replaces the plans in ``planned`` of modules that cannot be converted for what else is done with their results.

    Args:
        model: The model with its original attention.
        planned: What was found, by path.
        kept: Names of the attributes that each module changes in a call.
        probe: A call of the model.
        output: What it returned.
    """
    for path, item in list(planned.items()):
        if isinstance(item.plan, SitePlan) and kept[path]:
            names = ", ".join(sorted(kept[path]))
            if remembers(item.module, partial(_again, item.module, item.calls[0].call)):
                _refuse(planned, path, f"it keeps something for its next call ({names})", "what it keeps")
            elif not _same_without(model, [Unreadable(item.module, kept[path])], probe, output):
                _refuse(
                    planned, path, f"what it keeps on itself ({names}) is used elsewhere", "what it keeps"
                )
            else:
                planned[path] = replace(item, plan=replace(item.plan, unkept=kept[path]))
    giving = [path for path, item in planned.items() if isinstance(item.plan, SitePlan) and item.plan.lost]
    if giving and not _same_without(model, _hooks(planned, giving), probe, output):
        for path in giving:
            if not _same_without(model, _hooks(planned, [path]), probe, output):
                reason = "the attention weights that it returns are used by the module around it"
                _refuse(planned, path, reason, "the use of its weights")
    for path in giving:
        item = planned[path]
        if isinstance(item.plan, SitePlan):
            calls = [_without_weights(probed, item.plan.lost) for probed in item.calls]
            planned[path] = replace(item, calls=calls)


def _without_weights(probed: ProbedCall, lost: tuple[int, ...]) -> ProbedCall:
    """The call with None in the place of the weights in its result, as a site is compared with."""
    output = _Without(lost)(None, (), probed.call.output)
    return replace(probed, call=replace(probed.call, output=output))


def _refuse(planned: dict[str, Found], path: str, reason: str, stage: str) -> None:
    plan = planned[path].plan
    assert isinstance(plan, SitePlan)
    known = {name: getattr(plan, name) for name in ("spelling", "heads", "kv_heads", "head_dim")}
    near = f"{plan.spelling}, all but {stage}"
    planned[path] = replace(planned[path], plan=Refused(reason, "self", near_miss=near, **known))


def _again(module: nn.Module, call: OwnerCall) -> Tensor:
    """The first result of ``module`` for a call that it had, without a cache."""
    values = without_cache(Signature.of(module).bind(call.args, call.kwargs))
    with same_draws(), torch.no_grad(), slow_path():
        return _first(module.forward(**values))


def _hooks(planned: Mapping[str, Found], paths: Sequence[str]) -> list[Any]:
    """Hooks by which the modules at ``paths`` return None in the place of weights."""
    plans = [(planned[path].module, planned[path].plan) for path in paths]
    return [
        module.register_forward_hook(_Without(plan.lost))
        for module, plan in plans
        if isinstance(plan, SitePlan)
    ]


def _same_without(model: nn.Module, hooks: Sequence[Any], probe: Probe, output: Any) -> bool:
    """Whether the model gives the same with ``hooks`` in place, which are removed."""
    try:
        with same_draws(), torch.no_grad(), slow_path():
            got = model(*probe.args, **probe.kwargs)
    except Exception:  # whatever it did with what it cannot have, it needs it
        return False
    finally:
        for hook in hooks:
            hook.remove()
    return torch.equal(_first(got), _first(output))


def _first(value: Any) -> Tensor:
    tensor: Tensor = next(leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor))
    return tensor


class _Without:
    """A forward hook that replaces some of the tensors in a result by None."""

    def __init__(self, lost: tuple[int, ...]) -> None:
        self.lost = lost

    def __call__(self, module: nn.Module | None, args: Any, output: Any) -> Any:
        leaves, spec = pytree.tree_flatten(output)
        tensors = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        for number in self.lost:
            leaves[tensors[number]] = None
        return pytree.tree_unflatten(leaves, spec)
