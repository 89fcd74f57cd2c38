"""A Ray of one node in processes of its own, for jobs that are given its address."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil

from infra.processes import free_port
from tests.waiting import wait_until


@contextlib.contextmanager
def ray_head(folder: Path) -> Iterator[str]:
    """Run it for the length of a ``with`` block; yield host:port of its control store.

    Args:
        folder: where its output goes.
    """
    address = f"127.0.0.1:{free_port()}"
    command = [
        str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--num-cpus=2",
        f"--port={address.rpartition(':')[2]}", "--node-ip-address=127.0.0.1",
        "--include-dashboard=false", "--disable-usage-stats",
        f"--ray-client-server-port={free_port()}", f"--dashboard-agent-listen-port={free_port()}",
    ]  # fmt: skip
    own = {
        # Else Ray would replace 127.0.0.1 by an address that others reach.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        # There is no other node that could take over at its end.
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
    }
    log = folder / "ray-head.log"
    with open(log, "wb") as output:
        head = subprocess.Popen(command, env=os.environ | own, stdout=output, stderr=output)
    try:
        wait_until(
            "Ray", lambda: "runtime started" in log.read_text(), process=head, output=log.read_text
        )
        yield address
    finally:
        family = psutil.Process(head.pid).children(recursive=True)
        head.terminate()
        _, alive = psutil.wait_procs([*family, psutil.Process(head.pid)], timeout=20)
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        head.wait()
