"""Connecting to Ray: an embedded one on this machine, or the cluster that is named."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tenacity

import lorat
import lorat_platform
from lorat.errors import UserError, named
from lorat.files.addresses import refuse_secrets
from lorat_platform.cluster import ray_internals, sockets
from lorat_platform.cluster.addresses import REMEDY, check_address
from lorat_platform.cluster.interrupts import kept_handlers
from lorat_platform.cluster.phases import Phases

log = logging.getLogger(__name__)

ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # A task that asks for no GPU sees none, so that it cannot take memory from one that did.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",
    # Without it everything that a training worker prints appears twice.
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    # Threads of torch share CPUs with those that decode.  Ones that spin at barriers for ever take
    # CPUs from them, ones that sleep at once make a step a third longer: they spin a little.
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "100000",
}
"""Environment of the driver and of every worker."""

FORWARDED = (
    "LORAT_HOME", "MLFLOW_TRACKING_URI", "MLFLOW_S3_ENDPOINT_URL", "AWS_ENDPOINT_URL",
    "AWS_DEFAULT_REGION", "AWS_REGION", "HF_HOME", "HF_HUB_OFFLINE",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S",
)  # fmt: skip
"""Variables of the driver that the workers see too, where they are set.

No keys or passwords: Ray writes the environment of a job into its logs.  The nodes of a cluster
have those from where they were started; an embedded Ray inherits them.
"""


LOOPBACK = "127.0.0.1"
SOCKET_FOLDER = 40
"""Bytes of a folder's name that are left of the 107 of a socket's; Ray adds that of a session."""

MODE, TOKEN, TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """What :func:`connect` reached."""

    embedded: bool
    """Whether this process started it, so that it ends with this process."""
    address: str
    """GCS address, host:port."""
    cpus: float
    gpus: float
    nodes: int

    def __str__(self) -> str:
        where = "an embedded Ray" if self.embedded else f"Ray at {self.address}"
        gpus = f", {self.gpus:g} GPUs" if self.gpus else ""
        nodes = f"{self.nodes} node{'s' if self.nodes != 1 else ''}"
        return f"{where} ({nodes}, {self.cpus:g} CPUs{gpus})"


def package_folders() -> list[str]:
    """Return the folders of the two packages as imported here."""
    return [str(Path(p.__file__).parent) for p in (lorat, lorat_platform) if p.__file__]


def runtime_env(*, embedded: bool, extra: dict[str, str] | None = None) -> dict[str, Any]:
    """Return the runtime environment with which every worker imports both packages.

    Workers of an embedded Ray share this file system, so a path is enough.  A cluster may have
    nodes without the project, so the two packages are shipped.
    """
    env_vars = dict(ENVIRONMENT)
    env_vars |= {name: os.environ[name] for name in FORWARDED if name in os.environ}
    env_vars |= extra or {}
    for name in _job_variables():
        # A submitted job has them already, and Ray refuses to be told twice.
        env_vars.pop(name, None)
    if not embedded:
        return {
            "env_vars": env_vars,
            "py_modules": package_folders(),
            "excludes": ["__pycache__", "*.pyc"],
        }
    parents = dict.fromkeys(str(Path(folder).parent) for folder in package_folders())
    inherited = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
    env_vars["PYTHONPATH"] = os.pathsep.join([*reversed(parents), *inherited])
    return {"env_vars": env_vars}


def _job_variables() -> set[str]:
    """Return the environment variables that ``ray job submit`` gave this job's workers."""
    given = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    return set((given.get("runtime_env") or {}).get("env_vars") or {})


def connect(
    address: str | None = None,
    *,
    num_cpus: int | None = None,
    env: dict[str, str] | None = None,
) -> Cluster:
    """Connect this process to Ray.

    Args:
        address: host:port of a running cluster, ``auto``, or ``local``; none means
            ``RAY_ADDRESS``, and where that is not set an embedded Ray of this process.
        num_cpus: CPUs of an embedded Ray; none means those that this process may use.
        env: More environment variables for the workers.

    An embedded Ray listens on the loopback address only and answers only who has its token, which
    is random.  Nor does a Ray that others do not reach get a socket from here that they do.

    Raises:
        UserError: if no cluster answers at the address, it has a secret in it, or this process or
            what it started would listen for other machines though its Ray is for this one.
    """
    os.environ |= {k: v for k, v in ENVIRONMENT.items() if k not in os.environ}
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    refuse_secrets(address if "://" in address else f"ray://{address}", "The Ray address")

    import ray

    if ray.is_initialized():
        return describe(embedded=False)
    ray_internals.join_no_ray_unasked()
    embedded = address == "local"
    with Phases() as phases:
        phases.begin("starting Ray on this machine" if embedded else f"connecting to Ray {address}")
        return _connect(address, embedded=embedded, num_cpus=num_cpus, env=env)


