"""An exported model in onnxruntime, called as its users call it: ids in, logits or tokens out.

model = OnnxModel("exported/")
logits = model.logits(ids, mask)
tokens = model.generate(ids, mask, max_new_tokens=32)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retrofit.errors import ExportError

Array = NDArray[Any]

_DTYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(uint8)": np.uint8,
}


class OnnxModel:
    """A model that ``export_onnx`` wrote.

    Args:
        path: The folder, or the .onnx file in it.
        threads: Threads of one operator; None leaves it to onnxruntime.

    Raises:
        ExportError: If there is no such model or onnxruntime does not take it.
    """

    def __init__(self, path: str | Path, *, threads: int | None = None) -> None:
        import onnxruntime  # type: ignore[import-untyped]

        file = Path(path)
        if file.is_dir():
            file = file / "model.onnx"
        if not file.is_file():
            raise ExportError(f"no exported model at {path}: expected a folder with model.onnx")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = threads
        try:
            self.session = onnxruntime.InferenceSession(str(file), options, ["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime raises its own, undocumented classes
            raise ExportError(f"onnxruntime does not take {file}: {_first_line(error)}") from error
        self._inputs = {value.name: value for value in self.session.get_inputs()}
        self._outputs = [value.name for value in self.session.get_outputs()]

    @property
    def with_past(self) -> bool:
        """Whether the model takes and returns the cache."""
        return any(name.startswith("past_key_values.") for name in self._inputs)

    def logits(self, ids: Array, mask: Array | None = None) -> Array:
        """Returns the first output for whole sequences: the logits [batch, length, vocabulary].

        Args:
            ids: Token ids [batch, length].
            mask: 1 for real tokens, 0 for padding; None means that nothing is padded.
        """
        outputs = self.step(ids, mask, self.empty_past(len(ids)))
        result: Array = outputs[self._outputs[0]]
        return result

    def step(self, ids: Array, mask: Array | None, past: dict[str, Array]) -> dict[str, Array]:
        """Runs the model once.

        Args:
            ids: New token ids [batch, new].
            mask: [batch, past + new]; None means that nothing is padded.
            past: Inputs ``past_key_values.…``.

        Returns:
            Its outputs by name.
        """
        ids = np.asarray(ids, np.int64)
        if mask is None:
            before = next((value.shape[2] for name, value in past.items() if name.endswith(".key")), 0)
            mask = np.ones((ids.shape[0], before + ids.shape[1]), np.int64)
        mask = np.asarray(mask, np.int64)
        feeds: dict[str, Array] = {"input_ids": ids, "attention_mask": mask, **past}
        if "position_ids" in self._inputs:
            positions = (mask.cumsum(1) - 1).clip(min=0)
            feeds["position_ids"] = positions[:, -ids.shape[1] :]
        if "token_type_ids" in self._inputs:
            feeds["token_type_ids"] = np.zeros_like(ids)
        return dict(zip(self._outputs, self.session.run(self._outputs, feeds), strict=True))

    def empty_past(self, batch: int) -> dict[str, Array]:
        """Returns the cache before the first token; empty if the model takes none."""
        past = {}
        for name, value in self._inputs.items():
            if name.startswith("past_key_values."):
                shape = [size if isinstance(size, int) else 0 for size in value.shape]
                past[name] = np.zeros([batch, *shape[1:]], _DTYPES[value.type])
        return past

    def generate(self, ids: Array, mask: Array | None = None, *, max_new_tokens: int = 32) -> Array:
        """Returns the greedy continuation [batch, max_new_tokens].

        Args:
            ids: Prompts [batch, length], padded on the left.
            mask: As in ``logits``.
            max_new_tokens: Tokens to generate; there is no stop token.

        Raises:
            ExportError: If the model was exported without past.
        """
        if not self.with_past:
            raise ExportError("generate needs a model with past; export it with with_past=True")
        ids = np.asarray(ids, np.int64)
        mask = np.ones_like(ids) if mask is None else np.asarray(mask, np.int64)
        past = self.empty_past(len(ids))
        tokens = []
        for _ in range(max_new_tokens):
            outputs = self.step(ids, mask, past)
            ids = outputs["logits"][:, -1:].argmax(-1)
            tokens.append(ids)
            mask = np.concatenate([mask, np.ones_like(ids)], 1)
            past = {
                name.replace("present.", "past_key_values.", 1): value
                for name, value in outputs.items()
                if name.startswith("present.")
            }
        return np.concatenate(tokens, 1)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
