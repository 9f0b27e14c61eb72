"""A toy accelerator, registered as torch's PrivateUse1 device. Once loaded, it stays for the life of the process."""

from pathlib import Path
from types import ModuleType

import torch


def load(build_folder: str) -> None:
    """Compile the extension, which takes half a minute the first time, and make the device ``toy`` known to torch."""
    from torch.utils.cpp_extension import load as compile_extension

    torch.utils.rename_privateuse1_backend("toy")
    compile_extension(
        "graphmode_toy", [str(Path(__file__).parent / "toy.cpp")], extra_cflags=["-O0"], build_directory=build_folder
    )
    module = ModuleType("torch.toy")
    module.is_available = lambda: True  # type: ignore[attr-defined]
    module.device_count = lambda: 1  # type: ignore[attr-defined]
    module.current_device = lambda: 0  # type: ignore[attr-defined]
    module._is_in_bad_fork = lambda: False  # type: ignore[attr-defined]
    torch._register_device_module("toy", module)
