"""The manifests: built, read strictly, and consistent with themselves."""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import os
import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any, Literal

import kubernetes_validate
import pytest
import yaml
from pydantic import Field, model_validator

from infra import sizing
from lorat.config.training import TrainConfig, resolve
from lorat.config.variants import VARIANTS, get_variant
from lorat.data.shards.windows import WindowLaw
from tests.infra import overlays
from tests.infra.overlays import Strict
from tests.jobs.in_process import run_in_process

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "infra" / "kuberay"
OVERLAYS = ("small", "large")
KUBERNETES = "1.34"
"""Version whose own schema the pods are checked against."""


# The KubeRay API, version ray.io/v1 of KubeRay 1.7, as far as it is used.


class AuthOptions(Strict):
    mode: Literal["token"]
    secretName: str | None = None


class AutoscalerOptions(Strict):
    version: Literal["v2"]
    idleTimeoutSeconds: int = Field(gt=0)
    upscalingMode: Literal["Default", "Aggressive", "Conservative"] | None = None
    resources: dict[str, Any] | None = None
    securityContext: dict[str, Any]


class Group(Strict):
    rayStartParams: dict[str, str]
    labels: dict[str, str] = Field(default_factory=dict)
    resources: dict[str, str] = Field(default_factory=dict)
    template: dict[str, Any]

    @model_validator(mode="after")
    def _resources_in_one_place(self) -> Group:
        """The operator's validateRayGroupResources and validateRayGroupLabels."""
        twice = {"num-cpus", "num-gpus", "memory", "resources"} & set(self.rayStartParams)
        assert not (self.resources and twice), (
            f"resource fields should not be set in both rayStartParams ({twice}) and resources"
        )
        assert "labels" not in self.rayStartParams
        return self


class HeadGroup(Group):
    serviceType: Literal["ClusterIP"]


class WorkerGroup(Group):
    groupName: str = Field(pattern="^[a-z0-9-]+$")
    replicas: int = Field(ge=0)
    minReplicas: int = Field(ge=0)
    maxReplicas: int = Field(ge=1)
    idleTimeoutSeconds: int | None = Field(None, gt=0)
    numOfHosts: Literal[1] = 1

    @model_validator(mode="after")
    def _in_order(self) -> WorkerGroup:
        assert self.minReplicas <= self.replicas <= self.maxReplicas
        return self


class RayClusterSpec(Strict):
    rayVersion: str
    authOptions: AuthOptions
    enableInTreeAutoscaling: Literal[True]
    autoscalerOptions: AutoscalerOptions
    headGroupSpec: HeadGroup
    workerGroupSpecs: list[WorkerGroup]


class RayJobSpec(Strict):
    """A job on a cluster that is there; the operator then refuses to shut it down or to retry."""

    clusterSelector: dict[Literal["ray.io/cluster"], str]
    submissionMode: Literal["HTTPMode", "K8sJobMode"]
    entrypoint: str
    activeDeadlineSeconds: int | None = Field(None, gt=0)


class Metadata(Strict):
    name: str
    namespace: str
    labels: dict[str, str] = Field(default_factory=dict)
    annotations: dict[str, str] = Field(default_factory=dict)


class RayCluster(Strict):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayCluster"]
    metadata: Metadata
    spec: RayClusterSpec


class RayJob(Strict):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayJob"]
    metadata: Metadata
    spec: RayJobSpec


class RayServiceSpec(Strict):
    upgradeStrategy: dict[Literal["type"], Literal["NewCluster", "None"]]
    serveConfigV2: str
    rayClusterConfig: RayClusterSpec


class RayService(Strict):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayService"]
    metadata: Metadata
    spec: RayServiceSpec


def _built(overlay: str) -> list[dict[str, Any]]:
    return overlays.build(FOLDER / overlay)


def _cluster(overlay: str) -> RayCluster:
    (cluster,) = [part for part in _built(overlay) if part["kind"] == "RayCluster"]
    return RayCluster.model_validate(cluster)


