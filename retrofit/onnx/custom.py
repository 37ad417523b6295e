"""Which operators become custom nodes, and what their bodies are derived from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from retrofit.kernels.dense import ops as _dense_ops  # noqa: F401  registers the operator
from retrofit.kernels.hsa import ops as _hsa_ops  # noqa: F401
from retrofit.kernels.maha import ops as _maha_ops  # noqa: F401
from retrofit.kernels.pyramid import ops as _pyramid_ops  # noqa: F401
from retrofit.onnx.bodies.dense import dense_attention
from retrofit.onnx.bodies.hsa import hsa_attention
from retrofit.onnx.bodies.listed import TRANSLATIONS
from retrofit.onnx.bodies.maha import maha_attention
from retrofit.onnx.bodies.pyramid import extend_pyramid, extend_spreads
from retrofit.onnx.nodes import CustomNode


def custom_nodes() -> list[CustomNode]:
    """Returns the custom nodes of an exported model."""
    ops = torch.ops.retrofit
    return [
        CustomNode(ops.dense_attention.default, "DenseAttention", dense_attention),
        CustomNode(
            ops.hsa_attention.default,
            "HSAAttention",
            hsa_attention,
            hidden=("implementation", "padded"),
            outputs=lambda _: 3,  # the fourth is for the backward pass
            inner=TRANSLATIONS,
        ),
        CustomNode(ops.maha_attention.default, "MAHAAttention", maha_attention),
        CustomNode(ops.extend_pyramid.default, "ExtendPyramid", extend_pyramid, outputs=_levels),
        CustomNode(ops.extend_spreads.default, "ExtendSpreads", extend_spreads),
    ]


def _levels(arguments: Mapping[str, Any]) -> int:
    return len(arguments["ratios"])
