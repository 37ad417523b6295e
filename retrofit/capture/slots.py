"""Which layer of the key-value cache a module writes to, seen in its calls.

update(k, v, self.layer_idx)                  →  Slot(layer_idx)
update(k, v, self.layer_idx + cycle_offset)   →  Slot(layer_idx, "cycle_offset"): one module, several layers
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from retrofit.capture.call import Signature
from retrofit.capture.record import OwnerCall


@dataclass(frozen=True)
class Slot:
    """The place of a site in the cache.

    Attributes:
        layer: Its layer; None if the module has none.
        argument: Name of a number in the call that is added to it; None if it is always the same layer.
    """

    layer: int | None
    argument: str | None = None

    def in_call(self, values: Mapping[str, Any]) -> int | None:
        """The layer for a call with arguments ``values``."""
        if self.layer is None or self.argument is None:
            return self.layer
        return self.layer + int(values.get(self.argument, 0))


def slot_of(module: nn.Module, signature: Signature, calls: Sequence[OwnerCall]) -> Slot | str:
    """Returns the place of ``module`` in the cache, or why it has none that can be told."""
    named = getattr(module, "layer_idx", getattr(module, "layer_id", None))
    layer = named if isinstance(named, int) else None
    seen = [(signature.bind(call.args, call.kwargs), call.written) for call in calls if call.written]
    if not seen:
        return Slot(layer)
    several = next((written for _, written in seen if len(written) > 1), None)
    if several is not None:
        return f"it writes to several layers of the cache in one call ({', '.join(map(str, several))})"
    places = {written[0] for _, written in seen}
    if len(places) == 1:
        return Slot(places.pop())
    if layer is not None:
        for name in seen[0][0]:
            if all(
                type(values.get(name)) is int and written[0] == layer + values[name]
                for values, written in seen
            ):
                return Slot(layer, name)
    return f"it writes to layers {', '.join(map(str, sorted(places)))} of the cache, and no argument says to which"
