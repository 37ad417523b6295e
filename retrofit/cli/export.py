"""``retrofit export``: writes a model as ONNX."""

from __future__ import annotations

from typing import Annotated

import typer

from retrofit.cli.options import Dtype, Model, Output, TrustRemoteCode
from retrofit.cli.output import Shown, command


@command
def export(
    model: Model,
    output: Output,
    with_past: Annotated[bool, typer.Option(help="Take and return the cache, for decoding.")] = True,
    opset: Annotated[int | None, typer.Option(help="Of the default ONNX domain.", show_default=False)] = None,
    dtype: Dtype = "float32",
    trust_remote_code: TrustRemoteCode = False,
) -> Shown:
    """Write MODEL as ONNX into OUTPUT and compare it with PyTorch."""
    from retrofit.loading import load_model
    from retrofit.onnx import export_onnx

    loaded = load_model(model, dtype=dtype, trust_remote_code=trust_remote_code)
    report = export_onnx(loaded.model, output, with_past=with_past, opset=opset)
    return Shown(report, [str(report)], f"retrofit report {model}")
