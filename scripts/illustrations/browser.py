"""A headless Chromium, driven over the WebDriver protocol (https://www.w3.org/TR/webdriver2/) as plain HTTP."""

from __future__ import annotations

import base64
import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, TypeVar

import httpx

from scripts.soaking.server import free_port

Found = TypeVar("Found")

DRIVER: Final = "chromedriver"
BROWSER: Final = "chromium"
PACKAGES: Final = "chromium chromium-driver"
"""What Debian calls them."""
_START: Final = 60.0
_ANSWER: Final = 120.0
_SWITCHES: Final = (
    "--headless",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--no-proxy-server",
    "--hide-scrollbars",
    # Of the machine, only the pages on loopback.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost",
)


class BrowserError(RuntimeError):
    """The browser could not be started, or did not do what it was told."""


def is_installed() -> bool:
    """Whether there is a Chromium here, and its driver."""
    return shutil.which(DRIVER) is not None and shutil.which(BROWSER) is not None


class Browser:
    """One window. Made by `browser()`."""

    def __init__(self, client: httpx.Client, session: str) -> None:
        self._client = client
        self._session = session

    def open(self, url: str) -> None:
        """Go to a page and wait until it has loaded."""
        self._tell("url", {"url": url})

    def run(self, script: str, *words: Any) -> Any:
        """What the body of a function in JavaScript returns; `arguments` are the words."""
        return self._tell("execute/sync", {"script": script, "args": list(words)})

    def texts(self, selector: str) -> list[str]:
        """The texts of all elements that a selector of CSS finds."""
        found = self.run("return [...document.querySelectorAll(arguments[0])].map((e) => e.textContent)", selector)
        return list(map(str, found))

    def wait_for(self, what: Callable[[], Found], seconds: float = 60.0) -> Found:
        """Ask until the answer is true, and return it. Raises BrowserError when it does not come."""
        deadline = time.monotonic() + seconds
        while not (found := what()):
            if time.monotonic() > deadline:
                raise BrowserError(f"it did not come in {seconds:g} s; complaints: {self.complaints()}")
            time.sleep(0.1)
        return found

    def complaints(self) -> list[str]:
        """Warnings and errors in the browser's console since the last time."""
        return [f"{entry['level']} {entry['message']}" for entry in self._tell("se/log", {"type": "browser"})]

    def show_as(self, width: int, height: int, dark: bool = False) -> None:
        """The size of the page in CSS pixels, and the colours that its reader prefers."""
        self._develop(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 700
        )
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self._develop("Emulation.setEmulatedMedia", features=features)

    def picture(self, path: Path) -> None:
        """Write what the window shows as PNG."""
        path.write_bytes(base64.b64decode(self._client.get(f"/session/{self._session}/screenshot").json()["value"]))

    def _develop(self, command: str, **parameters: Any) -> Any:
        return self._tell("goog/cdp/execute", {"cmd": command, "params": parameters})

    def _tell(self, command: str, words: dict[str, Any]) -> Any:
        answer = self._client.post(f"/session/{self._session}/{command}", json=words).json()["value"]
        if isinstance(answer, dict) and "error" in answer:
            raise BrowserError(f"{command}: {answer['error']}: {answer.get('message', '')}")
        return answer


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    """A browser of its own, without any memory. Raises BrowserError where there is none, or it does not start."""
    if not is_installed():
        raise BrowserError(f"no {BROWSER} with its {DRIVER} here: on Debian, apt-get install {PACKAGES}")
    port = free_port()
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "wb") as nowhere:
        driver = subprocess.Popen([DRIVER, f"--port={port}"], stdout=nowhere, stderr=nowhere)
        try:
            # Without trust_env a proxy of the machine is not asked for loopback.
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=_ANSWER, trust_env=False) as client:
                _wait_until_up(client, driver)
                session = _new_session(client, folder)
                try:
                    yield Browser(client, session)
                finally:
                    client.delete(f"/session/{session}")
        finally:
            driver.terminate()
            driver.wait(30)


def _new_session(client: httpx.Client, folder: str) -> str:
    switches = [*_SWITCHES, f"--user-data-dir={folder}"]
    if os.geteuid() == 0:
        switches.append("--no-sandbox")  # it refuses to run as root with one
    wanted = {
        "browserName": "chrome",
        "goog:chromeOptions": {"binary": shutil.which(BROWSER), "args": switches},
        "goog:loggingPrefs": {"browser": "ALL"},
    }
    answer = client.post("/session", json={"capabilities": {"alwaysMatch": wanted}}).json()["value"]
    if "sessionId" not in answer:
        raise BrowserError(f"{BROWSER} does not start: {answer.get('message', answer)}")
    return str(answer["sessionId"])


def _wait_until_up(client: httpx.Client, driver: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _START
    while driver.poll() is None and time.monotonic() < deadline:
        try:
            if client.get("/status").json()["value"]["ready"]:
                return
        except httpx.TransportError:
            time.sleep(0.05)
    raise BrowserError(f"{DRIVER} does not come up")
