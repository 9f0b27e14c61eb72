"""Print what graphmode requires without upper bounds, one requirement a line, for pip to install the newest releases.

Without an NVIDIA GPU, torch and triton stay as they are: the newest torch may have no build without CUDA.
"""

import shutil
from importlib.metadata import requires

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

EXTRAS = ("vision", "real", "test")
WITHOUT_GPU = ("torch", "triton")

for requirement in map(Requirement, requires("graphmode") or ()):
    wanted = requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in EXTRAS)
    here = shutil.which("nvidia-smi") or requirement.name not in WITHOUT_GPU
    if wanted and here and requirement.name != "graphmode":
        lower = SpecifierSet(",".join(str(each) for each in requirement.specifier if each.operator == ">="))
        print(f"{requirement.name}{lower}")
