"""Which operators become custom nodes, and what their bodies are derived from."""

from __future__ import annotations

import torch

from retrofit.kernels.dense import ops as _dense_ops  # noqa: F401  registers the operator
from retrofit.kernels.hsa import ops as _hsa_ops  # noqa: F401
from retrofit.kernels.maha import ops as _maha_ops  # noqa: F401
from retrofit.onnx.bodies.dense import dense_attention
from retrofit.onnx.bodies.hsa import hsa_attention
from retrofit.onnx.bodies.maha import maha_attention
from retrofit.onnx.nodes import CustomNode


def custom_nodes() -> list[CustomNode]:
    """Returns the custom nodes of an exported model."""
    ops = torch.ops.retrofit
    return [
        CustomNode(ops.dense_attention.default, "DenseAttention", dense_attention),
        CustomNode(ops.hsa_attention.default, "HSAAttention", hsa_attention),
        CustomNode(ops.maha_attention.default, "MAHAAttention", maha_attention),
    ]
