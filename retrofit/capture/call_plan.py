"""What a graph of a module needs to know of the call that it was made from."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import Tensor

from retrofit.capture.assemble import Source
from retrofit.capture.call import LeafPath, Signature, is_cache, leaves
from retrofit.capture.export import Captured
from retrofit.capture.guards import Guard
from retrofit.capture.record import OwnerCall


def parts_of_call(
    captured: Captured,
    source: Source,
    signature: Signature,
    call: OwnerCall,
    around: Collection[str | None],
    *,
    closed: bool,
    guards: tuple[Guard, ...],
    mask: LeafPath | None = None,
) -> dict[str, Any]:
    """The fields of a :class:`CallPlan` that are about its call.

    Args:
        captured: The module.
        source: What is made of its graph.
        signature: Its parameters.
        call: The call.
        around: Names of arguments that are no part of the graph.
        closed: Whether no other arguments may be given than the call had; modules of transformers hand on what they
            do not know.
        guards: Conditions on its sizes.
        mask: The argument that is a mask and goes around the graph.
    """
    bound = signature.bind(call.args, call.kwargs)
    known = (
        (path, value)
        for path, value in leaves(bound).items()
        if not isinstance(value, Tensor) and path[0] not in around and not is_cache(value)
    )
    taken = (guard for guard in guards if all(path != mask for path, _ in guard.sizes))
    return {
        "source": source.code,
        "inputs": tuple(captured.inputs[name] for name in source.inputs),
        "sizes": tuple((path, sizes) for path, sizes in captured.sizes().items() if path != mask),
        "guards": tuple(taken),
        "same": tuple(captured.same.items()),
        "rows": captured.rows,
        "signature": signature,
        "known": tuple(known),
        "only": frozenset(bound) if closed else None,
        "output": captured.output,
        "lost": tuple(place for place, item in enumerate(source.results) if item is None),
        "constants": tuple(captured.constants.items()),
    }
