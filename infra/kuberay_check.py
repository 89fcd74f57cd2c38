"""Say what an overlay of infra/kuberay still needs before it is applied.

    python infra/kuberay_check.py infra/kuberay/small                asks the cluster of kubectl
    python infra/kuberay_check.py infra/kuberay/small --no-cluster   reads the manifests only

Every service, Secret, account, priority class and queue that the manifests name is made by them or
has to be in the cluster; addresses and images must be no examples any more, and the network
policies must let Ray's pods reach what settings.env names.  Exit code 0 where nothing is missing,
else 1.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from ipaddress import ip_network
from typing import Any
from urllib.parse import urlsplit

import yaml

from lorat.errors import UserError

Part = dict[str, Any]

EVERYWHERE = {"CustomResourceDefinition", "PriorityClass"}
"""Kinds without a namespace."""
QUEUE = "kueue.x-k8s.io/queue-name"
EXAMPLE = "example.com"
PORTS = {"http": 80, "https": 443}


@dataclass(kw_only=True)
class Need:
    """An object that the manifests name and do not make."""

    kind: str
    name: str
    namespace: str
    """Empty for kinds without one."""
    remedy: str
    users: set[str] = field(default_factory=set)
    """What names it."""
    keys: set[str] = field(default_factory=set)
    """Of a Secret: what has to be in it."""
    optional: bool = True
    """Whether all of them do without it."""

    def __str__(self) -> str:
        return f"{self.kind} {self.name}" + f" in namespace {self.namespace}" * bool(self.namespace)


@dataclass(frozen=True)
class Peer:
    """One end of a connection: a pod, or with no namespace something outside of Kubernetes."""

    namespace: str = ""
    labels: dict[str, str] = field(default_factory=dict)


def build(folder: str) -> list[Part]:
    """Return what ``kubectl kustomize`` makes of an overlay.

    Raises:
        UserError: if there is no kubectl, or it refuses the overlay.
    """
    return list(yaml.safe_load_all(_kubectl("kustomize", folder)))


def needs(parts: list[Part]) -> list[Need]:
    """Return every object that the manifests name and do not make."""
    made = {_identity(part) for part in parts}
    found: dict[tuple[str, str, str], Need] = {}

    def add(
        user: str, kind: str, namespace: str, name: str, remedy: str, key: str = "",
        optional: bool = False,
    ) -> None:  # fmt: skip
        place = kind, "" if kind in EVERYWHERE else namespace, name
        if place not in made:
            new = Need(kind=kind, namespace=place[1], name=name, remedy=remedy)
            need = found.setdefault(place, new)
            need.users.add(user)
            need.keys |= {key} - {""}
            need.optional &= optional

    add(
        "RayCluster lorat", "CustomResourceDefinition", "", "rayclusters.ray.io",
        "install the KubeRay operator, 1.6 or newer",
    )  # fmt: skip
    for setting, (name, namespace) in _inside(parts):
        remedy = "add the component ../services, or put your own address into settings.env"
        add(setting, "Service", namespace, name, remedy)
    for part in parts:
        user, space = f"{part['kind']} {part['metadata']['name']}", _identity(part)[1]
        for value in [*_values(part, "secretRef"), *_values(part, "secretKeyRef")]:
            add(
                user, "Secret", space, value["name"],
                f'"kubectl -n {space} create secret generic {value["name"]}", see infra/README.md',
                key=value.get("key", ""), optional=value.get("optional", False),
            )  # fmt: skip
        for value in part.get("imagePullSecrets", []):
            add(
                user, "Secret", space, value["name"], "a registry that asks for a password needs "
                f'it, "kubectl -n {space} create secret docker-registry {value["name"]}"',
                optional=True,
            )  # fmt: skip
        for name in _values(part, "serviceAccountName"):
            remedy = f'"kubectl -n {space} create serviceaccount {name}"'
            add(user, "ServiceAccount", space, name, remedy)
        for name in _values(part, "priorityClassName"):
            remedy = "add the component ../priority to kustomization.yaml"
            add(user, "PriorityClass", space, name, remedy)
        if name := part["metadata"].get("labels", {}).get(QUEUE):
            remedy = "who runs Kueue makes it; or take the component ../queue out"
            add(user, "LocalQueue", space, name, remedy)
    return list(found.values())


def faults(parts: list[Part]) -> list[str]:
    """Return what is wrong whatever the cluster has: examples, useless addresses, closed doors."""
    texts = [
        f"The image {image} is still an example: put your registry into kustomization.yaml."
        for image in sorted({image for part in parts for image in _values(part, "image")})
        if EXAMPLE in image
    ]
    settings = _settings(parts)
    if not settings.get("MLFLOW_TRACKING_URI", "").startswith(("http://", "https://")):
        texts.append(
            "MLFLOW_TRACKING_URI names no server, so that runs would end with the head pod: put an "
            "http:// or https:// address into settings.env."
        )
    for name, value in _addresses(settings):
        host = urlsplit(value).hostname or ""
        if host == EXAMPLE or host.endswith(f".{EXAMPLE}"):
            texts.append(
                f"{name}={value} is still an example: put your own address into settings.env, or "
                "add the component ../services, whose addresses are in small/settings.env."
            )
        elif host == "localhost" or host.startswith("127."):
            texts.append(
                f"{name}={value} is the pod itself: put the address that pods know into "
                "settings.env."
            )
        else:
            texts += _closed(parts, name, value)
    return texts


def missing(need: Need, found: Part | None) -> str:
    """Say that a need is not met by what the cluster has, or return nothing."""
    users = " and ".join(sorted(need.users))
    if found is None:
        return (
            f"{need} is named by {users}, and neither made here nor in the cluster: {need.remedy}."
        )
    if absent := need.keys - set(found.get("data") or {}):
        keys = ", ".join(sorted(absent))
        return f"{need} lacks {keys}, which {users} read: {need.remedy}."
    return ""


def ask(need: Need) -> Part | None:
    """Return the object from the cluster of kubectl; None where it is not there.

    Raises:
        PermissionError: if this user may not ask for it.
        UserError: if the cluster does not answer.
    """
    where = ["--namespace", need.namespace] if need.namespace else []
    text = _kubectl(
        "get", need.kind, need.name, *where, "--ignore-not-found", "--output=json",
        absent="the server doesn't have a resource type",
    )  # fmt: skip
    return json.loads(text) if text.strip() else None


def report(parts: list[Part], find: Callable[[Need], Part | None] | None) -> tuple[list[str], bool]:
    """Return lines for the user, and whether the overlay may be applied.

    Args:
        parts: the manifests.
        find: gives an object of the cluster; None leaves what is needed unasked.
    """
    lines = faults(parts)
    ready = not lines
    for need in needs(parts):
        if find is None:
            keys = f" with {', '.join(sorted(need.keys))}" if need.keys else ""
            lines.append(f"{'May' if need.optional else 'Must'} be there: {need}{keys}.")
            continue
        try:
            text = missing(need, find(need))
        except PermissionError:
            lines.append(f"Not known, since you may not ask for it: {need}.")
            continue
        if text:
            ready &= need.optional
            lines.append(f"May be so: {text}" if need.optional else text)
    return lines, ready


def lets_through(parts: list[Part], source: Peer, target: Peer, port: int) -> bool:
    """Tell whether the network policies let ``source`` connect to a TCP port of ``target``."""
    return _opens(parts, "Egress", source, target, port) and _opens(
        parts, "Ingress", target, source, port
    )


def _opens(parts: list[Part], direction: str, pod: Peer, other: Peer, port: int) -> bool:
    """Tell whether a pod's policies open one direction; without any it is open."""
    policies = [
        part["spec"]
        for part in parts
        if part["kind"] == "NetworkPolicy"
        and part["metadata"]["namespace"] == pod.namespace
        and direction in part["spec"]["policyTypes"]
        and _selects(part["spec"]["podSelector"], pod.labels)
    ]
    if not policies:
        return True
    peers = {"Egress": "to", "Ingress": "from"}[direction]
    return any(
        any(p["port"] == port and p.get("protocol", "TCP") == "TCP" for p in rule["ports"])
        if "ports" in rule
        else True
        for policy in policies
        for rule in policy.get(direction.lower(), [])
        if peers not in rule or any(_is(peer, other, pod.namespace) for peer in rule[peers])
    )