def _pods(cluster: RayCluster) -> dict[str, dict[str, Any]]:
    """Return the pod templates by group: head, decode, train."""
    groups = {"head": cluster.spec.headGroupSpec.template}
    return groups | {group.groupName: group.template for group in cluster.spec.workerGroupSpecs}


def _bytes(quantity: str) -> int:
    units = {"Gi": 1 << 30, "Mi": 1 << 20, "": 1}
    number, unit = re.fullmatch(r"(\d+)(\w*)", quantity).groups()  # type: ignore[union-attr]
    return int(number) * units[unit]


def test_the_base_is_strictly_valid() -> None:
    for name, kind in (("cluster", RayCluster), ("train", RayJob), ("tune", RayJob)):
        part = yaml.safe_load((FOLDER / "base" / f"{name}.yaml").read_text())
        part["metadata"]["namespace"] = "lorat"
        kind.model_validate(part)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_is_what_kustomize_makes_of_it(overlay: str) -> None:
    if shutil.which("kustomize"):
        command = ["kustomize", "build"]
    elif shutil.which("kubectl"):
        command = ["kubectl", "kustomize"]
    else:
        pytest.skip("neither kustomize nor kubectl is here")
    printed = subprocess.run(
        [*command, FOLDER / overlay], capture_output=True, text=True, check=True
    ).stdout
    theirs = {overlays.identity(part): part for part in yaml.safe_load_all(printed)}
    assert theirs == {overlays.identity(part): part for part in _built(overlay)}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_is_strictly_valid(overlay: str) -> None:
    parts = _built(overlay)
    kinds: dict[str, type[Strict]] = {"RayCluster": RayCluster, "RayJob": RayJob}
    for part in parts:
        if part["kind"] in kinds:
            kinds[part["kind"]].model_validate(part)
        else:
            kubernetes_validate.validate(part, KUBERNETES, strict=True)
    assert [part["kind"] for part in parts if part["apiVersion"] == "ray.io/v1"] == [
        "RayCluster", "RayJob", "RayJob",
    ]  # fmt: skip


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_pods_are_valid_for_kubernetes(overlay: str) -> None:
    for group, template in _pods(_cluster(overlay)).items():
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": group}} | template
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_manifests_satisfy_the_operators_own_schema(overlay: str) -> None:
    """With LORAT_KUBERAY_CRDS=FOLDER of the operator's ray.io_*.yaml files."""
    folder = os.environ.get("LORAT_KUBERAY_CRDS")
    if not folder:
        pytest.skip("LORAT_KUBERAY_CRDS names no folder with the operator's CRD files")
    jsonschema = pytest.importorskip("jsonschema")
    for part in _built(overlay):
        if part["apiVersion"] != "ray.io/v1":
            continue
        crd = yaml.safe_load((Path(folder) / f"ray.io_{part['kind'].lower()}s.yaml").read_text())
        (version,) = [v for v in crd["spec"]["versions"] if v["name"] == "v1"]
        jsonschema.validate(part, version["schema"]["openAPIV3Schema"])


def test_resources_in_two_places_are_refused() -> None:
    cluster = yaml.safe_load((FOLDER / "base" / "cluster.yaml").read_text())
    group = cluster["spec"]["workerGroupSpecs"][0]
    WorkerGroup.model_validate(group)
    group["rayStartParams"]["num-cpus"] = "15"
    with pytest.raises(ValueError, match="both rayStartParams"):
        WorkerGroup.model_validate(group)


