"""Export to ONNX with custom nodes whose bodies are the operators' own blocked implementation."""
