"""``retrofit inspect``: which attention a model has, and what of it can be converted."""

from __future__ import annotations

from rich.console import RenderableType

from retrofit.cli.options import Device, Dtype, Model, TrustRemoteCode
from retrofit.cli.output import Shown, command
from retrofit.cli.sites import percent, reasons, table
from retrofit.progress import count


@command
def inspect(
    model: Model,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    trust_remote_code: TrustRemoteCode = False,
) -> Shown:
    """List the attention sites of MODEL; changes nothing."""
    from retrofit.api import inspect as inspect_model
    from retrofit.loading import load_model

    loaded = load_model(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    found = inspect_model(loaded.model, progress=count)
    sites = [site for site in found.sites if site.kind != "other"]
    others = [site for site in found.sites if site.kind == "other"]
    convertible = sum(site.convertible for site in sites)
    document = {
        "model": model,
        "architecture": type(loaded.model).__name__,
        "convertible": convertible,
        "coverage": found.coverage,
        "sites": sites,
        "other_softmax": others,
    }
    whole = sum(site.flops for site in found.sites)
    share = percent(sum(site.flops for site in sites if site.convertible), whole)
    title = f"{model}: {len(sites)} attention sites, {convertible} convertible" + (
        f": {share} of the attention FLOPs of the example" if share else ""
    )
    screen: list[RenderableType] = [table(title, sites, whole), *reasons(sites, whole)]
    if others:
        screen += [f"{len(others)} modules with a softmax that is not attention:", *reasons(others, whole)]
    following = f"retrofit convert {model} OUTPUT --target hsa" if convertible else "retrofit convert --help"
    return Shown(document, screen, following)
