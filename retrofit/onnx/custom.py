"""Which operators become custom nodes, and what their bodies are derived from."""

from __future__ import annotations

import torch

from retrofit.kernels.dense import ops as _dense_ops  # noqa: F401  registers the operator
from retrofit.onnx.bodies.dense import dense_attention
from retrofit.onnx.nodes import CustomNode


def custom_nodes() -> list[CustomNode]:
    """Returns the custom nodes of an exported model."""
    return [CustomNode(torch.ops.retrofit.dense_attention.default, "DenseAttention", dense_attention)]
