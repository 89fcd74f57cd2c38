"""What the overlays of infra/kuberay use of kustomize, so that they are tested where it is not."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field

Part = dict[str, Any]

EVERYWHERE = {"PriorityClass"}
"""Kinds without a namespace."""


class Strict(BaseModel):
    """A part of a file; unknown fields are errors."""

    model_config = ConfigDict(extra="forbid")


class Operation(Strict):
    """An operation of a JSON patch."""

    op: Literal["add", "replace", "test"]
    path: str = Field(pattern="^/(spec/|metadata/labels$|metadata/annotations$)")
    value: Any

    def apply(self, part: Part) -> None:
        """Change a part; a path that is not there is an error, as in kustomize.

        One that is there already, or of another type, is an error of the manifests.
        """
        *parents, last = self.path.strip("/").split("/")
        holder: Any = part
        for key in parents:
            holder = holder[int(key)] if isinstance(holder, list) else holder[key]
        if self.op == "test":
            assert holder[last] == self.value, self.path
        elif self.op == "add" and isinstance(holder, list):
            assert last == "-", self.path
            holder.append(_unshared(self.value))
        elif self.op == "add":
            assert last not in holder, self.path
            holder[last] = _unshared(self.value)
        else:
            assert type(holder[last]) is type(self.value), self.path
            holder[last] = _unshared(self.value)


class Patch(Strict):
    """Operations on every part of a kind, or of a kind and name, as YAML in a string."""

    target: dict[Literal["kind", "name"], str]
    """Regular expressions."""
    patch: str

    def meets(self, part: Part) -> bool:
        """Tell whether a part is changed."""
        kind, name = identity(part)
        wanted = self.target.get("name", ".*")
        return bool(re.fullmatch(self.target["kind"], kind) and re.fullmatch(wanted, name))


class Image(Strict):
    """A new name and tag for an image of the base."""

    name: str
    newName: str
    newTag: str


class ConfigMapGenerator(Strict):
    """A ConfigMap of the variables in files."""

    name: str
    envs: list[str]


class Base(Strict):
    """The kustomization.yaml of the base."""

    apiVersion: Literal["kustomize.config.k8s.io/v1beta1"]
    kind: Literal["Kustomization"]
    resources: list[str]


class Component(Strict):
    """The kustomization.yaml of a component."""

    apiVersion: Literal["kustomize.config.k8s.io/v1alpha1"]
    kind: Literal["Component"]
    resources: list[str] = []
    patches: list[Patch] = []


class Overlay(Base):
    """The kustomization.yaml of an overlay."""

    namespace: str
    images: list[Image]
    generatorOptions: dict[Literal["disableNameSuffixHash"], Literal[True]]
    configMapGenerator: list[ConfigMapGenerator]
    components: list[str] = []
    patches: list[Patch] = []


def build(folder: Path) -> list[Part]:
    """Return the parts of an overlay, as ``kustomize build`` would print them."""
    overlay = Overlay.model_validate(yaml.safe_load((folder / "kustomization.yaml").read_text()))
    parts = [part for name in overlay.resources for part in _base(folder / name)]
    for name in overlay.components:
        path = folder / name
        component = Component.model_validate(
            yaml.safe_load((path / "kustomization.yaml").read_text())
        )
        parts += [part for file in component.resources for part in _parts(path / file)]
        _change(parts, component.patches)
    _change(parts, overlay.patches)
    for part in parts:
        _rename_images(part, {image.name: image for image in overlay.images})
    parts += [
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": generator.name},
            "data": dict(line for name in generator.envs for line in _variables(folder / name)),
        }
        for generator in overlay.configMapGenerator
    ]
    for part in parts:
        if part["kind"] not in EVERYWHERE:
            part["metadata"]["namespace"] = overlay.namespace
    return parts


def identity(part: Part) -> tuple[str, str]:
    """Return kind and name."""
    return part["kind"], part["metadata"]["name"]


def _change(parts: list[Part], patches: list[Patch]) -> None:
    for patch in patches:
        targets = [part for part in parts if patch.meets(part)]
        # Without a name a patch is for whatever of the kind there is, which may be nothing.
        assert targets or "name" not in patch.target, patch.target
        for operation in yaml.safe_load(patch.patch):
            for target in targets:
                Operation.model_validate(operation).apply(target)


def _base(folder: Path) -> list[Part]:
    base = Base.model_validate(yaml.safe_load((folder / "kustomization.yaml").read_text()))
    return [part for name in base.resources for part in _parts(folder / name)]


def _parts(path: Path) -> list[Part]:
    # YAML's aliases are one object in Python; a patch must not reach what is elsewhere.
    return [_unshared(part) for part in yaml.safe_load_all(path.read_text())]


def _unshared(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _unshared(item) for key, item in value.items()}
    return [_unshared(item) for item in value] if isinstance(value, list) else copy.copy(value)


def _variables(path: Path) -> list[tuple[str, str]]:
    lines = [line.strip() for line in path.read_text().splitlines()]
    pairs = [line.partition("=") for line in lines if line and not line.startswith("#")]
    assert all(separator for _, separator, _ in pairs), f"{path} has a line without a value"
    return [(name, value) for name, _, value in pairs]


def _rename_images(value: Any, images: dict[str, Image]) -> None:
    if isinstance(value, list):
        for item in value:
            _rename_images(item, images)
    elif isinstance(value, dict):
        for container in [*(value.get("containers") or []), *(value.get("initContainers") or [])]:
            image = images.get(container["image"].partition(":")[0])
            if image:
                container["image"] = f"{image.newName}:{image.newTag}"
        for item in value.values():
            _rename_images(item, images)
