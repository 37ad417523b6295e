"""``retrofit report``: all about a converted model on one page."""

from __future__ import annotations

from retrofit.cli.options import Device, Dtype, Model, TrustRemoteCode
from retrofit.cli.output import Shown, command


@command
def report(
    model: Model,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    trust_remote_code: TrustRemoteCode = False,
) -> Shown:
    """Say what MODEL was converted to, and what that costs and saves."""
    from retrofit.loading import load_model
    from retrofit.report import report as write

    loaded = load_model(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    found = write(loaded.model)
    return Shown(found, [str(found)], f"retrofit export {model} OUTPUT")
