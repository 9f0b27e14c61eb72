"""docs/serving.md says what the server is."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from graphmode.serve.options import ServeOptions
from tests.serve.conftest import Served

PAGE = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()


def test_the_table_of_options_is_what_can_be_chosen() -> None:
    table = dict(re.findall(r"^\| `--([a-z-]+)` \| (?:`(.*?)`)? \|", PAGE, re.MULTILINE))
    defaults = {each.name: each.default for each in fields(ServeOptions)}
    assert table == {
        name.replace("_", "-"): "" if default in (None, ()) else str(default).replace("True", "true")
        for name, default in defaults.items()
    }


def test_every_route_is_named(served: Served) -> None:
    paths = served.http.get("/openapi.json").json()["paths"].keys() | {"/dashboard", "/dashboard/data", "/openapi.json"}
    assert not [path for path in paths if f"{path}`" not in PAGE]


@pytest.mark.parametrize("code", re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))
def test_a_block_of_python_runs(code: str, served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    for given, other in (("http://127.0.0.1:8000", served.url), ('model="bundled"', 'model="bard"')):
        assert given in code
        code = code.replace(given, other)
    exec(compile(code, "docs/serving.md", "exec"), {})
    assert "winter" in capsys.readouterr().out