def _is(peer: Part, other: Peer, namespace: str) -> bool:
    if "ipBlock" in peer:
        # Which address a name has is not known here; those of metadata it has not.
        return not other.namespace and not ip_network(peer["ipBlock"]["cidr"]).is_link_local
    wanted = peer.get("namespaceSelector")
    if wanted is None:
        there = other.namespace == namespace
    else:
        name = {"kubernetes.io/metadata.name": other.namespace}
        there = bool(other.namespace) and _selects(wanted, name)
    return there and _selects(peer.get("podSelector", {}), other.labels)


def _selects(selector: Part, labels: dict[str, str]) -> bool:
    if "matchExpressions" in selector:
        raise UserError(f"This check knows no matchExpressions in a network policy: {selector}.")
    return selector.get("matchLabels", {}).items() <= labels.items()


def _closed(parts: list[Part], name: str, value: str) -> list[str]:
    """Say that Ray's pods may not reach an address of the settings, if so."""
    (cluster,) = [part for part in parts if part["kind"] == "RayCluster"]
    address = urlsplit(value)
    port = address.port or PORTS[address.scheme]
    target = Peer()
    if service := _service_of(address.hostname or "", cluster["metadata"]["namespace"]):
        own = [p for p in parts if _identity(p) == ("Service", *reversed(service))]
        if not own:
            target = Peer(service[1])
        for part in own:
            target = Peer(service[1], part["spec"]["selector"])
            ports = {p["port"]: p.get("targetPort", p["port"]) for p in part["spec"]["ports"]}
            if port not in ports:
                return [f"{name}={value}: Service {service[0]} has the ports {sorted(ports)}."]
            port = ports[port]
    labels = {"ray.io/cluster": cluster["metadata"]["name"]}
    for role in ("head", "worker"):
        ray = Peer(cluster["metadata"]["namespace"], labels | {"ray.io/node-type": role})
        if not lets_through(parts, ray, target, port):
            return [
                f"{name}={value} is out of reach: no network policy lets Ray's pods go to port "
                f"{port} there; add a rule to the overlay, like those of services/network.yaml."
            ]
    return []