def _ray_resources(cluster: RayCluster) -> dict[str, dict[str, int]]:
    """Return what Ray's autoscaler takes each group's nodes to have."""
    from ray.autoscaler._private.kuberay import autoscaling_config

    spec = cluster.spec.model_dump()
    types = autoscaling_config._generate_available_node_types_from_ray_cr_spec(spec)
    return {name: node_type["resources"] for name, node_type in types.items()}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_head_runs_no_work_and_the_groups_differ(overlay: str) -> None:
    cluster = _cluster(overlay)
    have = _ray_resources(cluster)
    assert list(have) == ["headgroup", "decode", "train"]
    assert have["headgroup"]["CPU"] == have["headgroup"]["GPU"] == 0
    decode, train = cluster.spec.workerGroupSpecs
    assert "GPU" not in have["decode"]
    assert "decode" not in have["train"]
    asked = {
        group.groupName: group.template["spec"]["containers"][0]["resources"]["requests"]
        for group in (decode, train)
    }
    assert int(asked["train"]["nvidia.com/gpu"]) == have["train"]["GPU"] > 0
    assert all(int(asked[name]["cpu"]) == have[name]["CPU"] for name in asked)
    # One thread more than CPUs at most: a machine's last core is for Kubernetes and for Ray.
    assert have["decode"]["CPU"] <= 4 * have["decode"]["decode"] <= have["decode"]["CPU"] + 1
    assert train.minReplicas >= 1, "a search plans with the GPUs that are there"
    assert decode.minReplicas >= 1, "a training plans with the decode nodes that are there"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_shared_memory_holds_the_object_store(overlay: str) -> None:
    cluster = _cluster(overlay)
    groups = {"head": cluster.spec.headGroupSpec} | {
        group.groupName: group for group in cluster.spec.workerGroupSpecs
    }
    for name, group in groups.items():
        spec = group.template["spec"]
        (container,) = spec["containers"]
        (volume,) = [v for v in spec["volumes"] if v["name"] == "shm"]
        assert volume["emptyDir"]["medium"] == "Memory"
        assert {"name": "shm", "mountPath": "/dev/shm"} in container["volumeMounts"]
        size = _bytes(volume["emptyDir"]["sizeLimit"])
        assert int(group.rayStartParams["object-store-memory"]) < size, name
        # Shared memory counts as the container's own.
        assert 2 * size <= _bytes(container["resources"]["limits"]["memory"]), name


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_preempted_node_tells_ray_before_it_goes(overlay: str) -> None:
    from ray.scripts.scripts import cli
    from ray.train.v2._internal.constants import PREEMPTION_POLL_INTERVAL_S_ENV_VAR

    (settings,) = [part["data"] for part in _built(overlay) if part["kind"] == "ConfigMap"]
    assert float(settings[PREEMPTION_POLL_INTERVAL_S_ENV_VAR]) <= 1
    for group, template in _pods(_cluster(overlay)).items():
        if group == "head":
            continue
        spec = template["spec"]
        command = spec["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][-1]
        announce, wait = command.split("&&")
        words = shlex.split(announce)
        assert words[:2] == ["ray", "drain-node"]
        parameters = cli.commands["drain-node"].make_context("drain-node", words[2:]).params
        assert parameters["reason"] == "DRAIN_NODE_REASON_PREEMPTION"
        deadline = parameters["deadline_remaining_seconds"]
        # The command itself takes some seconds; GKE and Azure take the node after 30 s.
        assert int(wait.split()[1]) == deadline
        assert deadline + 10 <= spec["terminationGracePeriodSeconds"] < 30


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_container_is_confined_and_takes_secrets_by_reference(overlay: str) -> None:
    cluster = _cluster(overlay)
    for group, template in _pods(cluster).items():
        spec = template["spec"]
        assert spec["securityContext"]["runAsUser"] == 1000
        if group != "head":  # the head's autoscaler talks to Kubernetes
            assert spec["automountServiceAccountToken"] is False
        for container in spec["containers"]:
            context = container["securityContext"]
            assert context["runAsNonRoot"] is True
            assert context["allowPrivilegeEscalation"] is False
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert "env" not in container
            assert container["envFrom"] == [
                {"configMapRef": {"name": "lorat-settings"}},
                {"secretRef": {"name": "lorat-credentials", "optional": True}},
            ]
    assert "Secret" not in {part["kind"] for part in _built(overlay)}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_pod_is_an_account_that_pulls_and_says_what_disk_it_takes(overlay: str) -> None:
    accounts = {
        part["metadata"]["name"]: part
        for part in _built(overlay)
        if part["kind"] == "ServiceAccount"
    }
    for template in _pods(_cluster(overlay)).values():
        account = accounts[template["spec"]["serviceAccountName"]]
        assert account["imagePullSecrets"]
        (container,) = template["spec"]["containers"]
        assert _bytes(container["resources"]["requests"]["ephemeral-storage"]) >= 20 << 30


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_nodes_may_take_long_to_come(overlay: str) -> None:
    """A GPU node, and the pull of its image: 20 minutes in all are nothing unusual."""
    from ray.autoscaler._private.constants import RAY_AUTOSCALER_PENDING_NODE_IDLE_TIMEOUT_S
    from ray.autoscaler.v2.instance_manager.config import InstanceReconcileConfig
    from ray.train.v2._internal.constants import WORKER_GROUP_START_TIMEOUT_S_ENV_VAR

    from lorat_platform.search.trial.group import START_ATTEMPTS
    from lorat_platform.training.driver import CONTROLLER_FAILURES

    (settings,) = [part["data"] for part in _built(overlay) if part["kind"] == "ConfigMap"]
    attempt = float(settings[WORKER_GROUP_START_TIMEOUT_S_ENV_VAR])
    assert attempt >= 900
    patience = attempt * (1 + min(CONTROLLER_FAILURES, START_ATTEMPTS))
    assert patience >= 3600
    # Nobody deletes the pod between two attempts, nor before the last one.
    assert RAY_AUTOSCALER_PENDING_NODE_IDLE_TIMEOUT_S < 0
    assert InstanceReconcileConfig().allocate_status_timeout_s >= patience


@pytest.mark.parametrize(("announced", "code", "waited"), [(True, 0, True), (False, 1, False)])
def test_a_pod_whose_end_ray_does_not_hear_of_goes_at_once(
    tmp_path: Path, announced: bool, code: int, waited: bool
) -> None:
    """And fails its hook, of which Kubernetes makes an event; run by a real shell."""
    for name, status in (("ray", 0 if announced else 1), ("sleep", 0)):
        command = tmp_path / name
        command.write_text(f'#!/bin/sh\necho {name} "$@" >> {tmp_path}/said\nexit {status}\n')
        command.chmod(0o755)
    hook = _pods(_cluster("small"))["train"]["spec"]["containers"][0]["lifecycle"]["preStop"]
    result = subprocess.run(
        hook["exec"]["command"],
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "RAY_ADDRESS": "head:6379"},
    )
    said = (tmp_path / "said").read_text()
    assert said.startswith("ray drain-node --address head:6379 ")
    assert result.returncode == code
    assert ("sleep 15" in said) == waited


