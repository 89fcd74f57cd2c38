"""What an overlay lacks is said before it is applied; its network lets through what it must."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from infra import kuberay_check
from infra.kuberay_check import Need, Part, Peer, lets_through
from tests.infra import overlays
from tests.infra.test_kuberay import FOLDER
from tests.infra.test_kuberay_components import COMPONENTS, with_components

ROOT = FOLDER.parents[1]
KEYS = {
    "lorat-credentials": (
        "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_USERNAME",
        "MLFLOW_TRACKING_PASSWORD",
    ),
    "lorat-services": ("POSTGRES_PASSWORD", "MLFLOW_FLASK_SERVER_SECRET_KEY"),
}  # fmt: skip
THERE: dict[tuple[str, str, str], Part] = {
    ("CustomResourceDefinition", "", "rayclusters.ray.io"): {},
    **{("Secret", "lorat", n): {"data": dict.fromkeys(k, "eA==")} for n, k in KEYS.items()},
}
"""A cluster with the operator and the Secrets of the page."""


def _parts(folder: Path, **settings: str) -> list[Part]:
    """Return an overlay as its users leave it, with their registry, and settings of theirs."""
    path = folder / "kustomization.yaml"
    path.write_text(path.read_text().replace("registry.example.com", "registry.corp.net"))
    parts = overlays.build(folder)
    for part in parts:
        if part["kind"] == "ConfigMap":
            part["data"].update(settings)
    return parts


def _report(parts: list[Part], there: dict[tuple[str, str, str], Part]) -> tuple[str, bool]:
    def find(need: Need) -> Part | None:
        return there.get((need.kind, need.namespace, need.name))

    lines, ready = kuberay_check.report(parts, find)
    return "\n".join(lines), ready


@pytest.mark.parametrize("overlay", ["small", "large"])
def test_an_overlay_as_it_comes_is_full_of_examples(overlay: str) -> None:
    text, ready = _report(overlays.build(FOLDER / overlay), THERE)
    assert not ready
    assert "registry.example.com/lorat-gpu:0.1.0 is still an example" in text
    assert ("MLFLOW_TRACKING_URI=https://mlflow.example.com is still" in text) == (
        overlay == "large"
    )


def test_the_small_overlay_lacks_nothing_with_the_secrets_of_the_page(tmp_path: Path) -> None:
    text, ready = _report(_parts(with_components(tmp_path, "services")), THERE)
    assert ready, text
    assert text.startswith("May be so: Secret lorat-registry in namespace lorat is named by")


def test_a_service_that_is_neither_made_nor_there_is_named(tmp_path: Path) -> None:
    parts = _parts(with_components(tmp_path), MLFLOW_TRACKING_URI="http://mlflow.lorat.svc:5000")
    text, ready = _report(parts, THERE)
    assert not ready
    assert (
        "Service mlflow in namespace lorat is named by MLFLOW_TRACKING_URI, and neither made here "
        "nor in the cluster: add the component ../services" in text
    )


@pytest.mark.parametrize(
    ("kind", "name", "user"),
    [
        ("Secret", "lorat-services", "Deployment mlflow and StatefulSet postgres"),
        ("CustomResourceDefinition", "rayclusters.ray.io", "RayCluster lorat"),
        ("LocalQueue", "lorat", "RayCluster lorat"),
    ],
)
def test_what_else_is_named_and_not_there_is_said(
    tmp_path: Path, kind: str, name: str, user: str
) -> None:
    parts = _parts(with_components(tmp_path, *COMPONENTS))
    there = THERE | {("LocalQueue", "lorat", "lorat"): {}}
    assert _report(parts, there)[1]
    text, ready = _report(parts, {k: v for k, v in there.items() if (k[0], k[2]) != (kind, name)})
    assert not ready
    assert re.search(rf"^{kind} {name}.* is named by {user}, and neither made", text, re.M), text


def test_names_of_accounts_and_classes_count_too(tmp_path: Path) -> None:
    """Here of parts that somebody took out of the manifests."""
    parts = _parts(with_components(tmp_path, "priority"))
    kept = [p for p in parts if p["kind"] not in ("PriorityClass", "ServiceAccount")]
    text, ready = _report(kept, THERE)
    assert not ready
    assert "ServiceAccount lorat in namespace lorat is named by RayCluster lorat" in text
    assert re.search(r"^PriorityClass lorat-worker is named by", text, re.MULTILINE)


def test_a_secret_without_a_key_is_said_but_the_jobs_may_have_none(tmp_path: Path) -> None:
    parts = _parts(with_components(tmp_path, "services"))
    poor = THERE | {("Secret", "lorat", "lorat-services"): {"data": {"POSTGRES_PASSWORD": "eA=="}}}
    text, ready = _report(parts, poor)
    assert not ready
    assert "lacks MLFLOW_FLASK_SERVER_SECRET_KEY, which Deployment mlflow" in text
    own = {
        "MLFLOW_TRACKING_URI": "https://mlflow.corp.net",
        "AWS_ENDPOINT_URL": "https://s3.corp.net",
    }
    parts = _parts(with_components(tmp_path / "own", "identity"), **own)
    text, ready = _report(parts, {next(iter(THERE)): {}})
    assert ready
    assert "May be so: Secret lorat-credentials" in text


@pytest.mark.parametrize(
    ("address", "problem"),
    [
        ("https://mlflow.corp.net", None),
        ("http://mlflow.lorat.svc:5000", None),
        ("http://mlflow:5000", None),
        ("http://mlflow.lorat.svc.cluster.local:5000", None),
        ("http://mlflow.lorat.svc", "Service mlflow has the ports [5000]"),
        ("http://mlflow.corp.net:5000", "no network policy lets Ray's pods go to port 5000"),
        ("http://mlflow.tools.svc:5000", "no network policy lets Ray's pods go to port 5000"),
        ("http://postgres:5432", "no network policy lets Ray's pods go to port 5432"),
        ("http://127.0.0.1:5000", "is the pod itself"),
        ("sqlite:////tmp/mlflow.db", "names no server"),
    ],
)
def test_an_address_that_is_no_use_or_out_of_reach_is_said(
    tmp_path: Path, address: str, problem: str | None
) -> None:
    there = THERE | {("Service", "tools", "mlflow"): {}}
    parts = _parts(with_components(tmp_path, "services", "identity"), MLFLOW_TRACKING_URI=address)
    text, ready = _report(parts, there)
    assert ready == (problem is None), text
    assert problem is None or problem in text


# The network, as the policies leave it.

LORAT = {"ray.io/cluster": "lorat"}
HEAD = Peer("lorat", LORAT | {"ray.io/node-type": "head"})
WORKER = Peer("lorat", LORAT | {"ray.io/node-type": "worker"})
OPERATOR = Peer("kuberay", {"app.kubernetes.io/component": "kuberay-operator"})
PROMETHEUS = Peer("monitoring", {"app.kubernetes.io/name": "prometheus"})
STRANGER = Peer("elsewhere", {"app": "web"})
BESIDE = Peer("lorat", {"app": "web"})
OUTSIDE = Peer()
MLFLOW, POSTGRES, STORAGE = (
    Peer("lorat", {"app.kubernetes.io/name": name}) for name in ("mlflow", "postgres", "storage")
)


@pytest.mark.parametrize(
    ("source", "target", "port"),
    [
        (WORKER, HEAD, 6379),  # control plane
        (WORKER, HEAD, 8265),  # dashboard
        (HEAD, WORKER, 41234),  # raylets and workers, on ports as they come
        (WORKER, WORKER, 29500),
        (OPERATOR, HEAD, 8265),
        (PROMETHEUS, HEAD, 8080),
        (PROMETHEUS, WORKER, 8080),
        (HEAD, OUTSIDE, 443),
        (HEAD, OUTSIDE, 6443),  # API server
        (WORKER, OUTSIDE, 443),
        (WORKER, OUTSIDE, 53),
        (MLFLOW, OUTSIDE, 53),
        (HEAD, MLFLOW, 5000),
        (WORKER, STORAGE, 7070),
        (MLFLOW, STORAGE, 7070),
        (MLFLOW, POSTGRES, 5432),
    ],
)
def test_what_has_to_connect_may(source: Peer, target: Peer, port: int) -> None:
    assert lets_through(overlays.build(FOLDER / "small"), source, target, port)


@pytest.mark.parametrize(
    ("source", "target", "port"),
    [
        (STRANGER, HEAD, 8265),
        (STRANGER, HEAD, 6379),
        (STRANGER, WORKER, 8080),
        (BESIDE, HEAD, 6379),
        (BESIDE, OUTSIDE, 443),
        (OPERATOR, HEAD, 6379),
        (PROMETHEUS, HEAD, 8265),
        (WORKER, OUTSIDE, 80),
        (WORKER, OUTSIDE, 6443),
        (WORKER, POSTGRES, 5432),
        (STRANGER, MLFLOW, 5000),
        (STRANGER, STORAGE, 7070),
        (MLFLOW, HEAD, 6379),
        (POSTGRES, OUTSIDE, 443),
    ],
)
def test_what_need_not_connect_may_not(source: Peer, target: Peer, port: int) -> None:
    assert not lets_through(overlays.build(FOLDER / "small"), source, target, port)


# The command, with the real kubectl and a server that answers as a Kubernetes does.


class Kubernetes(BaseHTTPRequestHandler):
    """As much of the API as ``kubectl get`` of an object by name needs."""

    ANSWERS: dict[str, Part] = {  # noqa: RUF012 - filled by the fixture
        "/api": {"kind": "APIVersions", "versions": ["v1"]},
        "/apis": {
            "kind": "APIGroupList", "apiVersion": "v1", "groups": [{
                "name": "apiextensions.k8s.io",
                "versions": [{"groupVersion": "apiextensions.k8s.io/v1", "version": "v1"}],
            }],
        },
        "/api/v1": {
            "kind": "APIResourceList", "groupVersion": "v1", "resources": [
                {"name": "secrets", "singularName": "secret", "kind": "Secret", "namespaced": True},
            ],
        },
        "/apis/apiextensions.k8s.io/v1": {
            "kind": "APIResourceList", "groupVersion": "apiextensions.k8s.io/v1", "resources": [
                {"name": "customresourcedefinitions", "singularName": "customresourcedefinition",
                 "kind": "CustomResourceDefinition", "namespaced": False},
            ],
        },
    }  # fmt: skip

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        found = self.ANSWERS.get(path)
        code, reason = (403, "Forbidden") if path.endswith("registry") else (404, "NotFound")
        refusal = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code}
        body = json.dumps(found or refusal | {"reason": reason, "message": "no"}).encode()
        self.send_response(200 if found else code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Environment in which kubectl finds a cluster with the operator and one Secret."""
    if not shutil.which("kubectl"):
        pytest.skip("kubectl is not here")
    secret = {"kind": "Secret", "apiVersion": "v1", "metadata": {"name": "lorat-credentials"}}
    crd = {"kind": "CustomResourceDefinition", "apiVersion": "apiextensions.k8s.io/v1"}
    name = "rayclusters.ray.io"
    Kubernetes.ANSWERS |= {
        "/api/v1/namespaces/lorat/secrets/lorat-credentials": secret
        | THERE["Secret", "lorat", "lorat-credentials"],
        f"/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{name}": crd
        | {"metadata": {"name": name}},
    }
    with ThreadingHTTPServer(("127.0.0.1", 0), Kubernetes) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        config = tmp_path / "config"
        address = f"http://127.0.0.1:{server.server_port}"
        config.write_text(
            json.dumps({
                "apiVersion": "v1", "kind": "Config", "current-context": "here",
                "clusters": [{"name": "here", "cluster": {"server": address}}],
                "contexts": [{"name": "here", "context": {"cluster": "here", "user": ""}}],
            })
        )  # fmt: skip
        yield {"KUBECONFIG": str(config), "HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
        server.shutdown()


def _command(folder: Path, environment: dict[str, str], *options: str) -> tuple[int, str]:
    command = [sys.executable, ROOT / "infra" / "kuberay_check.py", folder, *options]
    kubectl = Path(shutil.which("kubectl") or "").parent
    environment = environment | {"PATH": f"{kubectl}:{environment['PATH']}"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    return result.returncode, result.stdout + result.stderr


def test_the_command_asks_the_cluster(tmp_path: Path, cluster: dict[str, str]) -> None:
    folder = with_components(tmp_path, "services", "queue")
    _parts(folder)
    code, text = _command(folder, cluster)
    assert code == 1
    assert "Secret lorat-services in namespace lorat is named by" in text
    assert "LocalQueue lorat in namespace lorat is named by" in text  # a cluster without Kueue
    assert "Not known, since you may not ask for it: Secret lorat-registry" in text
    assert "lorat-credentials" not in text
    assert "rayclusters.ray.io" not in text
    assert text.endswith("Not ready to be applied.\n")


def test_the_command_says_that_no_cluster_answers(tmp_path: Path) -> None:
    if not shutil.which("kubectl"):
        pytest.skip("kubectl is not here")
    folder = with_components(tmp_path, "services")
    _parts(folder)
    nowhere = {"KUBECONFIG": str(tmp_path / "none"), "HOME": str(tmp_path), "PATH": "/usr/bin"}
    code, text = _command(folder, nowhere)
    assert code == 2
    assert text.startswith("error: kubectl get failed and said: ")
    assert "give --no-cluster" in text
    code, text = _command(folder, nowhere, "--no-cluster")
    assert code == 0
    assert "Must be there: Secret lorat-services in namespace lorat with MLFLOW_FLASK" in text