def _inside(parts: list[Part]) -> Iterator[tuple[str, tuple[str, str]]]:
    """Yield the settings that name a service of the cluster, with its name and namespace."""
    (namespace,) = {p["metadata"]["namespace"] for p in parts if p["kind"] == "RayCluster"}
    for name, value in _addresses(_settings(parts)):
        if service := _service_of(urlsplit(value).hostname or "", namespace):
            yield name, service


def _service_of(host: str, namespace: str) -> tuple[str, str] | None:
    """Return name and namespace of the service that pods of ``namespace`` call so."""
    if host == "localhost":
        return None
    match = re.fullmatch(r"([a-z0-9-]+)(?:\.([a-z0-9-]+)\.svc(?:\.cluster\.local)?)?", host)
    return (match[1], match[2] or namespace) if match else None


def _settings(parts: list[Part]) -> dict[str, str]:
    return {k: v for p in parts if p["kind"] == "ConfigMap" for k, v in p["data"].items()}


def _addresses(settings: dict[str, str]) -> list[tuple[str, str]]:
    return [(name, value) for name, value in settings.items() if urlsplit(value).scheme in PORTS]


def _identity(part: Part) -> tuple[str, str, str]:
    namespace = "" if part["kind"] in EVERYWHERE else part["metadata"].get("namespace", "")
    return part["kind"], namespace, part["metadata"]["name"]


def _values(value: Any, key: str) -> Iterator[Any]:
    """Yield what a part has under ``key``, at any depth."""
    if isinstance(value, list):
        for item in value:
            yield from _values(item, key)
    elif isinstance(value, dict):
        for name, item in value.items():
            if name == key:
                yield item
            else:
                yield from _values(item, key)


def _kubectl(*arguments: str, absent: str | None = None) -> str:
    """Run kubectl; ``absent`` in what it says against it means an empty answer."""
    try:
        result = subprocess.run(["kubectl", *arguments], capture_output=True, text=True)
    except FileNotFoundError:
        raise UserError("There is no kubectl on the PATH: install it.") from None
    if result.returncode == 0:
        return result.stdout
    if absent and absent in result.stderr:
        return ""
    if "(Forbidden)" in result.stderr:
        raise PermissionError(result.stderr)
    said = result.stderr.strip().splitlines()[-1:] or ["nothing"]
    raise UserError(
        f"kubectl {arguments[0]} failed and said: {said[0]}; choose a cluster with "
        '"kubectl config use-context", or give --no-cluster to read the manifests only.'
    )


def main() -> int:
    """Print what is missing; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("overlay", help="folder of the overlay, such as infra/kuberay/small")
    parser.add_argument("--no-cluster", action="store_true", help="ask no cluster")
    arguments = parser.parse_args()
    try:
        lines, ready = report(build(arguments.overlay), None if arguments.no_cluster else ask)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    nothing = "Nothing else is missing." if lines else "Nothing is missing."
    print(*lines, nothing if ready else "Not ready to be applied.", sep="\n")
    return 0 if ready else 1


if __name__ == "__main__":
    sys.exit(main())
