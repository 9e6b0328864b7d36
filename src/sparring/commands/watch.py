"""`sparring watch`: the report of a run that goes on, made anew for each request. Read-only, on this machine only."""

from __future__ import annotations

from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from sparring.errors import Refused
from sparring.report import render
from sparring.run.results import Results
from sparring.run.rundir import RunDir

HOST = "127.0.0.1"
EVERY_SECONDS = 15


class Handler(BaseHTTPRequestHandler):
    """Answers GET / with the report, and nothing else with anything."""

    run: RunDir
    allowed: frozenset[str]

    def do_GET(self) -> None:
        # a page elsewhere may point its own name at this address; its requests then carry that name
        if self.headers.get("Host") not in self.allowed:
            self.send_error(HTTPStatus.FORBIDDEN)
        elif self.path != "/":
            self.send_error(HTTPStatus.NOT_FOUND)
        else:
            page = render(self.run).encode()
            self.send_response(HTTPStatus.OK)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(page)))
            self.send_header("Refresh", str(EVERY_SECONDS))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(page)

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing: a request every few seconds is no news."""


def make_server(run: RunDir, port: int) -> ThreadingHTTPServer:
    """A server on the loopback address; port 0 takes a free one."""
    Results(run.root)  # refuses what is no run
    handler = type("RunHandler", (Handler,), {"run": run})
    try:
        server = ThreadingHTTPServer((HOST, port), handler)
    except OSError as error:
        raise Refused(f"--port {port}: {error.strerror}; give another one, or 0 for any") from error
    handler.allowed = frozenset(f"{name}:{server.server_port}" for name in (HOST, "localhost"))
    return server
