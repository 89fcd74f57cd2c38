"""The application of Ray Serve: replicas that track, and the routes to them.

``serve run lorat_platform.serving.application:build model=models:/lorat@champion`` starts it on any
cluster, as the manifest of a RayService does; ``jobs/serve.py`` starts it on this machine.  What it
does not start by itself, Ray or ``serve run``, needs the variable of
:mod:`lorat_platform.serving.connections` where it starts, or its proxies have no bounds.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
import random
import re
import sys
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import ray
from ray import serve
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from ray.serve.request_router import FIFOMixin, PendingRequest, RequestRouter, RunningReplica

from lorat.config import fields
from lorat.config.bounds import Bounds, check_bounds
from lorat.errors import UserError
from lorat_platform.cluster import ray_internals
from lorat_platform.cluster.connection import LOOPBACK
from lorat_platform.registry import versions
from lorat_platform.serving.drift import Drift, stored_reference
from lorat_platform.serving.engine import Engine
from lorat_platform.serving.following import Following
from lorat_platform.serving.publishing import Publishing
from lorat_platform.serving.score_board import SharedBoard
from lorat_platform.serving.served_model import load_served
from lorat_platform.serving.settings import ServingSettings
from lorat_platform.serving.shadow import Shadow
from lorat_platform.serving.web import make_app

log = logging.getLogger(__name__)

TOKEN = "LORAT_SERVE_TOKEN"
"""Variable with the token that clients must give."""
MIN_TOKEN = 16
OTHER_REQUESTS = 64
"""Requests besides the sessions that a replica works on at the same time."""


PATIENT = {"OMP_WAIT_POLICY": "PASSIVE"}
"""Environment of replicas: the threads of a product sleep until they are needed.  By default they
spin, and where others want the same cores, such as the proxy and a model that is loaded, a pass of
the network then takes many times as long."""

SWITCH_S = 0.0002
"""Longest time for which a thread of Python keeps others waiting.  A pass of the network asks for
its turn at every product, and loading a model is work in Python: with Python's own 5 ms, frames
waited for a tenth of a second."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How many replicas there are, and what each of them has."""

    replicas: Annotated[int, Bounds(1, 10_000)] = 1
    """Replicas, or the fewest of them, 1 to 10,000."""
    max_replicas: Annotated[int, Bounds(1, 10_000)] | None = None
    """The most replicas, 1 to 10,000: there are as many as the sessions need; none means that their
    number is fixed."""
    sessions_per_replica: Annotated[float, Bounds(0, 100_000, above=True)] = 16.0
    """Sessions of a replica above which there is one more, more than 0, at most 100,000."""
    cpus: Annotated[float, Bounds(0, 1024)] = 1.0
    """CPUs of a replica, 0 to 1024."""
    gpus: Annotated[float, Bounds(0, 8)] | None = None
    """GPUs of a replica, 0 to 8, of which a fraction is shared; none means one where there are
    some."""

    def __post_init__(self) -> None:
        check_bounds(self, fields.flag)
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise UserError(
                f"The most replicas are {self.max_replicas}, fewer than the {self.replicas} that "
                "there are at least; give more."
            )


