"""``retrofit distill``: recovers the accuracy of a converted model."""

from __future__ import annotations

from retrofit.cli.options import Converted, Data, Device, Dtype, Output
from retrofit.cli.output import Shown, command


@command
def distill(
    model: Converted,
    output: Output,
    data: Data = "pydoc_data.topics",
    dtype: Dtype = "float32",
    device: Device = "cpu",
) -> Shown:
    """Train MODEL to do what its own weights do with dense attention, and save it in OUTPUT."""
    from retrofit.distill import DistillConfig
    from retrofit.distill import distill as train
    from retrofit.loading import load_model
    from retrofit.saving import save_pretrained

    loaded = load_model(model, dtype=dtype, device=device)
    found = train(loaded.model, data, DistillConfig(), tokenizer=loaded.tokenizer)
    save_pretrained(loaded.model, output, tokenizer=loaded.tokenizer)
    return Shown(found, [str(found)], f"retrofit eval {output}")