@functools.cache
def _help(script: str, *command: str) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert run_in_process(Path(script).stem, *command, "--help") == 0
    return printed.getvalue()


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_jobs_run_on_the_cluster_with_flags_that_exist(overlay: str) -> None:
    parts = _built(overlay)
    (settings,) = [part["data"] for part in parts if part["kind"] == "ConfigMap"]
    cluster = _cluster(overlay)
    for part in parts:
        if part["kind"] != "RayJob":
            continue
        job = RayJob.model_validate(part)
        assert job.spec.clusterSelector["ray.io/cluster"] == cluster.metadata.name
        python, script, *flags = shlex.split(job.spec.entrypoint)
        assert python == "python"
        assert set(re.findall(r"\$(\w+)", job.spec.entrypoint)) <= set(settings)
        for flag in flags:
            if flag.startswith("--"):
                assert re.search(rf"{flag}\b", _help(script)), f"{script} has no {flag}"
        given = dict(itertools.pairwise(flags))
        cpus = int(given.get("--cpus-per-worker") or given["--cpus-per-trial"])
        node = _ray_resources(cluster)["train"]
        assert cpus * node["GPU"] <= node["CPU"]
        if script == "jobs/train.py":
            most = node["GPU"] * cluster.spec.workerGroupSpecs[1].maxReplicas
            workers = int(given["--workers"].partition(":")[2])
            spare = most - workers
            assert spare >= 0
            assert given.get("--validate-every") == "0" or spare >= float(given["--val-gpus"])


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_gpu_of_the_training_has_pairs_enough(overlay: str) -> None:
    """At least half of what the sizing table counts with; the recipe's global batch is fixed."""
    (job,) = [p for p in _built(overlay) if overlays.identity(p) == ("RayJob", "lorat-train")]
    given = dict(itertools.pairwise(shlex.split(job["spec"]["entrypoint"])))
    batch = resolve(TrainConfig(variant=given["--variant"])).batch_size
    assert batch
    assert 2 * batch >= sizing.BATCH_PER_GPU * int(given["--workers"].partition(":")[2])


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_decode_nodes_that_are_there_feed_the_training(overlay: str) -> None:
    """By the sizing table; a training takes the decode nodes of its start."""
    (job,) = [p for p in _built(overlay) if overlays.identity(p) == ("RayJob", "lorat-train")]
    words = shlex.split(job["spec"]["entrypoint"])
    given = dict(itertools.pairwise(words))
    cores = sizing.size(given["--variant"]).cores * int(given["--workers"].partition(":")[2])
    cluster = _cluster(overlay)
    decode = cluster.spec.workerGroupSpecs[0]
    assert cores <= decode.minReplicas * _ray_resources(cluster)["decode"]["CPU"]


