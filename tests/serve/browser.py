"""A page in headless Chromium, driven by the DevTools protocol."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from websockets.sync.client import ClientConnection, connect


class Page:
    """A page of the browser.

    Attributes:
        events: what the browser told of, as ``(method, parameters)``.
        password: what it gives a server that asks for one.
        answers: what requests get in place of the server's answer, as JSON, by the path of their address.
    """

    def __init__(self, socket: ClientConnection) -> None:
        self._socket = socket
        self._number = 0
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.password = ""
        self.answers: dict[str, Any] = {}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call("Fetch.enable", handleAuthRequests=True)

    def call(self, method: str, **parameters: Any) -> Any:
        """Send a command and return its result."""
        number = self._send(method, parameters)
        while True:
            message = json.loads(self._socket.recv(timeout=30))
            if message.get("id") == number:
                assert "error" not in message, f"{method}: {message['error']}"
                return message["result"]
            self._take(message)

    def _send(self, method: str, parameters: dict[str, Any]) -> int:
        self._number += 1
        self._socket.send(json.dumps({"id": self._number, "method": method, "params": parameters}))
        return self._number

    def _take(self, message: dict[str, Any]) -> None:
        """Note an event; requests wait for what is done with them."""
        method, parameters = message.get("method"), message.get("params", {})
        if method is None:  # the answer to one of these
            return
        if method == "Fetch.requestPaused":
            request = {"requestId": parameters["requestId"]}
            if (path := urllib.parse.urlsplit(parameters["request"]["url"]).path) in self.answers:
                body = base64.b64encode(json.dumps(self.answers[path]).encode()).decode()
                self._send("Fetch.fulfillRequest", request | {"responseCode": 200, "body": body})
            else:
                self._send("Fetch.continueRequest", request)
        elif method == "Fetch.authRequired":
            answer = {"response": "ProvideCredentials", "username": "me", "password": self.password}
            self._send(
                "Fetch.continueWithAuth", {"requestId": parameters["requestId"], "authChallengeResponse": answer}
            )
        else:
            self.events.append((method, parameters))

    def open(self, url: str) -> None:
        """Go to a page and wait until it has loaded."""
        self.events.clear()
        number = self._send("Page.navigate", {"url": url})
        while not any(method == "Page.loadEventFired" for method, _ in self.events):
            message = json.loads(self._socket.recv(timeout=30))
            if message.get("id") == number:
                assert "errorText" not in message["result"], message
            self._take(message)

    def run(self, script: str) -> Any:
        """Return the value of an expression of JavaScript; a promise is waited for."""
        found = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def until(self, condition: str, seconds: float = 60) -> Any:
        """Wait until an expression is true; return its value."""
        end = time.monotonic() + seconds
        while not (value := self.run(condition)):
            assert time.monotonic() < end, (
                f"{condition} is not so after {seconds} s: {self.run('document.body.innerText')}"
            )
            self.run("new Promise((resolve) => setTimeout(resolve, 50))")
        return value

    def size(self, width: int, height: int, *, dark: bool = False) -> None:
        """Set the size of the window, and which colours are preferred."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        self.call(
            "Emulation.setEmulatedMedia",
            features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}],
        )

    def screenshot(self, path: Path) -> None:
        """Save what is seen as a PNG."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def requested(self) -> list[str]:
        """The addresses that were asked for since the page was opened."""
        return [event["request"]["url"] for method, event in self.events if method == "Network.requestWillBeSent"]

    def complaints(self) -> list[str]:
        """What the console has of errors and warnings, and exceptions, since the page was opened."""
        found = []
        for method, event in self.events:
            if method == "Runtime.exceptionThrown":
                found.append(event["exceptionDetails"]["text"])
            elif method == "Runtime.consoleAPICalled" and event["type"] in ("error", "warning", "assert"):
                found.append(str(event["args"]))
            elif method == "Log.entryAdded" and event["entry"]["level"] in ("error", "warning"):
                found.append(f"{event['entry']['text']} {event['entry'].get('url', '')}")
        return found


def find_browser() -> str:
    """The browser's path. `make test` installs it where it can, and CI fails without."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            return path
    pytest.skip("no Chromium is installed: apt-get install chromium")


@contextmanager
def open_browser(folder: Path) -> Iterator[Page]:
    """Run a browser with one page; ``folder`` is for what it keeps."""
    command = [
        *(find_browser(), "--headless=new", "--remote-debugging-port=0", f"--user-data-dir={folder}"),
        *("--no-first-run", "--disable-gpu", "--disable-dev-shm-usage", "--disable-extensions", "--mute-audio"),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars"),
        *(["--no-sandbox"] if os.geteuid() == 0 else []),
        "about:blank",
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        address = _address(process)
        with urllib.request.urlopen(f"http://{address}/json/list", timeout=10) as answer:
            pages = [each for each in json.load(answer) if each["type"] == "page"]
        with connect(pages[0]["webSocketDebuggerUrl"], max_size=None) as socket:
            yield Page(socket)
    finally:
        process.terminate()
        process.wait(10)


def _address(process: subprocess.Popen[str]) -> str:
    """Wait for the address that the browser writes to its log; let the rest of it go."""
    assert process.stderr is not None
    log = []
    for line in process.stderr:
        log.append(line)
        if found := re.search(r"listening on ws://([\w.:]+)/", line):
            threading.Thread(target=process.stderr.read, daemon=True).start()
            return found[1]
    raise AssertionError("the browser has ended:\n" + "".join(log))
