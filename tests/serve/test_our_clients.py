"""``graphmode bench serve`` and ``graphmode chat`` as clients of ``graphmode serve``."""

import pytest
from typer.testing import CliRunner

from graphmode.cli import app
from graphmode.observe.bench.serve import Load, serve
from graphmode.observe.bench.traffic import Lengths
from tests.serve.conftest import Served


@pytest.mark.parametrize("api", ["completions", "chat"])
def test_a_load_test_has_exact_prompts_and_counts_tokens_as_they_come(served: Served, api: str) -> None:
    served.engine.burst = 3
    sizes = {"prompt_tokens": Lengths("fixed", 64), "max_tokens": Lengths("fixed", 7)}
    [row] = serve(Load(base_url=served.url, waves=(3,), requests=6, warmup=1, api=api, **sizes))
    assert (row.details["answered"], row.details["errors"]) == (6, {})
    assert row.details["prompt_tokens"] == 64
    assert (row.details["output_tokens"], row.details["tokens_counted_by"]) == (6 * 7, "server")
    assert row.details["events_per_token"] <= 3 / 7, "an event has up to three tokens"
    assert (row.model, row.details["prompts"].endswith("(/tokenize)")) == ("bard", True)


def test_a_talk_is_answered_and_what_is_refused_is_told(served: Served) -> None:
    served.engine.answer = "Now is the winter of our discontent"
    talk = ["chat", "--base-url", served.url, "--temperature", "0"]
    printed = CliRunner().invoke(app, talk, input="Speak\n")
    assert (printed.exit_code, printed.stdout) == (0, served.engine.answer + "\n")
    assert served.engine.requests[-1].params.temperature == 0
    refused = CliRunner().invoke(app, [*talk, "--top-k", "999999999"], input="Speak\n")
    assert refused.exit_code in (0, 1)
    wrong = CliRunner().invoke(app, [*talk, "nobody"], input="Speak\n")
    assert (wrong.exit_code, "404" in wrong.output) == (1, True)
