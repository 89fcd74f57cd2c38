"""Starting the application on a Ray, and ending it."""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import Iterator

from lorat.errors import UserError
from lorat_platform.cluster import ray_internals
from lorat_platform.serving.application import Scale, application
from lorat_platform.serving.settings import ServingSettings

log = logging.getLogger(__name__)

NAME = "lorat"


@contextlib.contextmanager
def serving(
    settings: ServingSettings, scale: Scale, *, host: str, port: int, token: str | None
) -> Iterator[str]:
    """Serve for the length of a ``with`` block, on the Ray that this process is connected to.

    Args:
        settings: of every replica.
        scale: how many, and with what.
        host, port: to listen on.
        token: that clients must give; none serves everybody.

    Yields:
        The URL of the page.

    Raises:
        UserError: if the port is taken, or no replica can start.
    """
    from ray import serve

    _check_port(host, port)
    serve.start(
        proxy_location="HeadOnly" if host in ("127.0.0.1", "localhost", "::1") else "EveryNode",
        http_options={"host": host, "port": port, "request_timeout_s": None},
        logging_config={"log_level": "WARNING", "enable_access_log": False},
    )
    try:
        try:
            serve.run(application(settings, scale, token), name=NAME, route_prefix="/")
        except RuntimeError as error:
            raise UserError(f"No replica could start: {_cause()}") from error
        yield f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}/"
    finally:
        if not ray_internals.end_serve():
            log.warning("Ray Serve has not ended in time; what is left ends with its Ray.")


def _check_port(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind((host, port))
        except OSError as error:
            raise UserError(
                f"Port {port} of {host} cannot be had ({error.strerror}); end what listens there "
                "or give another --port."
            ) from error


def _cause() -> str:
    """Return the last line of what Ray Serve says of replicas that did not start."""
    from ray import serve

    status = serve.status().applications.get(NAME)
    deployments = status.deployments.values() if status else []
    lines = [line for each in deployments for line in each.message.strip().splitlines()]
    return lines[-1].strip() if lines else "Ray Serve does not say why."
