"""The served schema, and that the server keeps to it: no 5xx, and no status that it does not name."""

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from .conftest import Served

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


def test_every_route_documents_its_statuses(served: Served) -> None:
    paths = served.http.get("/openapi.json").json()["paths"]
    generating = paths["/v1/completions"]["post"]["responses"].keys()
    assert {"200", "400", "401", "404", "413", "429", "503", "504"} <= generating
    assert all("422" not in operation["responses"] for path in paths.values() for operation in path.values())


def break_it(served: Served, examples: int) -> None:
    schema = schemathesis.openapi.from_url(f"{served.url}/openapi.json")
    for found in schema.get_all_operations():
        operation = found.ok()
        # Where there is no body, nothing is wrong but what no route sees.
        for mode in GenerationMode if operation.body else (GenerationMode.POSITIVE,):

            @given(case=operation.as_strategy(generation_mode=mode))
            @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), database=None)
            def check(case: Case) -> None:
                served.engine.reset()
                case.call_and_validate(checks=CHECKS)

            check()


def test_no_request_breaks_the_server(served: Served) -> None:
    break_it(served, examples=2)


@pytest.mark.slow
def test_no_request_of_many_breaks_the_server(served: Served) -> None:
    break_it(served, examples=500)
