"""From a model to a folder that onnxruntime runs.

    export_onnx(model, "out/")  →  out/model.onnx (and model.onnx.data), config.json, tokenizer files, export.json

The folder appears whole or not at all: it is written beside its place, compared with the model, and renamed.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx_ir.passes.common import (
    InlinePass,
    RemoveUnusedFunctionsPass,
    RemoveUnusedNodesPass,
    RemoveUnusedOpsetsPass,
)

from retrofit.configs import MAHAConfig
from retrofit.errors import ExportError
from retrofit.folders import EXPORT_RECORD, is_export, new_folder
from retrofit.onnx.calls import CallModel
from retrofit.onnx.custom import custom_nodes
from retrofit.onnx.layers import equal_layers, unroll
from retrofit.onnx.nodes import DOMAIN, CustomNode, add_functions, opaque_translations
from retrofit.onnx.translate import remove_repetitions, shrink, translate
from retrofit.onnx.verify import TOLERANCES, Difference, verify
from retrofit.site import RetrofittedAttention

OPSET = 20
INLINE_ABOVE = 8
"""Custom nodes from which loading a model with functions takes too long."""
EXTERNAL_ABOVE = 2**31 - 2**24
"""Bytes of weights from which a model's file would pass protobuf's limit of 2 GB."""


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote.

    Attributes:
        path: The folder.
        files: Bytes of each file in it.
        opset: Version of the standard operators.
        ir_version: Version of the file format.
        inputs: Names of the inputs.
        outputs: Names of the outputs.
        custom_nodes: Nodes of each custom type.
        functions: Number of function bodies that they share.
        inlined: Whether the bodies stand in the place of the nodes.
        tied_embeddings: Whether input and output embeddings are one tensor in the file as in the model.
        worst: Greatest difference to PyTorch over all lengths; None if it was not checked.
    """

    path: str
    files: dict[str, int]
    opset: int
    ir_version: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    custom_nodes: dict[str, int]
    functions: int
    inlined: bool
    tied_embeddings: bool
    worst: Difference | None

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return asdict(self)

    def __str__(self) -> str:
        size = sum(self.files.values()) / 1e6
        nodes = ", ".join(f"{count} {name}" for name, count in self.custom_nodes.items()) or "no custom nodes"
        tied = ", embeddings tied" if self.tied_embeddings else ""
        lines = [
            f"{self.path}: {', '.join(self.files)} ({size:,.0f} MB), opset {self.opset}{tied}",
            f"{nodes} on {self.functions} function bodies{', inlined' if self.inlined else ''}",
        ]
        if self.worst is not None:
            lines.append(str(self.worst))
        return "\n".join(lines)


def export_onnx(
    model: torch.nn.Module,
    path: str | Path,
    *,
    with_past: bool | None = None,
    opset: int | None = None,
    tokenizer: Any = None,
    check: bool = True,
    external_data: bool | str = "auto",
    inline: bool | str = "auto",
    progress: Callable[[str], None] | None = None,
) -> ExportReport:
    """Exports a Hugging Face model, converted or not, and compares the result with it.

    Attention of converted sites becomes nodes of the domain ``ai.retrofit``, each with a function body, so that
    plain onnxruntime runs the model. Batch and length are dynamic. Peak memory is linear in the length.

    Args:
        model: A causal language model or an encoder.
        path: The folder to write; it must not exist, be empty, or hold an earlier export.
        with_past: Whether the model takes and returns the cache (``past_key_values.…`` and ``present.…``: keys,
            values and the targets' state); with an empty cache it also does whole sequences. None means that
            generative models do.
        opset: Version of the standard operators; None means 20.
        tokenizer: Saved beside the model if given.
        check: Whether to run the result in onnxruntime at several lengths and compare it with ``model``.
        external_data: Whether weights go into ``model.onnx.data``; ``auto`` does so where they must.
        inline: Whether the bodies are put in the place of the custom nodes. onnxruntime, where it has no kernel
            for them, does so itself when it loads a model, in a time that grows with the square of their number;
            ``auto`` does so for more than 8 nodes.
        progress: Is told each step.

    Returns:
        What was written.

    Raises:
        ExportError: If the model cannot be exported or the result differs from it by more than the tolerance.
        OutputError: If ``path`` cannot be written or holds something else.
    """
    opset = OPSET if opset is None else opset
    if not 18 <= opset <= 25:
        raise ExportError(f"opset must be between 18 and 25, got {opset}")
    if external_data not in (True, False, "auto"):
        raise ExportError(f"external_data must be True, False or 'auto', got {external_data!r}")
    if inline not in (True, False, "auto"):
        raise ExportError(f"inline must be True, False or 'auto', got {inline!r}")
    _refuse_what_does_not_run(model, check)
    tell = progress or (lambda message: None)
    training = model.training
    model.eval()
    try:
        with new_folder(path, is_export, "earlier export") as folder:
            tell("translating the model")
            nodes = custom_nodes()
            call, program = _translated(model, nodes, with_past, opset)
            tell("deriving the bodies of the custom nodes")
            add_functions(program.model, nodes, opset)
            counts = Counter(node.op_type for node in program.model.graph if node.domain == DOMAIN)
            bodies = len(program.model.functions)
            inlined = sum(counts.values()) > INLINE_ABOVE if inline == "auto" else bool(inline)
            if inlined:
                InlinePass()(program.model)
                remove_repetitions(program.model)
            for tidy in (
                RemoveUnusedNodesPass(),
                RemoveUnusedFunctionsPass(),
                RemoveUnusedOpsetsPass(),
            ):
                tidy(program.model)
            program.rename_axes(call.axis_names(program.model.graph.inputs))
            tell("writing")
            weights = sum(
                value.const_value.nbytes
                for value in program.model.graph.initializers.values()
                if value.const_value is not None
            )
            external = weights > EXTERNAL_ABOVE if external_data == "auto" else bool(external_data)
            file = folder / "model.onnx"
            program.save(file, external_data=external)
            del program
            _check_file(file)
            _save_companions(model, tokenizer, folder)
            worst = None
            if check:
                tell("comparing with PyTorch")
                worst = verify(model, file, sparse_from=call.sparse_from, ids=_text(tokenizer))
            saved = onnx.load(file, load_external_data=False)
            report = ExportReport(
                path=str(path),
                files={item.name: item.stat().st_size for item in sorted(folder.iterdir())},
                opset=opset,
                ir_version=saved.ir_version,
                inputs=tuple(value.name for value in saved.graph.input),
                outputs=tuple(value.name for value in saved.graph.output),
                custom_nodes=dict(counts),
                functions=bodies,
                inlined=inlined,
                tied_embeddings=_tied(model) and _stored_once(saved),
                worst=worst,
            )
            (folder / EXPORT_RECORD).write_text(json.dumps(report.to_dict(), indent=2) + "\n")
    finally:
        model.train(training)
    return report


