"""Export to ONNX with custom nodes whose bodies are the operators' own blocked implementation."""

from __future__ import annotations

from retrofit.onnx.export import ExportReport, export_onnx
from retrofit.onnx.session import OnnxModel

__all__ = ["ExportReport", "OnnxModel", "export_onnx"]
