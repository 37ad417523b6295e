"""``retrofit bench``: how fast a model is."""

from __future__ import annotations

from retrofit.cli.options import Device, Dtype, Model, TrustRemoteCode
from retrofit.cli.output import Shown, command


@command
def bench(
    model: Model,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    trust_remote_code: TrustRemoteCode = False,
) -> Shown:
    """Time MODEL against its own weights with dense attention."""
    from retrofit.benchmark import benchmark
    from retrofit.loading import load_model

    loaded = load_model(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    report = benchmark(loaded.model)
    return Shown(report, [str(report)], f"retrofit report {model}")
