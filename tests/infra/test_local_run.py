"""What `make run` makes of a Ray that is there already; tests/test_readme.py runs it for real."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra.processes import answers, free_port, wait_for

ROOT = Path(__file__).resolve().parents[2]
ADDRESSES = {"MLFLOW_TRACKING_URI": "http://tracking"}
SECRETS = {"MLFLOW_TRACKING_PASSWORD": "not-to-be-seen", "AWS_SECRET_ACCESS_KEY": "neither"}


@contextlib.contextmanager
def dashboard(token: str | None) -> Iterator[int]:
    """Answer as a Ray that asks for this token, or for none; yield the port."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            given = self.headers.get("Authorization")
            self.send_response(401 if token and given != f"Bearer {token}" else 200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


def local_run(folder: Path, port: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the script with a command ``ray`` that prints its arguments."""
    ray = folder / "bin" / "ray"
    ray.parent.mkdir()
    ray.write_text(f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv))\n")
    ray.chmod(0o755)
    path = os.pathsep.join(map(str, [ray.parent, Path(sys.executable).parent, os.environ["PATH"]]))
    own = {"PATH": path, "HOME": str(folder), "LORAT_HOME": str(folder / "home")}
    return subprocess.run(
        [ROOT / "infra" / "local_run.sh", *arguments],
        env=own | {"LORAT_RAY_PORT": str(port)} | ADDRESSES | SECRETS,
        capture_output=True,
        text=True,
        timeout=200,
    )


def make_token(folder: Path) -> str:
    (folder / ".ray").mkdir()
    (folder / ".ray" / "auth_token").write_text("of-this-user")
    return "of-this-user"


def test_an_address_with_a_secret_goes_nowhere(tmp_path: Path) -> None:
    ray = tmp_path / "ray"
    ray.write_text('#!/bin/sh\ntouch "$0.was-called"\n')
    ray.chmod(0o755)
    path = os.pathsep.join([str(tmp_path), str(Path(sys.executable).parent), os.environ["PATH"]])
    for options, variables in (
        (["--storage", "s3://KEY:PLANTED@bucket"], {}),
        ([], {"MLFLOW_TRACKING_URI": "http://me:PLANTED@127.0.0.1:1"}),
    ):
        result = subprocess.run(
            [ROOT / "infra" / "local_run.sh", *options],
            env={"PATH": path, "HOME": str(tmp_path), **variables},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert result.returncode == 2, result.stderr
        assert "was given with a password or key" in result.stderr
        assert "PLANTED" not in result.stdout + result.stderr
    assert not ray.with_name("ray.was-called").exists()


def test_addresses_go_along_but_no_passwords(tmp_path: Path) -> None:
    """Ray shows a job's environment, and a process its command line, to everybody."""
    with dashboard(make_token(tmp_path)) as port:
        result = local_run(tmp_path, port, "--variant", "N-112")
    assert result.returncode == 0, result.stderr
    hint, printed = result.stdout.splitlines()
    assert "make stop" in hint
    command = json.loads(printed)
    environment = json.loads(command[command.index("--runtime-env-json") + 1])
    assert environment == {"env_vars": {"LORAT_HOME": str(tmp_path / "home"), **ADDRESSES}}
    assert command[-4:] == ["python", "jobs/train.py", "--variant", "N-112"]
    assert not any(secret in printed for secret in [*SECRETS.values(), "of-this-user"])
    assert (tmp_path / ".ray" / "auth_token").stat().st_mode & 0o777 == 0o600


def test_a_ray_with_another_token_is_left_alone(tmp_path: Path) -> None:
    with dashboard("of-somebody-else") as port:
        result = local_run(tmp_path, port)
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: The Ray on port {port} asks for another token")
    token = tmp_path / ".ray" / "auth_token"  # made, and for this user only
    assert len(token.read_text()) == 64
    assert token.stat().st_mode & 0o777 == 0o600
    assert token.parent.stat().st_mode & 0o777 == 0o700


def test_a_ray_that_asks_for_no_token_is_used_and_its_danger_said(tmp_path: Path) -> None:
    with dashboard(None) as port:
        result = local_run(tmp_path, port)
    assert result.returncode == 0, result.stderr
    assert "asks for no token: every user of this machine" in result.stdout


@pytest.mark.skipif(os.getuid() != 0, reason="only root may start a process of another user")
def test_nothing_is_sent_to_a_server_of_another_user(tmp_path: Path) -> None:
    port = free_port()
    server = subprocess.Popen(
        ["python3", "-m", "http.server", "--bind", "127.0.0.1", str(port)],
        cwd="/", user="nobody", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env={"PATH": "/usr/local/bin:/usr/bin:/bin"},
    )  # fmt: skip
    try:
        wait_for("server", lambda: answers(f"http://127.0.0.1:{port}"), seconds=100)
        result = local_run(tmp_path, port)
    finally:
        server.terminate()
        server.wait()
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: Another user's server has port {port}")
