"""The examples run as the README says, and what they claim holds: each checks itself and fails if it does not."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("demo.py", ["hit rate 1.000", "the same tokens", "batch 1: eager", "batch 8: eager"]),
        ("policy.py", ["batch  1: eager", "batch 64: eager", "11 graphs", "hit rate 1.0"]),
        ("vocoder.py", ["64 frames: eager", "8 graphs (two a size)", "hit rate 1.0"]),
    ],
)
def test_an_example_runs(name: str, words: list[str]) -> None:
    result = subprocess.run([sys.executable, str(EXAMPLES / name)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    for word in words:
        assert word in result.stdout
