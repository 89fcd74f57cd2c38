"""The compose stack: loopback only, no secret in it, and a dashboard of metrics that exist."""

from __future__ import annotations

import ast
import json
import os
import re
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from pydantic import BaseModel, ConfigDict, Field

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "infra" / "compose"
FILLED = {
    "POSTGRES_PASSWORD", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD", "MLFLOW_FLASK_SERVER_SECRET_KEY", "GRAFANA_PASSWORD",
}  # fmt: skip
"""Variables that .env must fill in."""


class Strict(BaseModel):
    """A part of the Compose Specification as used here; unknown fields are errors."""

    model_config = ConfigDict(extra="forbid")


class Build(Strict):
    context: Path
    dockerfile: Path
    target: str


class Healthcheck(Strict):
    test: list[str]
    interval: str
    retries: int


class Dependency(Strict):
    condition: Literal["service_healthy", "service_completed_successfully"]


class BindOptions(Strict):
    create_host_path: Literal[False]


class Bind(Strict):
    """A folder of the host that has to be there; the short form would make it, as root."""

    type: Literal["bind"]
    source: str = Field(pattern="^/")
    target: str = Field(pattern="^/")
    read_only: Literal[True]
    bind: BindOptions


class Service(Strict):
    image: str = Field(pattern=r"^[a-z0-9/-]+:v?\d[\w.-]*$")  # never "latest"
    build: Build | None = None
    restart: Literal["unless-stopped"] | None = None
    environment: dict[str, str] = {}
    command: list[str] = []
    ports: list[str] = []
    volumes: list[str | Bind] = []
    configs: list[dict[Literal["source", "target"], str]] = []
    network_mode: Literal["host"] | None = None
    healthcheck: Healthcheck | None = None
    depends_on: dict[str, Dependency] = {}


class Stack(Strict):
    name: str
    services: dict[str, Service]
    configs: dict[str, dict[Literal["content"], str]]
    volumes: dict[str, dict[str, Any]]


def _stack(**variables: str) -> Stack:
    """Read the file as Compose does: variables filled in, extensions left out."""

    def value(match: re.Match[str]) -> str:
        name, operator, rest = match.group(1), match.group(2), match.group(3) or ""
        if variables.get(name):
            return variables[name]
        assert operator != ":?", f"{name}: {rest}"
        return rest

    text = re.sub(r"\$\{(\w+)(:[-?])?([^}]*)\}", value, (FOLDER / "compose.yaml").read_text())
    parts = yaml.safe_load(text)
    return Stack.model_validate({k: v for k, v in parts.items() if not k.startswith("x-")})


@pytest.fixture(scope="module")
def stack() -> Stack:
    return _stack(**{name: f"value-of-{name}" for name in FILLED})


def test_the_stack_has_every_part(stack: Stack) -> None:
    assert {"mlflow", "postgres", "storage", "prometheus", "grafana"} <= set(stack.services)
    for service in stack.services.values():
        if service.build:
            assert (FOLDER / service.build.context / service.build.dockerfile).exists()
        for name, dependency in service.depends_on.items():
            other = stack.services[name]
            healthy = dependency.condition == "service_healthy"
            assert not healthy or other.healthcheck, f"{name} has no health check"
        for volume in service.volumes:
            if isinstance(volume, Bind):
                continue
            source = volume.split(":")[0]
            if source.startswith("."):
                assert (FOLDER / source).exists()
            else:
                assert source in stack.volumes, f"{volume} would be made as root"


def test_the_folder_of_ray_is_never_made_by_docker(stack: Stack) -> None:
    (folder,) = [v for v in stack.services["prometheus"].volumes if isinstance(v, Bind)]
    assert (folder.source, folder.target) == ("/tmp/ray", "/ray")
    told = _stack(RAY_TEMP_DIR="/srv/ray", **dict.fromkeys(FILLED, "x"))
    (folder,) = [v for v in told.services["prometheus"].volumes if isinstance(v, Bind)]
    assert folder.source == "/srv/ray"


def test_the_database_is_healthy_only_when_clients_reach_it(stack: Stack) -> None:
    """While PostgreSQL sets itself up it listens on its socket alone."""
    healthcheck = stack.services["postgres"].healthcheck
    assert healthcheck
    assert "-h 127.0.0.1" in healthcheck.test[1]


