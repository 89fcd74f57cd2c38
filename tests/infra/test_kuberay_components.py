"""The components of an overlay: services, spot nodes, priorities, a queue, an identity."""

from __future__ import annotations

import configparser
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from tests.infra import overlays
from tests.infra.test_kuberay import FOLDER, KUBERNETES, RayCluster, RayJob, RayService

ROOT = FOLDER.parents[1]
COMPONENTS = ("services", "serve", "priority", "spot", "queue", "identity")
GPU_LABELS = {
    "nvidia.com/gpu.present", "cloud.google.com/gke-accelerator", "k8s.amazonaws.com/accelerator",
    "karpenter.k8s.aws/instance-gpu-count", "eks.amazonaws.com/instance-gpu-count",
    "kubernetes.azure.com/accelerator",
}  # fmt: skip
"""What providers and NVIDIA's discovery put on nodes with GPUs."""
SPOT = {
    "gke": {"cloud.google.com/gke-spot": "true"},
    "eks": {"eks.amazonaws.com/capacityType": "SPOT"},
    "karpenter": {"karpenter.sh/capacity-type": "spot"},
    "aks": {"kubernetes.azure.com/scalesetpriority": "spot"},
    "own": {"lorat/spot": "true"},
}
"""What spot nodes are labelled with, by provider."""
GPU = {
    "gke": {"cloud.google.com/gke-accelerator": "nvidia-l4"},
    "eks": {"k8s.amazonaws.com/accelerator": "nvidia-l4"},
    "karpenter": {"karpenter.k8s.aws/instance-gpu-count": "1"},
    "aks": {"kubernetes.azure.com/accelerator": "nvidia"},
    "own": {"nvidia.com/gpu.present": "true"},
}
"""And those with GPUs."""


def with_components(folder: Path, *components: str, overlay: str = "small") -> Path:
    """Copy the manifests into ``folder`` and return the overlay, with these components alone."""
    copied = folder / "kuberay"
    shutil.copytree(FOLDER, copied)
    path = copied / overlay / "kustomization.yaml"
    content = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump(content | {"components": [f"../{c}" for c in components]}))
    return path.parent


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """The small overlay with every component."""
    return with_components(tmp_path, *COMPONENTS)


