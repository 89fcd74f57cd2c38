"""Workers import both packages, and the platform folder never hides the standard library's."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Mapping
from pathlib import Path

import pytest
import ray

from lorat.errors import UserError
from lorat_platform import cluster
from lorat_platform.cluster import addresses
from tests.open_doors import Watch

pytestmark = pytest.mark.processes(minutes=0.5)

ROOT = Path(__file__).resolve().parents[3]


def run(code: str, cwd: Path, environment: Mapping[str, str] = os.environ) -> str:
    """Run code in a fresh process that finds the packages only where it is told to."""
    environment = dict(environment) | {"PYTHONPATH": f"{ROOT}:{ROOT / 'platform'}"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_task_under_working_dir_has_the_standard_librarys_platform(tmp_path: Path) -> None:
    code = f"""
import ray
ray.init(address="local", num_cpus=1, _node_ip_address="127.0.0.1", log_to_driver=False, include_dashboard=False,
         runtime_env={{"working_dir": {str(ROOT)!r},
                       "excludes": [".git", ".venv", "tests/golden", "*.safetensors"]}})
@ray.remote(num_cpus=0)
def look():
    import os, platform, sys
    shipped = os.path.isdir("platform") and os.path.isdir("lorat")
    return shipped, platform.system(), platform.__file__ == {sysconfig.get_path("stdlib")!r} + "/platform.py"
print(*ray.get(look.remote()))
"""  # noqa: E501
    loopback = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    assert run(code, tmp_path, os.environ | loopback) == "True Linux True"


def test_other_nodes_are_sent_both_packages() -> None:
    shipped = cluster.runtime_env(embedded=False)["py_modules"]
    assert sorted(Path(folder).name for folder in shipped) == ["lorat", "lorat_platform"]
    assert all((Path(folder) / "__init__.py").exists() for folder in shipped)


@pytest.mark.parametrize("there", ["nobody", "silence", "a web server", "who closes"])
def test_an_address_without_a_cluster_is_said_at_once(
    there: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(addresses, "ANSWER_S", 0.5)
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray would wait for minutes"))
    answers = {"a web server": b"HTTP/1.0 400 Bad Request\r\n\r\n", "who closes": b""}

    def answer() -> None:
        connection, _ = door.accept()
        with connection:
            connection.recv(100)
            connection.sendall(answers[there])

    with socket.create_server(("127.0.0.1", 0)) as door:
        port = door.getsockname()[1]
        if there == "nobody":
            door.close()
        if there in answers:
            threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(UserError, match=rf"No Ray cluster answers at 127\.0\.0\.1:{port} \("):
            cluster.connect(f"127.0.0.1:{port}")


@pytest.mark.parametrize("address", ["http://127.0.0.1:8265", "127.0.0.1", "no.such.host:6379"])
def test_an_address_that_is_none_of_a_cluster_is_said(address: str) -> None:
    with pytest.raises(UserError, match=r"dashboard|No Ray cluster answers"):
        cluster.connect(address)


def test_a_folder_that_is_too_long_for_sockets_is_said_in_a_sentence(tmp_path: Path) -> None:
    folder = tmp_path / ("n" * 80)
    folder.mkdir()
    code = """if True:
        from lorat.errors import UserError
        from lorat_platform import cluster
        try:
            cluster.connect()
        except UserError as error:
            print(error)
    """
    for name in ("TMPDIR", "RAY_TMPDIR"):
        environment = {k: v for k, v in os.environ.items() if k != "RAY_TMPDIR"}
        said = run(code, tmp_path, environment | {name: str(folder), "RAY_ADDRESS": "local"})
        assert said.startswith(f"The folder for temporary files {folder} has ")
        assert said.endswith("set RAY_TMPDIR to a shorter one, such as /tmp.")


@pytest.mark.parametrize("job", ["train", "benchmark", "ingest", "evaluate"])
def test_a_job_finds_the_packages_beside_it_from_any_folder(job: str, tmp_path: Path) -> None:
    # -S leaves out the installed project, PYTHONPATH brings the dependencies back
    environment = os.environ | {"PYTHONPATH": sysconfig.get_path("purelib")}
    done = subprocess.run(
        [sys.executable, "-S", str(ROOT / "jobs" / f"{job}.py"), "--help"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert "--" in done.stdout


def test_an_embedded_ray_is_for_its_own_process(tmp_path: Path, watch: Watch) -> None:
    """Ray is imported first, as some jobs do, by a user who has set nothing."""
    program = """
import contextlib, http.client, os, socket, subprocess, sys, threading, time
import urllib.error, urllib.request
import psutil, ray
from lorat.errors import UserError
from lorat_platform import cluster
from lorat_platform.cluster import sockets

with socket.create_server(("0.0.0.0", 0)) as door:
    try:
        cluster.connect("local", num_cpus=1)
    except UserError as error:
        print("refused", f"on 0.0.0.0:{door.getsockname()[1]}" in str(error))

with cluster.connected("local", num_cpus=1) as found:
    assert found.embedded and found.cpus == 1, found

    @ray.remote(num_cpus=0)
    def look():
        import os, platform
        import lorat, lorat_platform
        return platform.system(), os.environ["OMP_WAIT_POLICY"]

    print(*ray.get(look.remote()))
    print("reachable", sockets.reachable())
    answers, end = set(), time.monotonic() + 60
    while not answers & {200, 401} and time.monotonic() < end:
        for process in psutil.Process().children(recursive=True):
            for listener in process.net_connections("tcp"):
                url = f"http://127.0.0.1:{listener.laddr.port}/api/job_agent/jobs/"
                request = urllib.request.Request(url, b'{"entrypoint": "true"}')
                with contextlib.suppress(OSError, http.client.HTTPException):  # it speaks gRPC
                    try:
                        answers.add(urllib.request.urlopen(request, timeout=10).status)
                    except urllib.error.HTTPError as error:
                        answers.add(error.code)
    print("without the token", *answers & {200, 401})
    secret = os.environ["RAY_AUTH_TOKEN"]
    place = found.address
    stranger = '''
import sys, time
from lorat_platform import cluster
began = time.monotonic()
try:
    cluster.connect(sys.argv[1])
except Exception as error:
    print(str(error).partition("or is ")[2], time.monotonic() - began < 15)
'''
    other = os.environ | {"RAY_AUTH_TOKEN": "f" * 64}
    done = subprocess.run([sys.executable, "-c", stranger, place], capture_output=True, env=other)
    print("stranger", done.stdout.decode().strip(), done.stderr.decode())
    told = [" ".join(p.cmdline()) for p in psutil.Process().children(recursive=True)]
    print("told to everybody", any(secret in command for command in told))
def call():
    try:
        ray.put(0)
    except Exception as error:
        print("late call", type(error).__name__, ray.is_initialized())
late = threading.Thread(target=call)
late.start()
late.join()
print("kept", os.environ.get("RAY_AUTH_TOKEN"), os.path.exists(os.path.expanduser("~/.ray")))
"""
    environment = {name: v for name, v in os.environ.items() if not name.startswith("RAY_")}
    printed = run(program, tmp_path, environment | {"HOME": str(tmp_path)})
    assert printed.splitlines() == [
        "refused True",
        "Linux PASSIVE",
        "reachable []",
        "without the token 401",
        "stranger missing here; set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or "
        "RAY_AUTH_TOKEN_PATH. True ",
        "told to everybody False",
        "late call RaySystemError False",
        "kept None False",
    ]
    (door,) = watch.take()  # as every test would have failed
    assert "on 0.0.0.0:" in door