def test_everything_is_bound_to_loopback_unless_told_otherwise(stack: Stack) -> None:
    for name, service in stack.services.items():
        assert all(port.startswith("127.0.0.1:") for port in service.ports), name
        if service.network_mode == "host":
            listens = [*service.command, *service.environment.values()]
            assert any("127.0.0.1" in word for word in listens), name
    told = _stack(BIND_ADDRESS="10.0.0.5", **dict.fromkeys(FILLED, "x"))
    assert told.services["mlflow"].ports == ["10.0.0.5:5000:5000"]
    assert told.services["grafana"].environment["GF_SERVER_HTTP_ADDR"] == "10.0.0.5"


def test_mlflow_asks_for_a_password_and_answers_only_to_known_hosts(stack: Stack) -> None:
    command = stack.services["mlflow"].command
    assert "--app-name=basic-auth" in command
    assert "--allowed-hosts=localhost:5000,127.0.0.1:5000" in command


@pytest.mark.parametrize("name", sorted(FILLED))
def test_no_password_has_a_default(name: str) -> None:
    with pytest.raises(AssertionError, match=name):
        _stack(**dict.fromkeys(FILLED - {name}, "x"))


def test_the_example_names_every_variable_and_no_value() -> None:
    example = (FOLDER / ".env.example").read_text()
    assert set(re.findall(r"^(\w+)=$", example, re.M)) == FILLED
    assert not re.findall(r"^\w+=.+$", example, re.M)
    assert (FOLDER / ".gitignore").read_text().split() == [".env"]
    used = set(re.findall(r"\$\{(\w+)", (FOLDER / "compose.yaml").read_text()))
    assert used == set(re.findall(r"^#?(\w+)=", example, re.M))


def test_prometheus_scrapes_what_ray_announces() -> None:
    config = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    (ray,) = config["scrape_configs"]  # and no address that BIND_ADDRESS would make wrong
    (path,) = ray["file_sd_configs"][0]["files"]
    from ray._private.ray_constants import PROMETHEUS_SERVICE_DISCOVERY_FILE

    assert path == f"/ray/{PROMETHEUS_SERVICE_DISCOVERY_FILE}"
    assert os.path.basename(path).startswith("prom_metrics")


def _dashboard() -> dict[str, Any]:
    return json.loads((FOLDER / "grafana" / "dashboards" / "lorat.json").read_text())


def _exported() -> set[str]:
    """Return the names under which the platform's metrics reach Prometheus."""
    from lorat_platform import telemetry

    shown = telemetry.summarise(
        wall_s=1.0, parts_s=dict.fromkeys(telemetry.PARTS, 0.1), num_steps=1, num_pairs=1,
        num_workers=1, flops_per_pair=1.0, peak=1.0,
    )  # fmt: skip
    loop = ast.parse((ROOT / "platform" / "lorat_platform" / "train_loop.py").read_text())
    literals = {node.value for node in ast.walk(loop) if isinstance(node, ast.Constant)}
    names = {
        n for n in literals if isinstance(n, str) and re.fullmatch(r"(train|data|system)/\w+", n)
    }
    return {"ray_lorat_" + name.replace("/", "_") for name in names | set(shown)}


def test_the_dashboard_shows_metrics_that_the_platform_exports() -> None:
    text = json.dumps(_dashboard())
    used = set(re.findall(r"ray_lorat_\w+", text))
    assert used
    assert used <= _exported()


def test_the_dashboard_shows_metrics_that_ray_exports() -> None:
    import ray.dashboard.modules.metrics.dashboards as dashboards

    known = "".join(p.read_text() for p in Path(dashboards.__path__[0]).glob("*.py"))
    used = set(re.findall(r"\bray_node_\w+", json.dumps(_dashboard())))
    assert used
    assert all(re.search(rf"\b{name}\b", known) for name in used)


def test_the_dashboard_has_what_the_operations_page_reads_from_it() -> None:
    titles = {panel["title"] for panel in _dashboard()["panels"]}
    assert {"Throughput", "Stall share", "Loss", "GPU use", "Trials", "CPU use"} <= titles
    readme = (ROOT / "infra" / "README.md").read_text()
    assert set(re.findall(r"panel \*([^*]+)\*", readme)) <= titles


def test_grafana_finds_the_dashboard_and_its_source() -> None:
    provisioning = FOLDER / "grafana" / "provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yaml").read_text())[
        "datasources"
    ]
    uids = {panel["datasource"]["uid"] for panel in _dashboard()["panels"]}
    assert uids == {source["uid"]}
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "lorat.yaml").read_text())[
        "providers"
    ]
    mounts = [
        str(volume).split(":")[1]
        for volume in _stack(**dict.fromkeys(FILLED, "x")).services["grafana"].volumes
    ]
    assert provider["options"]["path"] in mounts
