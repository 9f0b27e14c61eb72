"""``graphmode info``: what is here, what each device can do, and which kernels a model takes."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated, Any

import typer

from graphmode.cli.options import errors_in_one_line

_DTYPES = ("float32", "bfloat16", "float16")


def info(
    kernels: Annotated[
        bool, typer.Option("--kernels", help="Show which kernels a model's layers take, by rows of a step, and why.")
    ] = False,
    model: Annotated[
        str, typer.Option(help="Of --kernels: qwen3-0.6b, qwen3-1.7b, qwen3-8b, a local folder or a hub name.")
    ] = "qwen3-0.6b",
    on: Annotated[str, typer.Option(help="Of --kernels: here, cpu or h100.")] = "here",
    dtype: Annotated[
        str | None, typer.Option(help="Of --kernels. Default: bfloat16, on a CPU float32.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show the devices that are here, what each can do, versions, and how every device is supported."""
    if kernels:
        with errors_in_one_line():
            _show_kernels(model, on, dtype, as_json)
        return
    found = _find()
    if as_json:
        typer.echo(json.dumps(found))
        return
    for name, value in found["versions"].items():
        typer.echo(f"{name:14} {value}")
    typer.echo()
    for device in found["devices"]:
        abilities = ", ".join(name for name, able in device["capabilities"].items() if able)
        typer.echo(f"{device['device']:8} {device['name']}: {abilities}")
    typer.echo(f"\nbackends: {', '.join(found['backends'])}\n")
    for device, support in found["support"].items():
        typer.echo(device)
        for name, words in support.items():
            typer.echo(f"  {name:11} {words}")


def _show_kernels(model: str, on: str, dtype: str | None, as_json: bool) -> None:
    """Print which kernels a model's layers take."""
    import torch
    from transformers import AutoConfig, Qwen3Config

    from graphmode.models.checkpoint import find_checkpoint
    from graphmode.observe.bench.workloads import RANDOM_MODELS
    from graphmode.observe.kernels import as_text, kernels_of, shape_of
    from graphmode.ops.dispatch import H100, device_of

    if on not in ("here", "cpu", "h100"):
        raise typer.BadParameter(f"--on {on!r} is unknown; give here, cpu or h100")
    if dtype is not None and dtype not in _DTYPES:
        raise typer.BadParameter(f"--dtype {dtype!r} is unknown; give {', '.join(_DTYPES)}")
    if model in RANDOM_MODELS:
        config: Any = Qwen3Config(**RANDOM_MODELS[model])
    else:
        config = find_checkpoint(model).read(AutoConfig, "config.json")
    here = (torch.accelerator.current_accelerator(check_available=True) if on == "here" else None) or torch.device(
        "cpu"
    )
    device = H100 if on == "h100" else device_of(here)
    name = "h100" if on == "h100" else here.type
    dtype = dtype or ("float32" if name == "cpu" else "bfloat16")
    found = kernels_of(shape_of(config), device, getattr(torch, dtype))
    if as_json:
        listed = {operation: [each._asdict() for each in ranges] for operation, ranges in found.items()}
        typer.echo(json.dumps({"model": model, "on": name, "dtype": dtype, "kernels": listed}))
    else:
        typer.echo(f"{model} in {dtype} on {name}: rows of a step, what runs, and why not another kernel\n")
        typer.echo(as_text(found))


def _find() -> dict[str, Any]:
    import torch

    from graphmode.graph import available_backends, device_support, get_backend
    from graphmode.observe.machine import device_name, versions

    found = [torch.device("cpu")]
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None and accelerator.type in available_backends():
        found += [torch.device(accelerator.type, index) for index in range(torch.accelerator.device_count())]
    devices = []
    for device in found:
        capabilities = get_backend(device).capabilities
        devices.append({"device": str(device), "name": device_name(device), "capabilities": vars(capabilities)})
    return {
        "versions": versions(),
        "devices": devices,
        "backends": sorted(available_backends()),
        "support": {device: asdict(support) for device, support in device_support().items()},
    }
