"""Train a LoRAT tracker on Ray, evaluate it by tracking, and register it in MLflow.

python jobs/train.py                                    the small tracker on synthetic videos
python jobs/train.py --data URI --val-data URI --variant B-224 --workers 4
"""

from __future__ import annotations

import bootstrap

import importlib
import logging
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import command
import flags
import tyro

from lorat.config.fields import from_dict
from lorat.config.json_files import read_json
from lorat.config.summary import summary
from lorat.config.training import TrainConfig, resolve
from lorat_platform import cluster
from lorat_platform.cluster.phases import Phases
from lorat_platform.data.sources import open_datasets, with_whole_paths
from lorat_platform.training.driver import train
from lorat_platform.training.options import RunOptions

log = logging.getLogger(__name__)

FLAT = tyro.conf.arg(name="")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Train a tracker, evaluate it by tracking, and register it."""

    train: Annotated[TrainConfig, FLAT] = field(default_factory=TrainConfig)
    run: Annotated[RunOptions, FLAT] = field(default_factory=RunOptions)
    config: Path | None = None
    """A config.json as saved with every run; options on the command line go before it."""
    dry_run: bool = False
    """Print the resolved configuration, sizes, memory, work and the device at hand, and exit."""
    replay: str | None = None
    """Run a batch again that gave a loss that is not finite, as the message names it."""


def read_config(file: Path) -> TrainConfig:
    """Read a saved configuration; also one with only some fields, or a checkpoint's header.

    Raises:
        UserError: if the file is missing or holds something else.
    """
    content = read_json(file, "give a config.json as saved with every run")
    if isinstance(content.get("config"), dict):
        content = content["config"]
    return from_dict(TrainConfig, content)


def parse(arguments: list[str]) -> Options:
    """Read the command line; ``--config FILE`` gives the defaults of the other options."""
    default = TrainConfig()
    for position, argument in enumerate(arguments):
        name, _, value = argument.partition("=")
        if name == "--config":
            following = arguments[position + 1 : position + 2]
            default = read_config(Path(value or (following[0] if following else "")))
    return flags.parse(Options, arguments, default=Options(train=default), description=__doc__)


def main() -> int:
    """Run the job."""
    options = parse(sys.argv[1:])
    if options.replay is not None:
        from lorat.learning.replay import replay

        print(replay(options.replay))
        return 0
    config = resolve(with_whole_paths(options.train))
    if options.dry_run:
        from lorat_platform.training.estimate import estimate

        print(summary(config))
        print(estimate(config, options.run))
        return 0
    log.info("%s", summary(config))
    with Phases() as phases:
        phases.begin("opening the data")
        datasets = open_datasets(config)
    # Torch loads while Ray starts; the driver needs it right after.
    threading.Thread(target=importlib.import_module, args=("torch",), daemon=True).start()
    revision = command.git_revision(bootstrap.ROOT)
    with cluster.connected(options.run.address) as ray_cluster:
        train(config, options.run, ray_cluster, datasets=datasets, git_revision=revision)
    return 0


if __name__ == "__main__":
    command.run(main, goes_on=True)
