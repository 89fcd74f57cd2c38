"""Serve a model to live video, with a page to try it on; the alias of a model is followed.

python jobs/serve.py
python jobs/serve.py --model models:/lorat@candidate --port 9000
python jobs/serve.py --replicas 2 --max-replicas 8 --host 0.0.0.0
"""

from __future__ import annotations

import bootstrap  # noqa: F401

import logging
import os
import secrets
import time
from dataclasses import dataclass, field
from typing import Annotated

import command
import flags
import tyro

from lorat.config import fields
from lorat.config.bounds import Bounds, check_bounds
from lorat_platform.cluster.connection import connected
from lorat_platform.evaluation.subject import load_subject
from lorat_platform.registry import versions
from lorat_platform.serving.application import TOKEN, Scale
from lorat_platform.serving.connections import BOUNDED
from lorat_platform.serving.running import serving
from lorat_platform.serving.settings import ServingSettings

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Serve a model until the process is stopped."""

    settings: tyro.conf.OmitArgPrefixes[ServingSettings] = field(default_factory=ServingSettings)
    scale: tyro.conf.OmitArgPrefixes[Scale] = field(default_factory=Scale)
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 lets other machines in."""
    port: Annotated[int, Bounds(1, 65_535)] = 8000
    """Port to listen on, 1 to 65,535."""
    address: str | None = None
    """Ray cluster, host:port; none means RAY_ADDRESS, or an embedded Ray."""
    token: bool = True
    """Serve only who gives the token of LORAT_SERVE_TOKEN, or the random one that is printed."""

    def __post_init__(self) -> None:
        check_bounds(self, fields.flag)


def main() -> None:
    """Run the job."""
    options = flags.parse(Options, description=__doc__)
    own = os.environ.get(TOKEN)
    token = (own or secrets.token_urlsafe(24)) if options.token else None
    model = options.settings.model or versions.usual()
    subject = load_subject(model, variant=options.settings.variant)
    with (
        connected(options.address, env=BOUNDED) as cluster,
        serving(
            options.settings, options.scale, host=options.host, port=options.port, token=token
        ) as url,
    ):
        log.info("%s (%s) on %s", subject.name, subject.variant, cluster)
        # A token of the environment may be one for long, and is not printed.
        page = f"{url}#ticket={token}" if token and not own else url
        log.info("Page: %s\nCtrl-C ends it.", page)
        while True:
            time.sleep(3600)


if __name__ == "__main__":
    command.run(main)
