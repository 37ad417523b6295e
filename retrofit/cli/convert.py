"""``retrofit convert``: rewrites a model's attention and saves the result."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from retrofit.cli.options import (
    Device,
    Dtype,
    Model,
    Output,
    Set,
    TrustRemoteCode,
    Where,
    assignments,
    read_json,
)
from retrofit.cli.output import Shown, command
from retrofit.errors import ConfigError


@command
def convert(
    model: Model,
    output: Output,
    target: Annotated[str, typer.Option(help="hsa, maha or dense.")] = "hsa",
    set_: Set = None,
    where: Where = "*",
    config: Annotated[
        Path | None,
        typer.Option(
            help='A JSON file with a configuration, {"target": "hsa", "budget": 256}, or one per pattern: '
            '{"model.layers.0.*": {"target": "dense"}, …}; in place of --target, --set and --where.',
            show_default=False,
        ),
    ] = None,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    trust_remote_code: TrustRemoteCode = False,
) -> Shown:
    """Rewrite the attention of MODEL, verify every site, and save the converted model in OUTPUT."""
    from retrofit.configs import config_from_dict, config_to_dict

    if config is None:
        wanted: Any = config_from_dict({"target": target, **assignments(set_)})
        document: dict[str, Any] = {"config": config_to_dict(wanted)}
    else:
        wanted = _read(config)
        document = {"config": str(config)}

    from retrofit.api import convert as convert_model
    from retrofit.loading import load_model
    from retrofit.saving import check_output, save_pretrained

    # Before minutes of work, not after them.
    check_output(output)
    loaded = load_model(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    report = convert_model(loaded.model, wanted, where=where)
    save_pretrained(loaded.model, output, tokenizer=loaded.tokenizer)
    document |= {"model": model, "output": output, "converted": report.converted, "skipped": report.skipped}
    return Shown(document, [_table(report, output)], f"retrofit eval {output} --against {model}")


def _read(path: Path) -> Any:
    """Returns the configuration in a JSON file, or the dictionary of configurations by pattern."""
    from retrofit.configs import config_from_dict

    record = read_json(path)
    if "target" in record:
        return config_from_dict(record)
    if record and all(isinstance(value, dict) for value in record.values()):
        return {pattern: config_from_dict(value) for pattern, value in record.items()}
    raise ConfigError(
        f'{path} must hold {{"target": …}} or one such object per pattern, got {sorted(record)}; correct it'
    )


def _table(report: Any, output: Path) -> Table:
    table = Table(title=f"{len(report.converted)} sites converted → {output}", title_justify="left")
    table.add_column("site", overflow="fold")
    table.add_column("outcome", overflow="fold")
    for site in report.converted:
        table.add_row(str(getattr(site, "path", site)), "converted")
    for site in report.skipped:
        table.add_row(site.path, f"left as it is: {site.reason}")
    return table