def _pods(parts: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return what is in the pods: of head, decode and train, and of each service."""
    pods = {}
    for part in parts:
        if part["kind"] in ("StatefulSet", "Deployment"):
            pods[part["metadata"]["name"]] = part["spec"]["template"]["spec"]
        elif part["kind"] == "RayCluster":
            pods["head"] = part["spec"]["headGroupSpec"]["template"]["spec"]
            for group in part["spec"]["workerGroupSpecs"]:
                pods[group["groupName"]] = group["template"]["spec"]
        elif part["kind"] == "RayService":
            cluster = part["spec"]["rayClusterConfig"]
            pods["serve-head"] = cluster["headGroupSpec"]["template"]["spec"]
            for group in cluster["workerGroupSpecs"]:
                pods[group["groupName"]] = group["template"]["spec"]
    return pods


def _goes_to(pod: dict[str, Any], labels: dict[str, str]) -> bool:
    """Tell whether the scheduler may put a pod on a node with these labels."""

    def holds(expression: dict[str, Any]) -> bool:
        value = labels.get(expression["key"])
        match expression["operator"]:
            case "Exists":
                return value is not None
            case "DoesNotExist":
                return value is None
            case "In":
                return value in expression["values"]
            case "NotIn":
                return value not in expression["values"]
        raise AssertionError(expression)

    affinity = pod.get("affinity", {}).get("nodeAffinity", {})
    if not affinity:
        return True
    terms = affinity["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    return any(all(map(holds, term["matchExpressions"])) for term in terms)


def test_kustomize_takes_every_component(whole: Path) -> None:
    if not shutil.which("kubectl"):
        pytest.skip("kubectl is not here")
    printed = subprocess.run(
        ["kubectl", "kustomize", whole], capture_output=True, text=True, check=True
    ).stdout
    theirs = {overlays.identity(part): part for part in yaml.safe_load_all(printed)}
    assert theirs == {overlays.identity(part): part for part in overlays.build(whole)}


def test_everything_together_is_strictly_valid(whole: Path) -> None:
    kinds = {"RayCluster": RayCluster, "RayJob": RayJob, "RayService": RayService}
    for part in overlays.build(whole):
        if part["kind"] in kinds:
            kinds[part["kind"]].model_validate(part)
        else:
            kubernetes_validate.validate(part, KUBERNETES, strict=True)
    for pod in _pods(overlays.build(whole)).values():
        whole_pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": pod}
        kubernetes_validate.validate(whole_pod, KUBERNETES, strict=True)


@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize("overlay", ["small", "large"])
def test_a_component_goes_with_each_overlay_alone(
    tmp_path: Path, component: str, overlay: str
) -> None:
    assert overlays.build(with_components(tmp_path, component, overlay=overlay))


@pytest.mark.parametrize("provider", sorted(SPOT))
def test_spot_pools_are_selected_and_tolerated(whole: Path, provider: str) -> None:
    pods = _pods(overlays.build(whole))
    for group in ("decode", "train"):
        assert _goes_to(pods[group], SPOT[provider])
        assert not _goes_to(pods[group], {}), "a node that is no spot node"
        tolerated = {(t["key"], t.get("value")) for t in pods[group]["tolerations"]}
        taints = {(k, v) for k, v in SPOT[provider].items() if provider in ("gke", "aks")}
        assert taints <= tolerated
        assert ("lorat/spot", None) in tolerated
    assert _goes_to(pods["train"], SPOT[provider] | GPU[provider])


@pytest.mark.parametrize("spot", [False, True])
@pytest.mark.parametrize("provider", sorted(GPU))
def test_nothing_but_training_is_on_nodes_with_gpus(
    tmp_path: Path, provider: str, spot: bool
) -> None:
    components = ["services", *(["spot"] if spot else [])]
    pods = _pods(overlays.build(with_components(tmp_path, *components)))
    node = (SPOT[provider] if spot else {}) | GPU[provider]
    assert {name for name, pod in pods.items() if _goes_to(pod, node)} == {"train"}


@pytest.mark.parametrize("provider", sorted(SPOT))
def test_what_all_jobs_need_is_not_on_spot_nodes(whole: Path, provider: str) -> None:
    pods = _pods(overlays.build(whole))
    for name in set(pods) - {"decode", "train"}:
        assert not _goes_to(pods[name], SPOT[provider]), name
        assert _goes_to(pods[name], {}), name


def test_only_training_tolerates_the_taints_of_gpu_pools(whole: Path) -> None:
    taints = {"nvidia.com/gpu", "sku"}
    for name, pod in _pods(overlays.build(whole)).items():
        tolerated = {toleration["key"] for toleration in pod.get("tolerations", [])}
        assert tolerated & taints == (taints if name == "train" else set())


def test_every_label_of_gpu_nodes_is_thought_of_everywhere(tmp_path: Path) -> None:
    pods = _pods(overlays.build(with_components(tmp_path, "services")))
    for name in set(pods) - {"train"}:
        for label in GPU_LABELS:
            assert not _goes_to(pods[name], {label: "1"}), (name, label)


def test_workers_are_put_out_before_what_all_jobs_need(whole: Path) -> None:
    parts = overlays.build(whole)
    classes = {p["metadata"]["name"]: p for p in parts if p["kind"] == "PriorityClass"}
    values = {name: classes[pod["priorityClassName"]] for name, pod in _pods(parts).items()}
    workers = [values.pop("decode"), values.pop("train")]
    assert {"head", "mlflow", "postgres", "storage", "serve-head", "serve"} == set(values)
    assert max(w["value"] for w in workers) < min(v["value"] for v in values.values())
    assert all(worker["preemptionPolicy"] == "Never" for worker in workers)
    assert all("namespace" not in c["metadata"] for c in classes.values())


def test_the_cluster_waits_in_the_queue_and_its_jobs_do_not(whole: Path) -> None:
    """Kueue refuses an autoscaler without the annotation, and leaves jobs with a cluster alone."""
    for part in overlays.build(whole):
        labels = part["metadata"].get("labels", {})
        if part["kind"] == "RayCluster":
            assert labels == {"kueue.x-k8s.io/queue-name": "lorat"}
            annotations = part["metadata"]["annotations"]
            assert annotations == {"kueue.x-k8s.io/elastic-job": "true"}
        else:
            assert "kueue.x-k8s.io/queue-name" not in labels


# The services.


def _services() -> list[dict[str, Any]]:
    return overlays.build(FOLDER / "small")


def test_what_the_settings_name_is_made() -> None:
    """As the small overlay has it: the services, their ports, and MLflow's own name."""
    parts = _services()
    (settings,) = [part["data"] for part in parts if part["kind"] == "ConfigMap"]
    made = {
        f"http://{p['metadata']['name']}.{p['metadata']['namespace']}.svc:{port['port']}"
        for p in parts
        if p["kind"] == "Service"
        for port in p["spec"]["ports"]
    }
    assert {settings["MLFLOW_TRACKING_URI"], settings["AWS_ENDPOINT_URL"]} <= made
    (server,) = _pods(parts)["mlflow"]["containers"]
    hosts = next(w for w in server["command"] if w.startswith("--allowed-hosts=")).split("=")[1]
    assert settings["MLFLOW_TRACKING_URI"].removeprefix("http://") in hosts.split(",")
    bucket = settings["LORAT_STORAGE"].removeprefix("s3://").partition("/")[0]
    assert f"--artifacts-destination=s3://{bucket}/mlflow" in server["command"]
    (maker,) = _pods(parts)["mlflow"]["initContainers"]
    assert f'create_bucket(Bucket="{bucket}")' in maker["command"][-1]


def test_every_service_selects_pods_that_listen_on_its_port() -> None:
    parts = _services()
    templates = {
        p["metadata"]["name"]: p["spec"]
        for p in parts
        if p["kind"] in ("StatefulSet", "Deployment")
    }
    services = [p for p in parts if p["kind"] == "Service"]
    assert {s["metadata"]["name"] for s in services} == set(templates)
    for service in services:
        spec = templates[service["metadata"]["name"]]
        labels = spec["template"]["metadata"]["labels"]
        assert service["spec"]["selector"] == labels == spec["selector"]["matchLabels"]
        (container,) = spec["template"]["spec"]["containers"]
        (port,) = container["ports"]
        assert [port["containerPort"]] == [p["port"] for p in service["spec"]["ports"]]


def test_every_pod_meets_the_restricted_standard(whole: Path) -> None:
    """Kubernetes' Pod Security Standard; the operator's own containers copy these contexts."""
    parts = overlays.build(whole)
    (cluster,) = [part for part in parts if part["kind"] == "RayCluster"]
    contexts = [cluster["spec"]["autoscalerOptions"]["securityContext"]]
    for pod in _pods(parts).values():
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
        assert pod["securityContext"]["runAsUser"] > 0
        volumes = {kind for volume in pod.get("volumes", []) for kind in set(volume) - {"name"}}
        assert volumes <= {"emptyDir"}
        for container in [*pod["containers"], *pod.get("initContainers", [])]:
            contexts.append(container["securityContext"])
            assert set(container["resources"]) == {"requests", "limits"}
            assert not any("hostPort" in port for port in container.get("ports", []))
    for context in contexts:
        assert context["runAsNonRoot"] is True
        assert context["allowPrivilegeEscalation"] is False
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}


