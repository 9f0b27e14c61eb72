"""The dashboard in headless Chromium, of a server that runs the bundled model.

``python -m tests.serve.test_dashboard_in_browser`` makes its picture in the documentation again.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from graphmode.engine.config import EngineOptions
from graphmode.engine.reading import load_text
from graphmode.graph import Reason
from graphmode.models.bundled_model import bundled_model
from graphmode.serve.app import create_app
from graphmode.serve.client import EngineClient
from graphmode.serve.metrics import Metrics
from graphmode.serve.options import ServeOptions
from graphmode.serve.routes.dashboard import data_of
from graphmode.serve.run import listen
from graphmode.serve.security import ApiKeys
from tests.serve.browser import Page, find_browser, open_browser
from tests.serve.fakes import FakeEngine, snapshot

KEY = "a-key-for-tests"
PROMPTS = ("ROMEO.\n", "JULIET.\n", "KING RICHARD.\nNow is", "First Citizen:\n", "HAMLET.\nTo be", "MACBETH.\n")


@contextmanager
def serving(**options: Any) -> Iterator[str]:
    """Run a server of the bundled model in a thread, its engine in a process; yield its address once it is ready."""
    engine_options = EngineOptions(**options)
    with asyncio.Runner() as runner:
        engine = EngineClient(bundled_model(), engine_options)
        text = load_text(bundled_model(), engine_options)
        app = create_app(engine, text, ServeOptions(served_model_name=["bundled"]), ApiKeys([KEY]))
        server = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_config=None, access_log=False))
        listener = listen("127.0.0.1", 0)
        ready = threading.Event()

        async def serve() -> None:
            await engine.start()
            try:
                await engine.wait_ready()
                asyncio.get_running_loop().call_soon(ready.set)
                await server.serve([listener])
            finally:
                ready.set()
                await engine.close(0)

        thread = threading.Thread(target=runner.run, args=(serve(),))
        thread.start()
        try:
            ready.wait()
            assert engine.state.phase == "ready", engine.state
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@contextmanager
def load(address: str, clients: int) -> Iterator[None]:
    """Let so many clients ask for one answer after the other."""
    ended = threading.Event()
    failures: list[BaseException] = []

    def ask(number: int) -> None:
        with httpx.Client(base_url=address, headers={"Authorization": f"Bearer {KEY}"}, timeout=60) as client:
            while not ended.is_set():
                number += 1
                body = {"prompt": PROMPTS[number % len(PROMPTS)], "max_tokens": 16 + 40 * number % 100, "seed": number}
                try:
                    client.post("/v1/completions", json=body).raise_for_status()
                except httpx.HTTPError as error:
                    failures.append(error)
                    return

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        for thread in threads:
            thread.join()
    assert not failures


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    find_browser()  # skips before anything is loaded
    with serving(graph_sizes=(2, 8, 32), max_num_seqs=8, max_num_batched_tokens=32) as address:
        yield address


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with open_browser(tmp_path_factory.mktemp("browser")) as page:
        page.password = KEY
        yield page


@pytest.fixture
def page(server: str, browser: Page) -> Iterator[Page]:
    """The dashboard; at the end it must have asked nobody else for anything, and have nothing to complain of."""
    browser.size(1320, 1000)
    browser.answers.clear()
    browser.open(f"{server}/dashboard")
    yield browser
    asked = browser.requested()
    assert len(asked) >= 5
    assert all(url.startswith(f"{server}/") for url in asked), asked
    assert browser.complaints() == []


def text(page: Page, name: str) -> str:
    return str(page.run(f"document.getElementById('{name}').textContent"))


def shown(page: Page, name: str, condition: str) -> str:
    """Wait until what an element shows, ``text``, fulfils a condition; return it."""
    page.until(f"((text) => {condition})(document.getElementById('{name}').textContent)")
    return text(page, name)


def told(**engine: Any) -> dict[str, Any]:
    """What /dashboard/data says of an engine that is so, with data of every kind."""
    metrics = Metrics("a model", FakeEngine())
    metrics.engine_snapshot(snapshot(10))
    data = data_of(metrics, None, 0, 0)
    data["engine"] |= engine
    return data


def tell(page: Page, data: dict[str, Any]) -> None:
    """Let the page have these data in place of the server's, at once and from now on."""
    page.answers["/dashboard/data"] = data
    page.run("document.dispatchEvent(new Event('visibilitychange'))")


