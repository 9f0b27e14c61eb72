"""Write down the interface of a published torch_npu wheel, which the tests' fake NPU enforces.

Usage: pip download torch-npu --no-deps --dest wheels && python scripts/read_npu_interface.py wheels/torch_npu-*.whl

Reads the wheel's Python files as syntax trees and its operator list as text; imports and runs nothing of it.
"""

import ast
import json
import re
import sys
from pathlib import Path
from zipfile import ZipFile

TARGET = Path(__file__).parent.parent / "tests" / "devices" / "npu_interface.json"
GRAPHS, STREAMS = "torch_npu/npu/graphs.py", "torch_npu/npu/streams.py"
HANDLERS = "torch_npu/npu/_npugraph_handlers/ifa_handler.py"
OPERATORS = "torch_npu/csrc/aten/npu_native_functions_by_codegen.yaml"
ATTENTION = "npu_fused_infer_attention_score"
WANTED = {
    GRAPHS: [
        "graph.__init__",
        "NPUGraph.__init__",
        "NPUGraph.capture_begin",
        "NPUGraph.capture_end",
        "NPUGraph.replay",
        "NPUGraph.reset",
        "NPUGraph.pool",
        "NPUGraph.update",
        "NPUGraph.debug_dump",
        "graph_pool_handle",
    ],
    STREAMS: ["Stream.__new__", "Stream.wait_stream", "Stream.wait_event", "Event.record", "Event.synchronize"],
}


def signatures(source: str, wanted: list[str]) -> dict[str, str]:
    """Return the parameters of functions and methods, without annotations, as they are written."""
    found = {}
    for node in ast.parse(source).body:
        members = node.body if isinstance(node, ast.ClassDef) else [node]
        prefix = f"{node.name}." if isinstance(node, ast.ClassDef) else ""
        for member in members:
            if isinstance(member, ast.FunctionDef) and prefix + member.name in wanted:
                for argument in ast.walk(member.args):
                    if isinstance(argument, ast.arg):
                        argument.annotation = None
                found[prefix + member.name] = ast.unparse(member.args)
    if missing := sorted(set(wanted) - found.keys()):
        raise SystemExit(f"the wheel has no {missing}")
    return found


def update_keys(source: str) -> list[str]:
    """Return the keywords of the attention operator that a graph's update takes."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "UPDATE_SPECS":
            specs = ast.literal_eval(node.value)
            if ATTENTION in specs:
                return [key for _, _, key in specs[ATTENTION]]
    raise SystemExit(f"the wheel's graphs do not update {ATTENTION}")


def attributes(source: str, name: str) -> list[str]:
    """Return the attributes that a class has or sets when it is made."""
    found = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            for member in node.body:
                targets = [member] if isinstance(member, ast.Assign) else []
                if isinstance(member, ast.FunctionDef) and member.name == "__init__":
                    targets = [each for each in ast.walk(member) if isinstance(each, ast.Assign)]
                for target in (each.targets[0] for each in targets):
                    found.add(target.attr if isinstance(target, ast.Attribute) else ast.unparse(target))
    return sorted(found)


def main(wheel: str) -> None:
    """Read the wheel and write the interface."""
    with ZipFile(wheel) as files:
        text = {name: files.read(name).decode() for name in [*WANTED, HANDLERS, OPERATORS]}
        version = re.search(r"__version__ = '(.+)'", files.read("torch_npu/version.py").decode())
    schema = re.search(rf"func: ({ATTENTION}\(.*)$", text[OPERATORS], re.MULTILINE)
    if version is None or schema is None:
        raise SystemExit(f"{wheel} is not a wheel of torch_npu that this script knows")
    interface = {
        "version": version[1],
        "signatures": {
            key: value for name, keys in WANTED.items() for key, value in signatures(text[name], keys).items()
        },
        "attributes": {name: attributes(text[GRAPHS], name) for name in ("NPUGraph", "_GraphDispatchMode")},
        "attention": schema[1],
        "updated_by": update_keys(text[HANDLERS]),
    }
    TARGET.write_text(json.dumps(interface, indent=2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
