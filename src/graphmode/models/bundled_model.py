"""The model that ships in the package."""

from pathlib import Path


def bundled_model() -> Path:
    """Return the folder of the bundled model: a small Qwen3 trained on Shakespeare, in bf16 safetensors."""
    return Path(__file__).parent / "bundled"