def test_numbers_move_while_requests_run(page: Page, server: str) -> None:
    shown(page, "state-text", "text === 'Ready'")
    assert text(page, "tile-running") == "0"
    assert "graphs held" in text(page, "strip-text")
    assert page.run("document.querySelectorAll('#graphs g').length") >= 3, "all captured sizes are there"
    with load(server, 6):
        shown(page, "tile-running", "Number(text) > 0")
        first = shown(page, "tile-output", "Number(text.replace(',', '')) > 0")
        shown(page, "tile-output", f"Number(text.replace(',', '')) > 0 && text !== '{first}'")
        page.until("document.querySelector('.column-bar.lit') !== null")
        page.until("document.querySelector('#chart-throughput .series') !== null")
        page.until("document.querySelector('#chart-steps .series') !== null")
    assert text(page, "tile-hits") == "100"
    assert "None: a graph served every step." in text(page, "misses")
    assert float(text(page, "tile-first").replace(",", "")) > 0
    assert "reached their length" in text(page, "requests")
    assert "tokens/s" in page.run("document.title")
    shown(page, "tile-running", "text === '0'")


def test_a_prompt_is_answered_as_a_stream(page: Page) -> None:
    page.run(
        """globalThis.lengths = new Set();
        new MutationObserver(() => lengths.add(document.getElementById('answer').textContent.length))
            .observe(document.getElementById('answer'), {subtree: true, childList: true, characterData: true});
        document.getElementById('text').value = 'ROMEO.';
        document.getElementById('tokens').value = '24';
        document.getElementById('send').click()"""
    )
    status = shown(page, "answer-status", "text.includes('tokens/s')")
    assert status.startswith("24 tokens, first after ")
    assert text(page, "answer").startswith("ROMEO.")
    assert page.run("lengths.size") > 3, "it came in pieces"
    assert text(page, "send") == "Send"


def test_a_prompt_can_be_said_in_a_chat(page: Page) -> None:
    page.run("document.getElementById('kind').value = 'chat'; document.getElementById('tokens').value = '8'")
    page.run("document.getElementById('text').value = 'Who goes there?'; document.getElementById('send').click()")
    assert shown(page, "answer-status", "text.includes('tokens/s')").startswith("8 tokens, ")
    assert text(page, "answer").startswith("Who goes there?\n\n")
    assert len(text(page, "answer")) > len("Who goes there?\n\n")


def test_a_prompt_can_be_stopped(page: Page) -> None:
    page.run("document.getElementById('tokens').value = '900'; document.getElementById('send').click()")
    shown(page, "answer-status", "text.startsWith('First token')")
    assert text(page, "send") == "Stop"
    page.run("document.getElementById('send').click()")
    shown(page, "answer-status", "text.endsWith('stopped')")
    assert text(page, "send") == "Send"


def test_a_refusal_is_shown(server: str, browser: Page) -> None:
    browser.open(f"{server}/dashboard")
    browser.run("document.getElementById('text').value = 'Words. '.repeat(2000)")
    browser.run("document.getElementById('send').click()")
    assert "max_model_len" in shown(browser, "answer-status", "text.startsWith('the prompt')")


HOSTILE = "<img src=x onerror='hacked = 1'><script>hacked = 1</script>" + "x" * 300


def test_texts_stay_texts_and_long_ones_fit(page: Page) -> None:
    """Whatever a model, a cause or a prompt holds; in a window of any width."""
    data = told(phase="dead", cause=f"cause {HOSTILE}")
    data["model"] = dict.fromkeys(("name", "device", "dtype", "graph_mode"), HOSTILE) | {"buckets": {HOSTILE: [8]}}
    data["window"]["misses"] = {HOSTILE: 3}
    data["totals"] |= {"ended": {HOSTILE: 1}, "failed": {HOSTILE: 1}, "rejected": {HOSTILE: 1}}
    data["totals"]["capture_failures"] = [{"graph": HOSTILE, "message": HOSTILE}]
    tell(page, data)
    shown(page, "strip-text", "text.startsWith('cause <img')")
    page.run(f"document.getElementById('text').value = {HOSTILE!r}; document.getElementById('tokens').value = '4'")
    page.run("document.getElementById('send').click()")
    shown(page, "answer-status", "text.includes('tokens')")
    assert text(page, "answer").startswith(HOSTILE)
    for name in ("model", "misses", "requests", "facts", "failures"):
        shown(page, name, f"text.includes({HOSTILE!r})")
    assert page.run("document.querySelectorAll('script').length") == 1
    assert page.run("[...document.images].every((image) => image.src.endsWith('/dashboard/icon.svg'))")
    assert page.run("globalThis.hacked") is None
    for width in (320, 360, 700, 1100, 1320):
        page.size(width, 800)
        page.until(f"innerWidth === {width} && document.documentElement.scrollWidth <= {width}")


