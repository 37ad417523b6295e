"""A custom operator becomes an opaque node whose function runs a loop exported from PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor
from torch.nn.functional import pad

from retrofit.onnx.bodies.chunks import join, scan_chunks, split
from retrofit.onnx.nodes import DOMAIN, CustomNode, add_functions, opaque_translations
from retrofit.onnx.translate import translate

OPSET = 20


@torch.library.custom_op("retrofit_test::mix", mutates_args=())
def mix(
    x: Tensor, memory: list[Tensor], gate: Tensor | None, *, width: int, scale: float, implementation: str
) -> tuple[Tensor, Tensor]:
    return chunked_mix(x, memory, gate, width=width, scale=scale, implementation=implementation)


@mix.register_fake
def _(x: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(x.shape[0])


def chunked_mix(
    x: Tensor, memory: list[Tensor], gate: Tensor | None, *, width: int, scale: float, implementation: str
) -> tuple[Tensor, Tensor]:
    """x [B, H, T, D] plus scale times the mean of the memories, in chunks of ``width`` rows."""

    def step(rows: Tensor, held: dict[str, Tensor]) -> list[Tensor]:
        total = sum(held[f"memory{i}"].mean(2, keepdim=True) for i in range(len(memory)))
        return [rows + scale * total]

    held = {f"memory{i}": each for i, each in enumerate(memory)}
    out = join(scan_chunks(step, [split(x, width)], held)[0], x.shape[2])
    if gate is not None:
        out = out * gate
    return out, pad(out, (0, 1)).sum((1, 2, 3))


class Model(torch.nn.Module):
    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        x, memory = inputs["x"], [inputs["a"], inputs["b"]]
        first, _ = torch.ops.retrofit_test.mix(x * 2, memory, None, width=4, scale=0.5, implementation="auto")
        second, _ = torch.ops.retrofit_test.mix(
            first, memory, None, width=4, scale=0.5, implementation="other"
        )
        third, total = torch.ops.retrofit_test.mix(
            second, memory, inputs["gate"], width=3, scale=0.5, implementation="auto"
        )
        return third + total[:, None, None, None]


def inputs(batch: int, tokens: int, held: int) -> dict[str, Tensor]:
    return {
        "x": torch.randn(batch, 2, tokens, 5),
        "a": torch.randn(batch, 2, held, 5),
        "b": torch.randn(batch, 2, held + 3, 5),
        "gate": torch.randn(5),
    }


def test_opaque_nodes_share_bodies_that_loop(tmp_path: Path) -> None:
    node = CustomNode(torch.ops.retrofit_test.mix.default, "Mix", chunked_mix)
    anything = torch.export.Dim.DYNAMIC
    dynamic = {name: {0: anything, 2: anything} for name in "xab"}
    program = translate(
        Model(), inputs(3, 11, 7), dynamic, opset=OPSET, translations=opaque_translations([node])
    )
    assert add_functions(program.model, [node], OPSET) == 3
    file = tmp_path / "model.onnx"
    program.save(file)
    onnx.checker.check_model(str(file), full_check=True)

    saved = onnx.load(file)
    placed = [each for each in saved.graph.node if each.domain == DOMAIN]
    # Which implementation runs is no attribute: the first two calls share a body, the third has its own.
    assert [each.op_type for each in placed] == ["Mix"] * 3
    assert placed[0].overload == placed[1].overload != placed[2].overload
    assert {attribute.name for attribute in placed[0].attribute} == {"width", "scale"}
    assert placed[0].input[1] == "" and placed[2].input[1] == "gate"
    assert len(saved.functions) == 2 and saved.ir_version <= 13
    assert all(
        entry.version == OPSET for each in saved.functions for entry in each.opset_import if not entry.domain
    )
    assert all(any(step.op_type == "Scan" for step in each.node) for each in saved.functions)

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    for batch, tokens, held in ((1, 1, 1), (2, 4, 9), (4, 26, 2)):
        example = inputs(batch, tokens, held)
        (out,) = session.run(None, {name: value.numpy() for name, value in example.items()})
        np.testing.assert_allclose(out, Model()(example).numpy(), atol=1e-4)