def _operations_page() -> str:
    return (ROOT / "infra" / "README.md").read_text()


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_page_ingests_the_data_that_the_jobs_read(overlay: str) -> None:
    page = _operations_page()
    commands = [shlex.split(c) for c in re.findall(r"python (jobs/ingest\.py got10k .*)", page)]
    given = [dict(itertools.pairwise(words)) for words in commands]
    parts = _built(overlay)
    (settings,) = [part["data"] for part in parts if part["kind"] == "ConfigMap"]
    assert {flags["--split"]: flags["--output"] for flags in given} == {
        "train": settings["LORAT_TRAIN_DATA"],
        "val": settings["LORAT_VAL_DATA"],
    }
    (job,) = [part for part in parts if overlays.identity(part) == ("RayJob", "lorat-train")]
    trained = dict(itertools.pairwise(shlex.split(job["spec"]["entrypoint"])))["--variant"]
    (windows,) = [flags["--variant"] for flags in given if "--variant" in flags]
    assert WindowLaw.for_variant(get_variant(windows)).serves(get_variant(trained))
    for words in commands:
        assert set(re.findall(r"--[\w-]+", " ".join(words))) <= set(
            re.findall(r"--[\w-]+", _help("jobs/ingest.py", "got10k"))
        )


def test_the_page_names_weights_of_the_hub_that_variants_have() -> None:
    named = set(re.findall(r"vit_\w+\.\w+", _operations_page()))
    assert named
    assert named <= {variant.timm_name for variant in VARIANTS.values()}


def test_the_page_scrapes_the_port_that_every_pod_has() -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", _operations_page(), re.DOTALL)
    monitor = yaml.safe_load(block)
    cluster = _cluster("small")
    assert monitor["metadata"]["namespace"] == cluster.metadata.namespace
    # The operator labels every pod with the name of its cluster.
    assert monitor["spec"]["selector"]["matchLabels"] == {"ray.io/cluster": cluster.metadata.name}
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    for group, template in _pods(cluster).items():
        (container,) = template["spec"]["containers"]
        assert endpoint["port"] in {port["name"] for port in container["ports"]}, group


def test_one_job_can_be_chosen_by_its_label() -> None:
    """As the README does: kubectl apply -l lorat-job=train."""
    labels = {
        part["metadata"]["name"]: part["metadata"].get("labels", {}) for part in _built("large")
    }
    assert labels["lorat-train"] == {"lorat-job": "train"}
    assert labels["lorat-tune"] == {"lorat-job": "tune"}
    assert labels["lorat"] == {}


def test_versions_are_those_of_the_lock_and_the_project() -> None:
    lock = (ROOT / "infra" / "requirements.lock").read_text()
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    text = (FOLDER / "base" / "cluster.yaml").read_text()
    (ray,) = re.findall(r"rayVersion: (\S+)", text)
    assert f"ray=={ray}\n" in lock
    assert set(re.findall(r"image: (\S+)", text)) == {
        f"lorat-cpu:{version}",
        f"lorat-gpu:{version}",
    }