PHASES = {
    "starting": ({"captured": 1}, "Starting", "Capturing graphs: 1 of 3"),
    "stalled": ({"cause": "no step for 10 s"}, "Stalled", "no step for 10 s"),
    "dead": ({"cause": "killed by signal 9"}, "Down", "killed by signal 9"),
    "stopping": ({}, "Shutting down", "No new requests are taken; those that run end."),
}


def test_the_page_says_how_the_engine_is_and_nothing_jumps(page: Page) -> None:
    shown(page, "state-text", "text === 'Ready'")
    places = "[...document.querySelectorAll('.tile, .card, .chart')].map((each) => each.getBoundingClientRect().top)"
    before = page.run(places)[:10]
    for phase, (more, word, sentence) in PHASES.items():
        tell(page, told(phase=phase, **more))
        shown(page, "state-text", f"text === '{word}'")
        assert text(page, "strip-text") == sentence
        assert page.run(places)[:10] == before, phase
    tell(page, told(phase="ready", restarts=2))
    assert "started again 2 times" in shown(page, "strip-text", "text.includes('started again')")


def test_reasons_for_eager_steps_are_explained(page: Page) -> None:
    data = told(phase="ready")
    data["window"] |= {"steps": 100, "misses": {str(reason): number for number, reason in enumerate(Reason, 1)}}
    tell(page, data)
    page.until(f"document.querySelectorAll('#misses li').length === {len(Reason)}")
    assert not [reason for reason in Reason if str(reason) in text(page, "misses")], "all are in words"


CONTRASTS = """(() => {
    const channel = (value) => (value /= 255) <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
    const light = (colour) => {
        const [red, green, blue] = colour.match(/[\\d.]+/g).map(Number);
        return 0.2126 * channel(red) + 0.7152 * channel(green) + 0.0722 * channel(blue);
    };
    const ground = (element) => {
        for (; element; element = element.parentElement) {
            const colour = getComputedStyle(element).backgroundColor;
            if (!colour.startsWith('rgba(')) return colour;
        }
        return 'rgb(255, 255, 255)';
    };
    const found = [];
    for (const element of document.body.querySelectorAll('*')) {
        const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
        if (!own || !element.checkVisibility()) continue;
        const style = getComputedStyle(element);
        const [one, other] = [light(element instanceof SVGElement ? style.fill : style.color), light(ground(element))];
        const contrast = (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
        if (contrast < 4.5) found.push(`${element.tagName} ${element.textContent}: ${contrast.toFixed(2)}`);
    }
    return found;
})()"""


@pytest.mark.parametrize("dark", [False, True])
def test_everything_can_be_read_and_has_a_name(page: Page, dark: bool) -> None:
    page.size(1320, 1000, dark=dark)
    shown(page, "state-text", "text === 'Ready'")
    light = page.run("getComputedStyle(document.documentElement).backgroundColor")
    assert (sum(map(int, light[4:-1].split(","))) < 384) == dark
    assert page.run(CONTRASTS) == []
    nameless = "[...document.querySelectorAll('input, select, textarea, button, progress, meter, svg, section')]"
    nameless += ".filter((each) => !each.labels?.length && !each.ariaLabel && !each.getAttribute('aria-labelledby')"
    nameless += " && !each.textContent.trim()).map((each) => each.id || each.tagName)"
    assert page.run(nameless) == []


def make_picture(folder: Path, path: Path) -> None:
    """Save the picture of a server that has been under load for two minutes, more of it at the end."""
    with (
        serving(max_num_seqs=32, max_num_batched_tokens=256, max_model_len=512) as server,
        open_browser(folder) as page,
        load(server, 6),
    ):
        page.password = KEY
        page.size(1320, 1190)
        page.open(f"{server}/dashboard")
        for clients, seconds in ((1, 20), (14, 25), (4, 15), (20, 30), (10, 15)):
            with load(server, clients):
                page.run(f"new Promise((resolve) => setTimeout(resolve, {1000 * seconds}))")
        page.run("document.getElementById('text').value = 'ROMEO.'; document.getElementById('send').click()")
        shown(page, "answer-status", "text.includes('tokens/s')")
        page.screenshot(path)


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as temporary:
        make_picture(Path(temporary), Path(__file__).parents[2] / "docs" / "dashboard.png")