def _translated(
    model: torch.nn.Module, nodes: Sequence[CustomNode], with_past: bool | None, opset: int
) -> tuple[CallModel, torch.onnx.ONNXProgram]:
    """The model with opaque custom nodes; of many equal layers a few are translated and the others copied."""

    def whole() -> tuple[CallModel, torch.onnx.ONNXProgram]:
        call = CallModel(model, with_past=with_past)
        program = translate(
            call,
            call.example(),
            call.dynamic(),
            opset=opset,
            output_names=call.output_names,
            translations=opaque_translations(nodes),
            shrunk=False,
        )
        return call, program

    layers = equal_layers(model)
    if layers is None:
        call, program = whole()
    else:
        with layers.shortened():
            call, program = whole()
        call = CallModel(model, with_past=with_past)
        weights = {**dict(call.named_parameters(remove_duplicate=False)), **dict(call.named_buffers())}
        if not unroll(program.model.graph, f"model.{layers.path}", len(layers.modules), weights):
            call, program = whole()
    shrink(program.model)
    return call, program


def _refuse_what_does_not_run(model: torch.nn.Module, check: bool) -> None:
    dtype = next(model.parameters()).dtype
    if check and dtype not in TOLERANCES:
        raise ExportError(
            f"the weights must be float32, float16 or float64 to be compared in onnxruntime, got {dtype}; "
            "convert them with model.float(), or pass check=False for a runtime that takes them"
        )
    for path, site in model.named_modules():
        config = site.retrofit.config if isinstance(site, RetrofittedAttention) else None
        what = _unexportable(site) if isinstance(site, RetrofittedAttention) else None
        if what is not None:
            raise ExportError(
                f"a converted site with {what} cannot be exported, got {path}; leave it out with where=…"
            )
        if isinstance(config, MAHAConfig):
            for name, wanted in (("aggregation", "convex"), ("mode", "causal"), ("dilated_branch", False)):
                if getattr(config, name) != wanted:
                    raise ExportError(
                        f"MAHAConfig.{name} must be {wanted!r} to be exported, got {getattr(config, name)!r} at "
                        f"{path}; convert it again with {name}={wanted!r}, or leave it out with where=…"
                    )


def _unexportable(site: RetrofittedAttention) -> str | None:
    if site.plan.kind == "cross":
        return "cross-attention"
    if site.plan.mask.slopes:
        return "a bias by distance (ALiBi)"
    if site.retrofit.softcap:
        return "a softcap of the scores"
    return "attention sinks" if site.retrofit.sinks else None


def _check_file(file: Path) -> None:
    try:
        onnx.checker.check_model(str(file), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"the exported model is not valid ONNX: {str(error).splitlines()[0]}") from error


def _save_companions(model: Any, tokenizer: Any, folder: Path) -> None:
    if hasattr(model, "config"):
        model.config.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def _text(tokenizer: Any) -> torch.Tensor | None:
    """Tokens of a text that every Python ships, for the comparison."""
    if tokenizer is None:
        return None
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[key] for key in sorted(topics))
    return torch.tensor(tokenizer(text[:8_000], add_special_tokens=False)["input_ids"])


def _tied(model: Any) -> bool:
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return output is not None and output.weight is model.get_input_embeddings().weight


def _stored_once(saved: onnx.ModelProto) -> bool:
    """Whether what the token ids look up is used again, at the other end of the model."""
    uses = Counter(name for node in saved.graph.node for name in node.input)
    looked_up = [
        node.input[0] for node in saved.graph.node if node.op_type == "Gather" and "input_ids" in node.input
    ]
    return any(uses[name] > 1 for name in looked_up)
