"""`vllm-saguaro watch URL --web`: a small server of one page, its readings and its rounds. The page only draws."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import socket
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from pathlib import Path
from socketserver import TCPServer
from typing import Any, Final
from urllib.parse import parse_qs, urlsplit

from vllm_saguaro.cli.history import History
from vllm_saguaro.cli.metrics_source import fetch
from vllm_saguaro.cli.timeline import timeline
from vllm_saguaro.cli.trace_tail import TraceFile
from vllm_saguaro.cli.usage import UsageError

LOOPBACK: Final = "127.0.0.1"
FILES: Final = {
    "/": ("watch.html", "text/html"),
    "/watch.css": ("watch.css", "text/css"),
    "/watch.js": ("watch.js", "text/javascript"),
    "/plot.js": ("plot.js", "text/javascript"),
    "/rounds.js": ("rounds.js", "text/javascript"),
    "/drawing.js": ("drawing.js", "text/javascript"),
}
"""All that is served beside JSON: paths, and the files of the folder `page` with their types."""
NO_TRACE: Final = (
    'no rounds without a trace: start the server with "trace": "FILE" in its speculative config, and this command with '
    "--trace FILE"
)
_POLICY: Final = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:"
_PATIENCE: Final = 30.0
_ROUNDS: Final = 24
_MOST_ROUNDS: Final = 200


def address(text: str) -> tuple[str, int]:
    """Host and port of `[HOST:]PORT`; port 0 is a free one. Raises UsageError for what is none."""
    host, _, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]") or LOOPBACK
    if not port.isdecimal() or len(port) > 5 or int(port) > 65535 or "/" in host:
        raise UsageError(f"watch: --web {text!r} is no address: write a port like 8080, or HOST:PORT")
    return host, int(port)


def serve(host: str, port: int, url: str, interval: float, trace: Path | None) -> int:
    """Serve the page until Ctrl-C, and ask the server every `interval` seconds. Raises UsageError for a port in use."""
    history = History(url, fetch)
    with page_server(host, port, history, interval, TraceFile(trace) if trace is not None else None) as page:
        beyond = "" if _is_loopback(host) else "; whoever reaches this address sees it"
        print(f"a page about {url}: {page.url} (Ctrl-C ends it{beyond})", flush=True)
        said = None
        while True:
            problem = history.ask()
            words = problem.words if problem is not None else f"{url} answers"
            if words != said:
                print(f"vllm-saguaro: {words}", file=sys.stderr, flush=True)
                said = words
            time.sleep(interval)


class PageServer(ThreadingHTTPServer):
    """The page at one address. Nothing that a browser does ends it or is printed."""

    daemon_threads = True

    def __init__(self, host: str, port: int, history: History, interval: float, trace: TraceFile | None) -> None:
        self.history, self.interval, self.trace = history, interval, trace
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.host = host
        super().__init__((host, port), _Handler)

    def server_bind(self) -> None:
        """As TCPServer does it: HTTPServer would ask a name server for this machine's name first."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = self.host, self.server_address[1]

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://{f'[{self.host}]' if ':' in self.host else self.host}:{self.server_port}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that went away is no error; of anything else one line is said."""
        error = sys.exc_info()[1]
        if not isinstance(error, (ConnectionError, TimeoutError)):
            print(f"vllm-saguaro: the page could not be served ({error!r})", file=sys.stderr)

    def knows(self, host: str | None) -> bool:
        """Whether a request is for this page: one on loopback is not for names that only lead there (DNS rebinding).

        Raises ValueError where the host is none.
        """
        if not _is_loopback(self.host):
            return True
        name = urlsplit(f"//{host or ''}").hostname or ""
        return name == self.host or _is_loopback(name)


@contextlib.contextmanager
def page_server(
    host: str, port: int, history: History, interval: float, trace: TraceFile | None
) -> Iterator[PageServer]:
    """A server of the page that answers while the context is open. Raises UsageError where it cannot be."""
    try:
        server = PageServer(host, port, history, interval, trace)
    except OSError as error:
        raise UsageError(
            f"watch: no page at {host}:{port} ({error.strerror or error}): write another, or --web alone for a free one"
        ) from error
    thread = threading.Thread(target=partial(server.serve_forever, poll_interval=0.05), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: PageServer
    timeout = _PATIENCE

    def do_GET(self) -> None:
        """Answer one of the few paths there are."""
        try:
            parts = urlsplit(self.path)
            asked = {key: values[-1] for key, values in parse_qs(parts.query).items()}
            known = self.server.knows(self.headers["Host"])
        except ValueError:  # a bracket that is not closed
            self._answer(HTTPStatus.BAD_REQUEST, "text/plain", b"this is no address")
            return
        if not known:
            self._answer(HTTPStatus.FORBIDDEN, "text/plain", b"this page is for this machine only")
        elif parts.path == "/readings.json":
            self._answer_json(readings(self.server, _number(asked.get("since"), 0), asked.get("run", "")))
        elif parts.path == "/rounds.json":
            last = min(_MOST_ROUNDS, max(1, _number(asked.get("last"), _ROUNDS)))
            self._answer_json(rounds(self.server.trace, last))
        elif parts.path in FILES:
            name, kind = FILES[parts.path]
            self._answer(HTTPStatus.OK, kind, resources.files(__package__).joinpath("page", name).read_bytes())
        else:
            self._answer(HTTPStatus.NOT_FOUND, "text/plain", b"there is no such page")

    def log_message(self, *_: object) -> None:
        """Say nothing: the terminal is the command's."""

    def _answer_json(self, value: dict[str, Any]) -> None:
        self._answer(HTTPStatus.OK, "application/json", json.dumps(value, allow_nan=False).encode())

    def _answer(self, status: HTTPStatus, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("Content-Security-Policy", _POLICY)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(body)


def readings(server: PageServer, since: int, run: str) -> dict[str, Any]:
    """What `/readings.json` says: the readings after number `since` of this `run`, and how often there is a new one."""
    return {**server.history.since(since, run), "interval": server.interval}


def rounds(trace: TraceFile | None, last: int) -> dict[str, Any]:
    """What `/rounds.json` says: the last rounds of the trace; or why there are none, in words."""
    if trace is None:
        return {"trace": None, "words": NO_TRACE, "timeline": None}
    tail = trace.read()
    found = timeline(tail, last)
    age = f" Written {max(0.0, time.time() - tail.written):.0f} s ago." if tail.written is not None else ""
    words = tail.problem if tail.problem is not None else found["words"] + age
    return {"trace": str(trace.path), "words": words, "timeline": found}


def _number(text: str | None, otherwise: int) -> int:
    return int(text) if text is not None and text.isdecimal() and len(text) < 16 else otherwise


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
