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
from pydantic import Field

from tests.infra.overlays import Strict

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "infra" / "compose"
FILLED = {
    "POSTGRES_PASSWORD", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD", "MLFLOW_FLASK_SERVER_SECRET_KEY", "GRAFANA_PASSWORD",
}  # fmt: skip
"""Variables that .env must fill in."""


# The Compose Specification, as far as it is used.


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
    environment: dict[str, str] = Field(default_factory=dict)
    command: list[str] = Field(default_factory=list)
    ports: list[str] = Field(default_factory=list)
    volumes: list[str | Bind] = Field(default_factory=list)
    configs: list[dict[Literal["source", "target"], str]] = Field(default_factory=list)
    network_mode: Literal["host"] | None = None
    logging: dict[Literal["driver"], Literal["local"]]  # which drops old lines
    healthcheck: Healthcheck | None = None
    depends_on: dict[str, Dependency] = Field(default_factory=dict)


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


def _folder_of_ray(stack: Stack) -> Bind:
    (folder,) = [v for v in stack.services["prometheus"].volumes if isinstance(v, Bind)]
    return folder


def _listed_file(stack: Stack) -> Path:
    """Return the file in which Prometheus looks for Ray's nodes, as its container names it."""
    (ray,) = yaml.safe_load(stack.configs["prometheus"]["content"])["scrape_configs"]
    (discovery,) = ray["file_sd_configs"]  # and no address that BIND_ADDRESS would make wrong
    assert discovery["refresh_interval"] == "10s"
    (path,) = discovery["files"]
    return Path(path)


def _on_the_host(path: Path, folder: Bind) -> Path:
    """Return what a container sees at ``path``; a link leads on inside of the container."""
    while True:
        assert path.is_relative_to(folder.target), f"{path} is not in the container"
        here = Path(folder.source) / path.relative_to(folder.target)
        if not here.is_symlink():
            return here
        path = path.parent / os.readlink(here)


def test_prometheus_reads_what_ray_lists_through_its_link(tmp_path: Path) -> None:
    """Ray's link names the session's folder by the whole path that it has on the host."""
    from ray._private.ray_constants import PROMETHEUS_SERVICE_DISCOVERY_FILE

    session = tmp_path / "session_2026-01-01_00-00-00_000000_1"
    session.mkdir()
    (session / PROMETHEUS_SERVICE_DISCOVERY_FILE).write_text('[{"targets": ["127.0.0.1:8080"]}]')
    link = tmp_path / PROMETHEUS_SERVICE_DISCOVERY_FILE
    link.symlink_to(session / PROMETHEUS_SERVICE_DISCOVERY_FILE)
    told = _stack(RAY_TEMP_DIR=str(tmp_path), **dict.fromkeys(FILLED, "x"))
    found = _on_the_host(_listed_file(told), _folder_of_ray(told))
    assert json.loads(found.read_text()) == [{"targets": ["127.0.0.1:8080"]}]


def test_prometheus_looks_where_ray_is_by_default(stack: Stack) -> None:
    folder = _folder_of_ray(stack)
    assert (folder.source, folder.target) == ("/tmp/ray", "/tmp/ray")
    assert _listed_file(stack) == Path("/tmp/ray/prom_metrics_service_discovery.json")
    (config,) = stack.services["prometheus"].configs
    path = stack.services["prometheus"].command[0].removeprefix("--config.file=")
    assert config == {"source": "prometheus", "target": path}


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


def test_prometheus_which_has_no_password_stays_on_loopback() -> None:
    told = _stack(BIND_ADDRESS="10.0.0.5", **dict.fromkeys(FILLED, "x"))
    assert "--web.listen-address=127.0.0.1:9090" in told.services["prometheus"].command
    assert told.services["grafana"].environment["PROMETHEUS_URL"] == "http://127.0.0.1:9090"


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


def _dashboard() -> dict[str, Any]:
    return json.loads((FOLDER / "grafana" / "dashboards" / "lorat.json").read_text())


def _exported() -> set[str]:
    """Return the names under which the platform's metrics reach Prometheus."""
    from lorat.learning import clock
    from lorat_platform.serving import publishing

    shown = clock.summarise(
        wall_s=1.0, parts_s=dict.fromkeys(clock.PARTS, 0.1), num_steps=1, num_pairs=1,
        num_workers=1, flops_per_pair=1.0, peak=1.0,
    )  # fmt: skip
    names = _words("lorat/learning/loop.py", r"(train|data|system)/\w+|lr") | set(shown)
    gauges = _words("platform/lorat_platform/search/session.py", r"lorat_search_\w+")
    gauges |= {f"lorat_serve_{name}_total" for name in publishing.COUNTERS}
    gauges |= {f"lorat_serve_{name}" for name in publishing.GAUGES}
    return {"ray_lorat_" + name.replace("/", "_") for name in names} | {f"ray_{g}" for g in gauges}


def _words(file: str, pattern: str) -> set[str]:
    """Return the string literals of a module that are like ``pattern``."""
    tree = ast.parse((ROOT / file).read_text())
    literals = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    return {n for n in literals if isinstance(n, str) and re.fullmatch(pattern, n)}


def test_the_dashboard_shows_metrics_that_the_platform_exports() -> None:
    text = json.dumps(_dashboard())
    used = set(re.findall(r"ray_lorat_\w+", text))
    assert used
    assert used <= _exported()


def test_the_dashboard_counts_the_trials_of_searches() -> None:
    shown = {
        target["expr"]
        for panel in _dashboard()["panels"]
        for target in panel["targets"]
        if panel["title"] == "Trials"
    }
    assert shown == {
        'sum(ray_lorat_search_trials{status="running"})',
        "sum by (status) (ray_lorat_search_trials)",
    }


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