class SessionRouter(FIFOMixin, RequestRouter):
    """Sends what names a session to the replica that has it, the rest to the less busy of two."""

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Return the replicas to try."""
        if pending_request is not None:
            owner = pending_request.metadata.session_id.partition(".")[0]
            for replica in candidate_replicas if owner else ():
                if replica.replica_id.unique_id == owner:
                    return [[replica]]
        return [random.sample(candidate_replicas, min(2, len(candidate_replicas)))]


class Replica:
    """A process that tracks for many sessions."""

    def __init__(self, settings: dict[str, Any], token_sha256: str | None) -> None:
        self.is_local = ray.util.get_node_ip_address() == LOOPBACK
        """Whether this is a Ray of one machine, for it alone."""
        if self.is_local:
            ray_internals.keep_replica_to_loopback()
        sys.setswitchinterval(SWITCH_S)
        self.token_sha256 = token_sha256
        self.settings = ServingSettings(**settings)
        uri = self.settings.present()
        model = load_served(
            uri,
            variant=self.settings.variant,
            max_latency_ms=self.settings.max_latency_ms,
        )
        context = serve.get_replica_context()
        name = context.replica_id.unique_id
        self.engine = Engine(model, self.settings, name)
        self.following = (
            Following(self.settings, model, self.engine.use, self._refused)
            if self.settings.follows
            else None
        )
        self.drift = Drift(_reference, self._drifted, SharedBoard(context.app_name, name))
        self.engine.observe(self.drift.observe)
        self.shadow = self._load_shadow()
        self.publishing = Publishing(self.engine, self.drift, self.shadow)

    def __serve_build_asgi_app__(self) -> Any:
        """Return the web side; Ray Serve calls it in the event loop of the replica."""
        # A replica elsewhere than the proxy would send clients to a port of another machine.
        return make_app(self.engine, self.token_sha256, self.status, direct=self.is_local)

    def _load_shadow(self) -> Shadow | None:
        settings = self.settings
        if settings.shadow is None:
            return None
        model = load_served(
            versions.pinned(settings.shadow), variant=None, max_latency_ms=settings.max_latency_ms
        )
        shadow = Shadow(model, settings.shadow_share)
        self.engine.observe(shadow.observe)
        return shadow

    def _drifted(self, sentence: str) -> None:
        log.error("ALARM: %s", sentence)
        self.engine.statistics.count("drifts")

    def _refused(self, name: str, why: str) -> None:
        self.engine.statistics.count("refused_models")

    def status(self) -> dict[str, Any]:
        """Return what ``/status`` shows."""
        engine = self.engine
        following = self.following
        shown = {
            "replica": engine.name,
            "follows": self.settings.model or f"{versions.CHAMPION}, or {versions.CANDIDATE}",
            "model": engine.model.name,
            "variant": engine.model.tracker.variant.name,
            "latency_ms": round(engine.model.latency_ms, 2),
            "device": str(engine.model.tracker.device),
            "sessions": engine.num_sessions,
            "models": engine.models_in_use(),
            "drift": self.drift.index(engine.model.name),
            "counts": engine.statistics.counts(),
            "p50_p99": engine.statistics.quantiles(0.5, 0.99),
        }
        if self.shadow is not None:
            shown["shadow"] = {
                beside: {"model": self.shadow.model.name} | agreement.metrics()
                for beside, agreement in self.shadow.agreements.items()
            }
        if following is not None:
            shown |= {"refused": following.refusals, "trouble": following.trouble}
        return shown

    def check_health(self) -> None:
        """Tell Ray Serve whether this replica works.

        Raises:
            RuntimeError: if it does not.
        """
        if not self.engine.is_alive:
            raise RuntimeError("The thread that tracks has ended.")

    def __del__(self) -> None:
        """End the sessions with a reason; Ray Serve calls it when the replica is to stop."""
        if hasattr(self, "engine"):
            if self.following is not None:
                self.following.stop()
            self.publishing.stop()
            self.engine.stop()


def _reference(model: str) -> np.ndarray | None:
    """Return the histogram of scores that a registered version was evaluated with.

    Raises:
        UserError: if MLflow cannot be reached.
    """
    name, _, version = model.partition("/")
    if not version.isdigit():
        return None
    return stored_reference(versions.tags_of(name, version).get(versions.SCORE_HISTOGRAM))


def application(settings: ServingSettings, scale: Scale, token: str | None) -> serve.Application:
    """Make the application.

    Args:
        settings: of every replica.
        scale: how many, and with what.
        token: that clients must give; replicas are told its hash only, since Ray keeps what they
            are told.  None means that everybody is served.

    Raises:
        UserError: if the token can be guessed.
    """
    gpus = scale.gpus if scale.gpus is not None else float(_has_gpus())
    options: dict[str, Any] = {"num_replicas": scale.replicas}
    if scale.max_replicas is not None:
        options = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=scale.replicas,
                max_replicas=scale.max_replicas,
                target_ongoing_requests=scale.sessions_per_replica,
            )
        }
    deployment = serve.deployment(
        name="tracking",
        ray_actor_options={
            "num_cpus": scale.cpus,
            "num_gpus": gpus,
            "runtime_env": {"env_vars": PATIENT},
        },
        max_ongoing_requests=settings.max_sessions + OTHER_REQUESTS,
        max_queued_requests=OTHER_REQUESTS,
        request_router_config=RequestRouterConfig(
            request_router_class=SessionRouter,  # type: ignore[arg-type]  # typed as its kwargs are
        ),
        health_check_period_s=5,
        health_check_timeout_s=30,
        graceful_shutdown_timeout_s=5,
        max_constructor_retry_count=3,
        logging_config={"enable_access_log": False},
        **options,
    )(serve.ingress()(Replica))
    return deployment.bind(dataclasses.asdict(settings), _hash(token))


def _has_gpus() -> bool:
    return ray.is_initialized() and ray.cluster_resources().get("GPU", 0) > 0


def build(args: dict[str, str]) -> serve.Application:
    """Make the application for ``serve run`` and for a RayService.

    Args:
        args: fields of :class:`ServingSettings` and :class:`Scale` by name, as text.  The token
            comes from the variable ``LORAT_SERVE_TOKEN``; ``token: none`` serves everybody.

    Raises:
        UserError: if one of them cannot be used, or there is no token.
    """
    given = dict(args)
    token = None if given.pop("token", "") == "none" else os.environ.get(TOKEN, "")
    parts = {}
    for cls in (ServingSettings, Scale):
        known = {field.name for field in dataclasses.fields(cls)}
        named = {name: given.pop(name) for name in list(given) if name in known}
        parts[cls] = {name: _value(value) for name, value in named.items()}
    if given:
        raise UserError(
            f"There is no setting {min(given)}; give those of ServingSettings and Scale."
        )
    return application(ServingSettings(**parts[ServingSettings]), Scale(**parts[Scale]), token)


def _value(text: Any) -> Any:
    """Return a number where the text is one."""
    if isinstance(text, str) and re.fullmatch(r"\d+", text):
        return int(text)
    if isinstance(text, str) and re.fullmatch(r"\d*\.\d+(e-?\d+)?", text):
        return float(text)
    return text


def _hash(token: str | None) -> str | None:
    if token is None:
        return None
    if len(token) < MIN_TOKEN:
        raise UserError(
            f"The token of {TOKEN} has {len(token)} characters; give {MIN_TOKEN} or more random "
            "ones, or serve everybody who reaches the port with token none."
        )
    return hashlib.sha256(token.encode()).hexdigest()
