"""Ten minutes of clients of every kind; the test suite has some seconds of it in ``test_faults_cli.py``."""

from pathlib import Path

import pytest

from tests.serve import soak
from tests.serve.process import serving


@pytest.mark.slow
def test_nothing_leaks_and_every_request_is_answered(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text(soak.KEY)
    with serving(tmp_path, *soak.OPTIONS, "--api-key-file", str(key), key=soak.KEY) as server:
        soak.check(server, seconds=600)
        assert server.end() == 0
