"""A real MLflow server for tests, and a proxy in front of it that misbehaves on demand."""

from __future__ import annotations

import contextlib
import http.server
import os
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from infra.processes import answers, free_port
from tests.mlflow_home import make_home
from tests.waiting import wait_until


class Server:
    """An ``mlflow server`` on the loopback address, over a SQLite file in ``folder``."""

    def __init__(self, folder: Path, port: int | None = None) -> None:
        self.folder = folder
        self.port = port or free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the server and wait until it answers."""
        make_home(self.folder)
        environment = {
            k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW", "PYTEST"))
        }
        # Its jobs are for language models, and take seven processes more.
        environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"
        command = [
            sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1",
            "--port", str(self.port), "--workers", "1",
            "--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db",
            "--artifacts-destination", str(self.folder / "artifacts"),
        ]  # fmt: skip
        with open(self.folder / "server.log", "ab") as output:
            self._process = subprocess.Popen(
                command,
                stdout=output,
                stderr=output,
                cwd=self.folder,
                env=environment,
                start_new_session=True,
            )
        wait_until(
            "answer of the MLflow server",
            lambda: answers(f"{self.uri}/health"),
            process=self._process,
            output=lambda: (self.folder / "server.log").read_text()[-3000:],
        )

    def kill(self) -> None:
        """End the server and its workers at once, as a power cut would."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, 9)
            self._process.wait()
            self._process = None


@contextlib.contextmanager
def running_server(folder: Path) -> Iterator[Server]:
    """Run a server for the length of a ``with`` block."""
    server = Server(folder)
    server.start()
    try:
        yield server
    finally:
        server.kill()


class Proxy:
    """Forward HTTP to a server, with a delay per call, or answer 500 instead."""

    def __init__(self, target: str) -> None:
        self.delay_s = 0.0
        self.broken = False
        self.num_calls = 0
        proxy = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _forward(self) -> None:
                proxy.num_calls += 1
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                time.sleep(proxy.delay_s)
                if proxy.broken:
                    self._answer(500, b"out of order")
                    return
                headers = {k: v for k, v in self.headers.items() if k.lower() != "host"}
                request = urllib.request.Request(
                    target + self.path, data=body or None, headers=headers, method=self.command
                )
                try:
                    with urllib.request.urlopen(request) as reply:
                        self._answer(reply.status, reply.read())
                except urllib.error.HTTPError as error:
                    with error:
                        self._answer(error.code, error.read())

            def _answer(self, status: int, body: bytes) -> None:
                with contextlib.suppress(ConnectionError):
                    self.send_response(status)
                    self.send_header("Content-Type", "application/json")
                    self.send_header("Content-Length", str(len(body)))
                    self.end_headers()
                    self.wfile.write(body)

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _forward

            def log_message(self, *arguments: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.uri = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
