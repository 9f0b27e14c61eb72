"""Free memory, control groups counted."""

from pathlib import Path

import torch

from graphmode.graph.memory import control_group_memory, free_memory, in_words

GIB = 1 << 30


def _group(folder: Path, names: tuple[str, str, str], limit: str, used: int, cached: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 1\n{names[2]} {cached}\n")


SECOND = ("memory.max", "memory.current", "inactive_file")
FIRST = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def test_a_group_is_bound_by_its_parents_and_cached_files_are_free(tmp_path: Path) -> None:
    _group(tmp_path / "a", SECOND, str(4 * GIB), 3 * GIB, GIB)
    _group(tmp_path / "a/b", SECOND, "max", 3 * GIB, GIB)
    _group(tmp_path / "a/b/c", SECOND, str(8 * GIB), 2 * GIB, 0)
    (tmp_path / "own").write_text("1:cpu:/elsewhere\n0::/a/b/c\n")
    assert sorted(control_group_memory(tmp_path / "own", tmp_path)) == [2 * GIB, 6 * GIB]


def test_the_first_version_and_a_path_that_the_container_does_not_see(tmp_path: Path) -> None:
    _group(tmp_path / "memory", FIRST, str(4 * GIB), 5 * GIB, 0)
    (tmp_path / "own").write_text("4:memory:/host/of/the/container\n3:cpu:/\n0::/\n")
    assert control_group_memory(tmp_path / "own", tmp_path) == [0]


def test_no_groups_no_limits(tmp_path: Path) -> None:
    assert control_group_memory(tmp_path / "own", tmp_path) == []


def test_there_is_memory_here() -> None:
    assert 0 < free_memory(torch.device("cpu")) < 1 << 50


def test_bytes_in_words() -> None:
    assert [in_words(size) for size in (7, 1536, 3 * GIB, 5 << 70)] == ["7 bytes", "1.5 KiB", "3.0 GiB", "5120.0 EiB"]
