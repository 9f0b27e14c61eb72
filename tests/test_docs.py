"""What the README and the guide show runs as it is written there, and every public name is described."""

from __future__ import annotations

import doctest
import importlib.util
import linecache
import re
import shlex
import tomllib
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import huggingface_hub
import pytest
import torch
import typer.main
from typer.testing import CliRunner

from graphmode.cli import app
from graphmode.graph.backends import base
from tests.multimodal import save_model, save_processors

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/guide.md")
NAME = "Qwen/Qwen2.5-VL-3B-Instruct"
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block and, where a block of text follows at once, what it prints."""

    page: str
    line: int
    language: str
    code: str
    output: str | None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def read(page: str) -> str:
    return (ROOT / page).read_text()


BLOCKS = [
    Block(page, read(page)[: found.start()].count("\n") + 1, *found.groups())
    for page in PAGES
    for found in FENCE.finditer(read(page))
]


def blocks(language: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == language], ids=str)


def reference() -> ModuleType:
    """The script that writes the API reference."""
    spec = importlib.util.spec_from_file_location("api_reference", ROOT / "scripts" / "api_reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


REFERENCE = reference()
PACKAGE = REFERENCE.load()


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hub's cache in which the name that the guide uses stands for a tiny model with random weights."""
    cache = tmp_path_factory.mktemp("hub")
    folder = cache / f"models--{NAME.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    snapshot = folder / "snapshots" / ("0" * 40)
    save_model("qwen2_5_vl", snapshot)
    save_processors(snapshot)
    return cache


def check_output(block: Block, printed: str) -> None:
    if block.output is not None:
        flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
        assert doctest.OutputChecker().check_output(block.output, printed, flags), f"it printed:\n{printed}"


@blocks("python")
def test_a_block_of_python_runs_by_itself(
    block: Block, hub: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(base, "default_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(hub))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    torch.manual_seed(0)
    linecache.cache[str(block)] = (len(block.code), None, block.code.splitlines(keepends=True), str(block))
    exec(compile(block.code, str(block), "exec"), {"__name__": "__main__"})
    check_output(block, capsys.readouterr().out)


@blocks("sh")
def test_a_block_of_shell_runs_and_its_targets_are_there(block: Block, tmp_path: Path) -> None:
    """Commands of graphmode run. ``make`` sets up an environment, so its targets are looked up."""
    targets = re.findall(r"^([a-z-]+):", read("Makefile"), re.MULTILINE)
    for line in block.code.splitlines():
        program, *arguments = shlex.split(line, comments=True)
        if program == "make":
            assert arguments, line
            assert set(arguments) <= set(targets), line
        else:
            assert program == "graphmode", f"{line}: nothing here runs {program}"
            result = CliRunner().invoke(app, arguments, env={"CUDA_VISIBLE_DEVICES": ""})
            assert result.exit_code == 0, result.output
            check_output(block, result.output)


@blocks("toml")
def test_a_block_of_toml_is_valid(block: Block) -> None:
    assert tomllib.loads(block.code)


def test_every_block_is_of_a_kind_that_is_tested() -> None:
    assert {block.language for block in BLOCKS} <= {"python", "sh", "toml", "mermaid"}
    assert all(read(page).count("```") == 2 * len(re.findall(r"^```\w+$", read(page), re.MULTILINE)) for page in PAGES)


@pytest.mark.parametrize("page", [*PAGES, "docs/serving.md"])
def test_a_command_within_a_sentence_is_one_that_is_understood(page: str) -> None:
    for command in re.findall(r"`graphmode ([^`]*)`", read(page)):
        name, *arguments = shlex.split(command)
        assert name in COMMANDS, command
        called = COMMANDS[name]
        while arguments and arguments[0] in getattr(called, "commands", {}):
            called = called.commands[arguments.pop(0)]
        known = {option for parameter in called.params for option in parameter.opts}
        given = {argument.partition("=")[0] for argument in arguments if argument.startswith("--")}
        assert given <= known | {"--help"}, command


@pytest.mark.parametrize(
    "page",
    [*PAGES, "docs/design.md", "docs/performance.md", "docs/serving.md", "docs/notes/README.md", "CONTRIBUTING.md"],
)
def test_a_link_leads_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", read(page), flags=re.DOTALL)):
        file, _, anchor = target.partition("#")
        if "://" in file:
            continue
        linked = (ROOT / page).parent / file if file else ROOT / page
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}, (
                target
            )


def test_the_api_reference_is_what_the_docstrings_say(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sys.argv", ["api_reference.py", "--check"])
    REFERENCE.main()
    monkeypatch.setattr(REFERENCE, "PAGE", tmp_path / "api.md")
    with pytest.raises(SystemExit, match="make docs"):
        REFERENCE.main()
    (tmp_path / "api.md").write_text(read("docs/api.md").replace("bucket", "size"))
    with pytest.raises(SystemExit, match="make docs"):
        REFERENCE.main()


def test_every_public_name_has_a_docstring() -> None:
    found = REFERENCE.public(PACKAGE)
    without = [
        f"{name}.{member.name}" if member is not target else name
        for names in found.values()
        for name, target in names.items()
        for member in (target, *REFERENCE.members(target))
        if member.docstring is None and (member is not target or target.is_class)
    ]
    assert not without


@pytest.mark.parametrize("path", REFERENCE.PACKAGES)
def test_every_public_name_is_in_the_guide(path: str) -> None:
    guide = read("docs/guide.md")
    exported = REFERENCE.exported(PACKAGE, path)
    missing = {name for name in exported if not re.search(rf"\b{re.escape(name)}\b", guide)}
    runner = REFERENCE.members(exported["GraphRunner"]) if "GraphRunner" in exported else []
    missing |= {f".{member.name}" for member in runner if f".{member.name}" not in guide and member.name != "__call__"}
    assert not missing