def _connect(
    address: str, *, embedded: bool, num_cpus: int | None, env: dict[str, str] | None
) -> Cluster:
    """Connect to an address, ``local`` for an embedded Ray, as :func:`connect` does."""
    options: dict[str, Any] = {}
    if embedded:
        ray_internals.keep_to_loopback()
        _ask_for_a_token()
        options = {
            "num_cpus": num_cpus or len(os.sched_getaffinity(0)),
            "include_dashboard": False,
            "_node_ip_address": LOOPBACK,
        }
    elif address == "auto" or address.rpartition(":")[0] in (LOOPBACK, "localhost"):
        ray_internals.keep_to_loopback()
        ray_internals.use_token_of_this_user()
    if not embedded:
        check_address(address)
    options |= {
        "address": address,
        "runtime_env": runtime_env(embedded=embedded, extra=env),
        "log_to_driver": False,
        "logging_level": logging.WARNING,
    }
    try:
        _start_ray(options)
    except (ConnectionError, ValueError, RuntimeError) as error:
        if embedded:
            raise
        raise UserError(
            f"No Ray cluster answers at {address} ({_first_line(error)}); {REMEDY}."
        ) from error
    except OSError as error:
        if "AF_UNIX path length" not in str(error):
            raise
        named_by = ("RAY_TMPDIR", "TMPDIR")
        folder = next(filter(None, map(os.environ.get, named_by)), tempfile.gettempdir())
        raise UserError(
            f"The folder for temporary files {named(folder)} has {len(os.fsencode(folder))} bytes "
            f"in its name, too many for the sockets of Ray, which takes some {SOCKET_FOLDER}; set "
            "RAY_TMPDIR to a shorter one, such as /tmp."
        ) from error
    logging.getLogger("ray").setLevel(logging.WARNING)
    cluster = describe(embedded=embedded)
    open_doors = sockets.reachable() if embedded or _is_for_one_machine() else []
    if open_doors:
        disconnect()
        raise UserError(
            f"Other machines could reach this job ({'; '.join(open_doors)}), where Ray shall "
            "listen on the loopback address only; end what else this process started, or start "
            "a Ray for other machines with 'ray start --head' and name it with --address."
        )
    return cluster


def _is_for_one_machine() -> bool:
    """Tell whether Ray was started so that only its machine reaches it, as ``make run`` does."""
    import ray

    return all(node["NodeManagerAddress"] == LOOPBACK for node in ray.nodes() if node["Alive"])


def _ask_for_a_token() -> None:
    """Let the Ray that starts next answer only who has its token, a random one.

    Other users of this machine reach its loopback address, too.  A mode or a token that the user
    has set stay.
    """
    if os.environ.get(MODE, "token") != "token":
        return
    chosen = {MODE: "token"}
    if not os.environ.get(TOKEN) and not os.environ.get(TOKEN_PATH):
        chosen[TOKEN] = secrets.token_hex(32)
    _before.update({name: os.environ.get(name) for name in chosen})
    os.environ |= chosen
    ray_internals.read_token_again()


_before: dict[str, str | None] = {}
"""What the variables that were set for an embedded Ray were before."""


def _start_ray(options: dict[str, Any]) -> None:
    """Call ``ray.init``; on a very busy machine the parts of a new Ray may need a second try."""
    import ray

    def too_slow(error: BaseException) -> bool:
        return ray_internals.SLOW_START in str(error)

    with warnings.catch_warnings(), kept_handlers():
        warnings.simplefilter("ignore")
        tenacity.Retrying(
            stop=tenacity.stop_after_attempt(3),
            retry=tenacity.retry_if_exception(too_slow),
            before_sleep=lambda _: ray.shutdown(),
            reraise=True,
        )(ray.init, **options)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def describe(*, embedded: bool) -> Cluster:
    """Say what the connected cluster has now."""
    import ray

    alive = [node for node in ray.nodes() if node["Alive"]]
    resources = ray.cluster_resources()
    return Cluster(
        embedded=embedded,
        address=ray.get_runtime_context().gcs_address,
        cpus=resources.get("CPU", 0.0),
        gpus=resources.get("GPU", 0.0),
        nodes=len(alive),
    )


def disconnect() -> None:
    """Leave the cluster; an embedded one ends."""
    import ray

    with Phases() as phases:
        phases.begin("ending the connection to Ray", quiet=True)
        ray.shutdown()
    for name, value in _before.items():
        os.environ.pop(name)
        if value is not None:
            os.environ[name] = value
    if _before:
        _before.clear()
        ray_internals.read_token_again()


@contextlib.contextmanager
def connected(address: str | None = None, **options: Any) -> Iterator[Cluster]:
    """Connect for the length of a ``with`` block."""
    cluster = connect(address, **options)
    try:
        yield cluster
    finally:
        disconnect()
