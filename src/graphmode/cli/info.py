"""``graphmode info``: what is here and what each device can do."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated, Any

import typer


def info(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False) -> None:
    """Show the devices that are here, what each can do, versions, and how every device is supported."""
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