def test_the_stores_keep_what_they_have() -> None:
    parts = _services()
    kept = {
        p["metadata"]["name"]: {c["metadata"]["name"] for c in p["spec"]["volumeClaimTemplates"]}
        for p in parts
        if p["kind"] == "StatefulSet"
    }
    assert kept == {"postgres": {"data"}, "storage": {"data"}}
    for name in kept:
        (container,) = _pods(parts)[name]["containers"]
        assert {mount["name"] for mount in container["volumeMounts"]} == {"data"}


def test_passwords_of_the_services_are_not_the_jobs(whole: Path) -> None:
    """Ray's pods have every key of lorat-credentials in their environment, and no other Secret."""
    parts = overlays.build(whole)
    pods = _pods(parts)
    for group in ("head", "decode", "train"):
        assert "lorat-services" not in str(pods[group])
    asked = set(re.findall(r"'name': '(lorat-\w+)', 'key': '(\w+)'", str(parts)))
    page = (ROOT / "infra" / "README.md").read_text()
    for command in page.split("create secret generic ")[1:]:
        name, options = re.split(r"\s", re.split("\n\n|```", command)[0], maxsplit=1)
        asked -= {(name, key) for key in re.findall(r"--from-literal=(\w+)=", options)}
    assert not asked, "keys that the page has nobody fill in"


