"""A Ray cluster of several nodes on one machine, as processes with addresses of their own."""

from __future__ import annotations

import contextlib
import json
import secrets
import urllib.error
import urllib.request
from pathlib import Path

from processes import Processes, free_port

ROOT = Path(__file__).resolve().parents[1]
DISCOVERY = "prom_metrics_service_discovery.json"


def start_ray_node(processes: Processes, python: Path, name: str, *options: str) -> None:
    """Start one Ray node, a machine of its own as far as Ray can tell."""
    processes.start(
        name, python, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats",
        "--object-store-memory=200000000", "--min-worker-port=0", "--max-worker-port=0",
        f"--dashboard-agent-listen-port={free_port()}",
        f"--temp-dir={processes.folder}/{name}", *options,
    )  # fmt: skip


class Ray:
    """The Ray cluster: its nodes, and its head as clients see it."""

    def __init__(self, processes: Processes, python: Path) -> None:
        self.processes, self.python = processes, python
        dashboard = free_port()
        self.url = f"http://127.0.0.1:{dashboard}"
        # Ray replaces 127.0.0.1 by an address that other machines reach, but not 127.0.0.2.
        self.address = f"127.0.0.2:{free_port()}"
        self.addresses = {"head": "127.0.0.2"}
        processes.environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        start_ray_node(
            processes, python, "head", "--head", "--node-ip-address=127.0.0.2",
            f"--port={self.address.split(':')[1]}", "--num-cpus=0", "--include-dashboard=true",
            "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}",
            f"--ray-client-server-port={free_port()}",
        )  # fmt: skip

    def join(self, name: str) -> None:
        """Start a node with an address of its own; its role is the name up to the number."""
        self.addresses[name] = f"127.0.0.{2 + len(self.addresses)}"
        role = name.rstrip("0123456789")
        # A decode node offers no CPU but the resource "decode": no training worker goes there.
        offer = (
            ["--num-cpus=0", '--resources={"decode": 1}'] if role == "decode" else ["--num-cpus=1"]
        )
        start_ray_node(
            self.processes, self.python, name, f"--address={self.address}",
            f"--node-ip-address={self.addresses[name]}", f"--labels=lorat-role={role}", *offer,
        )  # fmt: skip

    def get(self, path: str) -> dict[str, object]:
        """Ask the head, with the token."""
        token = self.processes.environment["RAY_AUTH_TOKEN"]
        request = urllib.request.Request(
            self.url + path, headers={"Authorization": f"Bearer {token}"}
        )
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.load(answer)

    def alive(self) -> dict[str, str]:
        """Return the address of every living node with its id."""
        summary = self.get("/nodes?view=summary")["data"]["summary"]
        return {
            node["raylet"]["nodeManagerAddress"]: node["raylet"]["nodeId"]
            for node in summary
            if node["raylet"].get("state") == "ALIVE"
        }

    def nodes(self) -> int:
        """Count the nodes that are alive."""
        return len(self.alive())

    def actors(self, class_name: str) -> list[str]:
        """Return the names of the nodes on which the living actors of a class are."""
        names = {node_id: name for name, node_id in self._ids().items()}
        answer = self.get("/api/v0/actors?limit=1000&detail=1")
        return sorted(
            names[actor["node_id"]]
            for actor in answer["data"]["result"]["result"]
            if class_name in actor["class_name"] and actor["state"] == "ALIVE"
        )

    def _ids(self) -> dict[str, str]:
        alive = self.alive()
        return {name: alive[a] for name, a in self.addresses.items() if a in alive}

    def announce_end(self, name: str, seconds: int) -> None:
        """Announce that a node will end, as the pods of infra/kuberay do in their preStop."""
        self.processes.run(
            self.python, "-m", "ray.scripts.scripts", "drain-node", f"--address={self.address}",
            f"--node-id={self._ids()[name]}", "--reason-message=test",
            "--reason=DRAIN_NODE_REASON_PREEMPTION", f"--deadline-remaining-seconds={seconds}",
        )  # fmt: skip

    def submit(self, *entrypoint: str) -> str:
        """Submit a job from the repository; return its id."""
        job = f"small-{secrets.token_hex(4)}"
        self.processes.run(
            self.python, "-m", "ray.scripts.scripts", "job", "submit", f"--address={self.url}",
            f"--submission-id={job}", "--no-wait", f"--working-dir={ROOT}", "--", *entrypoint,
        )  # fmt: skip
        return job

    def status(self, job: str) -> str:
        """Return PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED."""
        return str(self.get(f"/api/jobs/{job}")["status"])

    def logs(self, job: str) -> str:
        """Return what a job printed so far."""
        return str(self.get(f"/api/jobs/{job}/logs")["logs"])

    def exported_metrics(self) -> set[str]:
        """Return the names that Prometheus would read; who does not answer has none.

        The head also lists ports of its own programs, which another Ray of this machine may have.
        """
        listed = json.loads((self.processes.folder / "head" / DISCOVERY).read_text())
        names = set()
        for target in {target for group in listed for target in group["targets"]}:
            with (
                contextlib.suppress(urllib.error.URLError),
                urllib.request.urlopen(f"http://{target}/metrics", timeout=10) as answer,
            ):
                names |= {line.split("{")[0] for line in answer.read().decode().splitlines()}
        return names
