"""``retrofit export``: writes a model as ONNX."""

from __future__ import annotations

from typing import Annotated

import typer

from retrofit.cli.options import Dtype, Model, Output, TrustRemoteCode
from retrofit.cli.output import Shown, command
from retrofit.progress import tell


@command
def export(
    model: Model,
    output: Output,
    with_past: Annotated[
        bool | None,
        typer.Option(
            help="Take and return the cache, for decoding; generative models do by default.",
            show_default=False,
        ),
    ] = None,
    opset: Annotated[int | None, typer.Option(help="Version of the standard operators.")] = None,
    check: Annotated[bool, typer.Option(help="Run the result in onnxruntime and compare it.")] = True,
    external_data: Annotated[
        bool | None,
        typer.Option(
            help="Write the weights to model.onnx.data; where they must be, by default.", show_default=False
        ),
    ] = None,
    dtype: Dtype = "float32",
    trust_remote_code: TrustRemoteCode = False,
) -> Shown:
    """Write MODEL as ONNX into OUTPUT and compare it with PyTorch."""
    from retrofit.folders import check_folder, is_export
    from retrofit.loading import load_model
    from retrofit.onnx import export_onnx

    check_folder(output, is_export, "earlier export")  # before minutes of work, not after them
    loaded = load_model(model, dtype=dtype, trust_remote_code=trust_remote_code)
    done = export_onnx(
        loaded.model,
        output,
        with_past=with_past,
        opset=opset,
        tokenizer=loaded.tokenizer,
        check=check,
        external_data="auto" if external_data is None else external_data,
        progress=tell,
    )
    return Shown({"model": model, **done.to_dict()}, [str(done)], f"retrofit bench {model}")
