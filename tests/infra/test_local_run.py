"""What `make run` hands to a Ray that is there already; tests/test_readme.py runs it for real."""

from __future__ import annotations

import functools
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


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
    (tmp_path / "api").mkdir()
    (tmp_path / "api" / "version").write_text("{}")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    ray = tmp_path / "bin" / "ray"
    ray.parent.mkdir()
    ray.write_text(f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv))\n")
    ray.chmod(0o755)
    addresses = {"MLFLOW_TRACKING_URI": "http://tracking", "LORAT_HOME": str(tmp_path / "home")}
    secrets = {"MLFLOW_TRACKING_PASSWORD": "not-to-be-seen", "AWS_SECRET_ACCESS_KEY": "neither"}
    folders = [ray.parent, Path(sys.executable).parent, os.environ["PATH"]]
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        result = subprocess.run(
            [ROOT / "infra" / "local_run.sh", "--variant", "N-112"],
            env={
                "PATH": os.pathsep.join(map(str, folders)),
                "HOME": str(tmp_path),
                "LORAT_RAY_PORT": str(server.server_address[1]),
                **addresses,
                **secrets,
            },
            capture_output=True,
            text=True,
            timeout=60,
        )
        server.shutdown()
    assert result.returncode == 0, result.stderr
    hint, printed = result.stdout.splitlines()
    assert "make stop" in hint
    command = json.loads(printed)
    environment = json.loads(command[command.index("--runtime-env-json") + 1])
    assert environment == {"env_vars": addresses}
    assert command[-4:] == ["python", "jobs/train.py", "--variant", "N-112"]
    assert not any(secret in printed for secret in secrets.values())
