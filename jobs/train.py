"""Train a LoRAT tracker on Ray, evaluate it by tracking, and register it in MLflow.

python jobs/train.py                                    the small tracker on synthetic videos
python jobs/train.py --data URI --val-data URI --variant B-224 --workers 4
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Annotated, Any

import bootstrap
import tyro

from lorat.config import TrainConfig, from_dict, resolve
from lorat.errors import UserError
from lorat_platform import cluster, command
from lorat_platform.run_options import RunOptions
from lorat_platform.sources import open_datasets, with_whole_paths
from lorat_platform.training import resolved_text, train

log = logging.getLogger(__name__)

FLAT = tyro.conf.arg(name="")


def train_job(
    train: Annotated[TrainConfig, FLAT],
    run: Annotated[RunOptions, FLAT],
    config: Path | None = None,
    dry_run: bool = False,
    replay: str | None = None,
) -> tuple[TrainConfig, RunOptions, bool, Path | None]:
    """Train a tracker, evaluate it by tracking, and register it.

    Args:
        train: What is learnt.
        run: Where and how it runs.
        config: A config.json as saved with every run; options on the command line go before it.
        dry_run: Print the resolved configuration, sizes, memory and work, and exit.
        replay: Run a batch again that gave a loss that is not finite, as the message names it.
    """
    return train, run, dry_run, replay


def read_config(file: Path) -> TrainConfig:
    """Read a saved configuration; also one with only some fields, or a checkpoint's header.

    Raises:
        UserError: if the file is missing or holds something else.
    """
    try:
        content = json.loads(file.read_text())
    except OSError as error:
        raise UserError(f"The configuration {file} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise UserError(f"The configuration {file} is no JSON ({error}).") from error
    if isinstance(content, dict) and isinstance(content.get("config"), dict):
        content = content["config"]
    if not isinstance(content, dict):
        raise UserError(f"The configuration {file} is no JSON object.")
    return from_dict(TrainConfig, content)


def parse(arguments: list[str]) -> tuple[TrainConfig, RunOptions, bool, Path | None]:
    """Read the command line; ``--config FILE`` gives the defaults of the other options."""
    default = TrainConfig()
    for position, argument in enumerate(arguments):
        name, _, value = argument.partition("=")
        if name == "--config":
            following = arguments[position + 1 : position + 2]
            default = read_config(Path(value or (following[0] if following else "")))

    def job(
        train: Annotated[TrainConfig, FLAT] = default,
        run: Annotated[RunOptions, FLAT] = RunOptions(),  # noqa: B008 (frozen)
        config: Path | None = None,
        dry_run: bool = False,
        replay: str | None = None,
    ) -> Any:
        return train_job(train, run, config, dry_run, replay)

    job.__doc__ = train_job.__doc__
    return command.parse(job, arguments)


def main() -> int:
    """Run the job."""
    config, options, dry_run, replay = parse(sys.argv[1:])
    if replay is not None:
        from lorat_platform.replay import replay as replay_dump

        print(replay_dump(replay))
        return 0
    config = resolve(with_whole_paths(config))
    if dry_run:
        from lorat_platform.estimate import estimate

        print(resolved_text(config))
        print(estimate(config, options))
        return 0
    log.info("%s", resolved_text(config))
    datasets = open_datasets(config)
    revision = command.git_revision(bootstrap.ROOT)
    with cluster.connected(options.address) as ray_cluster:
        train(config, options, ray_cluster, datasets=datasets, git_revision=revision)
    return 0


if __name__ == "__main__":
    command.run(main)
