"""``retrofit convert``: rewrites a model's attention and saves the result."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import RenderableType

from retrofit.cli.options import (
    Data,
    Device,
    Dtype,
    Kind,
    Model,
    Output,
    Set,
    Skip,
    TrustRemoteCode,
    Where,
    assignments,
    read_json,
)
from retrofit.cli.output import Shown, command, plain
from retrofit.cli.sites import percent, reasons
from retrofit.configs import TargetConfig, config_from_dict, config_to_dict
from retrofit.errors import ConfigError, OutputError
from retrofit.progress import count


@command
def convert(
    model: Model,
    output: Output,
    target: Annotated[str, typer.Option(help="hsa, maha or dense.")] = "hsa",
    set_: Set = None,
    where: Where = "*",
    kind: Kind = None,
    skip: Skip = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help='A JSON file with a configuration, {"target": "hsa", "budget": 256}, or one per pattern: '
            '{"model.layers.0.*": {"target": "dense"}, …}; in place of --target and --set.',
            show_default=False,
        ),
    ] = None,
    tune: Annotated[
        bool,
        typer.Option(
            "--tune", help="Measure from which position on HSA pays on DEVICE, and stay dense before."
        ),
    ] = False,
    data: Data = "pydoc_data.topics",
    dtype: Dtype = "float32",
    device: Device = "cpu",
    trust_remote_code: TrustRemoteCode = False,
) -> Shown:
    """Rewrite the attention of MODEL, verify every site, and save the converted model in OUTPUT."""
    if tune and (config is None and target != "hsa"):
        raise ConfigError(f"--tune is for the target hsa, got {target!r}; leave it out")
    wanted = _read(config) if config else config_from_dict({"target": target, **assignments(set_)})

    from retrofit.api import convert as convert_model
    from retrofit.api import sites
    from retrofit.data import check
    from retrofit.loading import load_model
    from retrofit.saving import check_folder, save_pretrained

    # Before minutes of work, not after them.
    check_folder(output)
    if Path(model).exists() and output.resolve() == Path(model).resolve():
        raise OutputError(f"{output} is the model itself; give another folder")
    if tune:
        check(data)
    loaded = load_model(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    if trained := [
        path for path, site in sites(loaded.model) if any(True for _ in site.retrofit.parameters())
    ]:
        raise ConfigError(
            f"{model} is converted already, and {len(trained)} sites ({trained[0]}, …) have parameters of their "
            "own that converting again would drop; convert the original, or go on with retrofit distill"
        )
    done = convert_model(loaded.model, wanted, where=where, kind=kind, skip=skip or (), progress=count)
    tuned = None
    if tune:
        from retrofit.bench import tune as tune_model

        tuned = tune_model(loaded.model, tokenizer=loaded.tokenizer, source=data)
    save_pretrained(loaded.model, output, tokenizer=loaded.tokenizer)
    document = {
        "model": model,
        "output": output,
        "config": _plain(wanted),
        "coverage": done.coverage,
        **plain(done),
        **({} if tuned is None else {"tuning": tuned.to_dict()}),
    }
    return Shown(
        document,
        [*_screen(done), *_tuning(tuned), f"saved in {output}"],
        f"retrofit eval {output} --against {model}",
    )


def _read(path: Path) -> TargetConfig | dict[str, TargetConfig]:
    """Returns the configuration in a JSON file, or the dictionary of configurations by pattern."""
    record = read_json(path)
    if "target" in record:
        return config_from_dict(record)
    if record and all(isinstance(value, dict) for value in record.values()):
        return {pattern: config_from_dict(value) for pattern, value in record.items()}
    raise ConfigError(
        f'{path} must hold {{"target": …}} or one such object per pattern, got {sorted(record)}; correct it'
    )


def _plain(config: TargetConfig | dict[str, TargetConfig]) -> dict[str, Any]:
    if isinstance(config, dict):
        return {pattern: config_to_dict(value) for pattern, value in config.items()}
    return config_to_dict(config)


def _screen(done: Any) -> list[RenderableType]:
    """Returns the lines of the summary; sites left for one reason share a line."""
    checked = done.verification
    targets = Counter(site.target for site in done.converted)
    number = len(done.converted)
    left = [site for site in done.left if site.kind != "other"]
    whole = sum(site.flops for site in (*done.converted, *done.left))
    share = percent(sum(site.flops for site in done.converted), whole)
    lines: list[RenderableType] = [
        f"converted {number} of {number + len(left)} sites to "
        + ", ".join(f"{target} ({count})" for target, count in targets.items())
        + (f": {share} of the attention FLOPs of the example" if share else ""),
        f"dense round trip, largest relative difference: sites {max(checked.sites.values()):.1e}"
        + "".join(
            f", {name} {error:.1e}"
            for name, error in (("prefill", checked.prefill), ("cached decode", checked.decode))
            if error is not None
        ),
    ]
    if left:
        lines += ["left as they are:", *reasons(left, whole)]
    return lines


def _tuning(tuned: Any) -> list[str]:
    """Returns a line for each shape of sites that was tuned."""
    if tuned is None:
        return []
    return [
        f"dense up to position {group.dense_until:,}: {len(group.sites)} sites like {group.sites[0]}; times of HSA "
        "over dense "
        + ", ".join(f"{group.hsa_ms[n] / group.dense_ms[n]:.2f} at {n:,}" for n in sorted(group.dense_ms))
        for group in tuned.tuned
    ]