def test_images_of_the_services_are_those_of_the_compose_stack() -> None:
    compose = yaml.safe_load((ROOT / "infra" / "compose" / "compose.yaml").read_text())
    images = {name: service["image"] for name, service in compose["services"].items()}
    pods = _pods(_services())
    for name in ("postgres", "storage"):
        assert pods[name]["containers"][0]["image"] == images[name]
    tag = images["mlflow"].removeprefix("lorat-mlflow")
    assert all(
        c["image"] == f"registry.example.com/lorat-mlflow{tag}"
        for c in [*pods["mlflow"]["containers"], *pods["mlflow"]["initContainers"]]
    )


def test_mlflows_start_writes_its_settings_and_passes_its_options_on(tmp_path: Path) -> None:
    """Run by a real shell; what comes after is ``mlflow server`` as in the compose stack."""
    (tmp_path / "mlflow").write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {tmp_path}/given\n')
    (tmp_path / "mlflow").chmod(0o755)
    (server,) = _pods(_services())["mlflow"]["containers"]
    uri = "postgresql+psycopg2://mlflow:chosen@postgres:5432/mlflow"
    subprocess.run(
        server["command"],
        check=True,
        env={
            "PATH": f"{tmp_path}:/usr/bin:/bin",
            "MLFLOW_BACKEND_STORE_URI": uri,
            "MLFLOW_AUTH_CONFIG_PATH": str(tmp_path / "auth.ini"),
        },
    )
    assert (tmp_path / "auth.ini").stat().st_mode & 0o077 == 0
    settings = configparser.ConfigParser()
    settings.read(tmp_path / "auth.ini")
    assert dict(settings["mlflow"]) == {"database_uri": uri, "default_permission": "READ"}
    compose = yaml.safe_load((ROOT / "infra" / "compose" / "compose.yaml").read_text())
    there = ["mlflow", *(tmp_path / "given").read_text().split()]
    theirs = compose["services"]["mlflow"]["command"]
    name = "--allowed-hosts="  # the one that differs
    assert [w for w in there if name not in w] == [w for w in theirs if name not in w]


def test_the_service_is_one_that_ray_serve_takes(
    whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray._common.utils import import_attr
    from ray.serve.schema import ServeDeploySchema

    from lorat_platform.serving.application import TOKEN, build
    from lorat_platform.serving.connections import BOUNDED, bound_connections

    (service,) = [part for part in overlays.build(whole) if part["kind"] == "RayService"]
    config = ServeDeploySchema.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"]))
    (application,) = config.applications
    assert application.import_path == f"{build.__module__}:{build.__name__}"
    monkeypatch.setenv(TOKEN, "a-token-that-nobody-guesses")
    deployment = build(application.args)._bound_deployment
    (group,) = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    needed = deployment.ray_actor_options["num_cpus"]
    assert needed <= float(group["resources"]["CPU"])
    for pod in (service["spec"]["rayClusterConfig"]["headGroupSpec"], group):
        assert pod["template"]["metadata"]["labels"] == {"lorat-part": "serve"}
        (container,) = pod["template"]["spec"]["containers"]
        assert {each["name"]: each["value"] for each in container["env"]} == BOUNDED
    (path,) = BOUNDED.values()
    assert import_attr(path) is bound_connections
