"""What graphmode does inside transformers is listed, with its reason and the versions that it is tried with."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from graphmode.models.hf.patches import NEWEST, OLDEST, PATCHES

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "graphmode"
HF = SOURCE / "models" / "hf"
MODULES = sorted(file.stem for file in HF.glob("*.py"))
# What is imported from transformers elsewhere: names that its documentation has.
PUBLIC = {
    "AutoConfig",
    "AutoModelForCausalLM",
    "AutoModelForImageTextToText",
    "AutoProcessor",
    "AutoTokenizer",
    "GenerationConfig",
    "GgufConfig",
    "PreTrainedModel",
    "PreTrainedTokenizerBase",
    "PretrainedConfig",
    "Qwen3Config",
    "logging",
}


def root_of(node: ast.expr) -> str:
    """The name that an expression such as ``a.b[0].c`` begins with."""
    while isinstance(node, (ast.Attribute, ast.Subscript, ast.Call)):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else ""


def changes_or_reads(node: ast.AST) -> bool:
    """Whether code sets an attribute of something else, registers something there, or reads a private name of it."""
    if isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        return any(
            isinstance(each, ast.Attribute) and not (isinstance(each.value, ast.Name) and each.value.id == "self")
            for each in targets
        )
    if isinstance(node, ast.Attribute):
        private = node.attr.startswith("_") and not node.attr.startswith("__") and node.attr != "_schema"  # torch's
        return private and root_of(node) not in ("self", "cls", "torch")
    if isinstance(node, ast.Call):
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        registers = name.startswith("register") or name == "set_attn_implementation"
        return name == "setattr" or (registers and root_of(node.func) != "torch")
    return False


def places(source: str) -> set[str]:
    """The functions and classes that reach into transformers, and the names imported from inside it."""
    found = set()
    for statement in ast.parse(source).body:
        if isinstance(statement, ast.ImportFrom) and (statement.module or "").startswith("transformers."):
            found |= {each.asname or each.name for each in statement.names}
        elif any(map(changes_or_reads, ast.walk(statement))):
            if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):  # registers a function
                found.add(root_of(statement.value.args[-1]))
            else:
                found.add(getattr(statement, "name", ast.unparse(statement)))
    return found


def names_in(source: str) -> set[str]:
    names = set()
    for statement in ast.parse(source).body:
        if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
            names.add(statement.name)
        elif isinstance(statement, ast.ImportFrom):
            names |= {each.asname or each.name for each in statement.names}
        elif isinstance(statement, ast.Assign):
            names |= {target.id for target in statement.targets if isinstance(target, ast.Name)}
    return names


@pytest.mark.parametrize("module", MODULES)
def test_everything_that_reaches_into_transformers_has_an_entry(module: str) -> None:
    source = (HF / f"{module}.py").read_text()
    listed = {name for patch in PATCHES if patch.module == module for name in patch.where}
    assert not places(source) - listed, "add them to PATCHES in models/hf/patches.py"
    assert not listed - names_in(source), "PATCHES names what is no longer there"


@pytest.mark.parametrize(
    "source",
    [
        "def here(layer):\n    layer.forward = other",
        "def here(tokenizer):\n    setattr(tokenizer, name, 1)",
        "class here:\n    def f(self):\n        self.model.config._attn_implementation = 'x'",
        "def here(auto):\n    return auto._model_mapping",
        "def here(model):\n    model.register_forward_pre_hook(hook)",
        "AttentionInterface.register('name', here)",
        "from transformers.models.qwen3.modeling_qwen3 import here",
    ],
)
def test_a_place_is_found(source: str) -> None:
    assert places(source) == {"here"}


def test_what_is_graphmodes_own_is_no_place() -> None:
    own = (
        "import torch\nclass Own:\n    def f(self):\n        self._x = self._y = torch._C.z\ndef g(a):\n    return a.b"
    )
    assert places(own) == set()


def test_entries_are_whole_and_say_the_versions_that_are_tested() -> None:
    locks = (ROOT / name for name in ("requirements-oldest.lock", "requirements.lock"))
    locked = [re.search(r"^transformers==(\S+)", lock.read_text(), re.MULTILINE) for lock in locks]
    assert [match and match[1] for match in locked] == [OLDEST, NEWEST]
    for patch in PATCHES:
        assert patch.module in MODULES
        assert all(text.endswith(".") for text in (patch.what, patch.why, patch.until))
        assert patch.tests
        for name in patch.tests:
            marked = "pytest.mark.versions" in (ROOT / "tests" / name).read_text()
            assert marked == (OLDEST in patch.tried), f"{patch.module}: {name}"
        assert NEWEST in patch.tried


def test_elsewhere_only_public_names_of_transformers_are_used() -> None:
    for file in SOURCE.rglob("*.py"):
        if HF in file.parents:
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "transformers":
                assert node.module == "transformers", f"{file}: {node.module}"
                assert {each.name for each in node.names} <= PUBLIC, file
