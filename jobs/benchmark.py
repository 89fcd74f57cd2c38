"""Measure the platform on this machine.

python jobs/benchmark.py data       the pair stream, stage by stage, beside its limit
python jobs/benchmark.py train      the step loop beside bare PyTorch; memory of LoRA and full
python jobs/benchmark.py track      frames per second, stage by stage, one video and many
python jobs/benchmark.py search     early stopping beside full training of all trials
python jobs/benchmark.py curves     trains configurations with several seeds, to replay searches
python jobs/benchmark.py certify    replays searches: what a race of their best trials finds
python jobs/benchmark.py serve      targets per second, changes of the model, a lost replica
python jobs/benchmark.py scale      what breaks first on 8, 64 and 256 GPUs
python jobs/benchmark.py --describe B-224     parameters and work of a model

Each names the device; --json FILE also writes the figures.
"""

from __future__ import annotations

import bootstrap  # noqa: F401  (makes the packages importable)

import dataclasses
import importlib
import logging
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import command
import flags

from lorat.config.json_files import write_json
from lorat.errors import UserError
from lorat.files.outputs import check_file
from lorat_platform.cluster.machine import device_name, processor_name

log = logging.getLogger(__name__)


BENCHMARKS = {
    "data": "data.benchmark",
    "train": "training.benchmark",
    "track": "evaluation.benchmark",
    "search": "search.benchmark",
    "curves": "search.curves",
    "certify": "search.certify",
    "serve": "serving.benchmark",
    "scale": "scale.benchmark",
}
"""What can be measured, and the module that does it."""


def main() -> int:
    """Run the job."""
    first, *rest = sys.argv[1:] or ["--help"]
    if name := BENCHMARKS.get(first):
        module = importlib.import_module(f"lorat_platform.{name}")
        kind, benchmark = f"{first.title()}Benchmark", f"benchmark_{first}"
        measure(getattr(module, kind), getattr(module, benchmark), rest)
    elif first in ("-h", "--help"):
        print(__doc__.strip())
    elif first == "--describe" or first.startswith("--describe="):
        from lorat.config.variants import VARIANTS
        from lorat.model.complexity import describe

        name = first.partition("=")[2] or " ".join(rest)
        for variant in [name] if name else VARIANTS:
            print(describe(variant).text)
    else:
        known = ", ".join(BENCHMARKS)
        raise UserError(f"There is no benchmark {first}; give {known} or --describe.")
    return 0


def measure(
    kind: type[Any], benchmark: Callable[[Any], dict[str, Any]], arguments: Sequence[str]
) -> None:
    """Run a benchmark: name the device, and write its figures where --json says.

    Args:
        kind: dataclass of its options.
        benchmark: takes them and returns its figures.
        arguments: of the command line.
    """

    @dataclass(frozen=True, kw_only=True)
    class Asked(kind):
        json: Path | None = None
        """Also write the figures, the options and the device's name into this file."""

    options = flags.parse(Asked, arguments, description=kind.__doc__)
    if options.json is not None:
        check_file(options.json)
    device = device_name(getattr(options, "device", "auto"))
    log.info("On %s:", device)
    figures = benchmark(options)
    if options.json is not None:
        about = {
            "benchmark": kind.__name__,
            "device": device,
            "processor": processor_name(),
            "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
            "options": dataclasses.asdict(options),
        }
        write_json(plain(about | {"figures": figures}), options.json)
        log.info("The figures are in %s.", options.json)


def plain(value: Any) -> Any:
    """Return what JSON can hold: texts for paths and the like, null for no finite number."""
    if isinstance(value, dict):
        return {str(name): plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | None) else str(value)


if __name__ == "__main__":
    command.run(main)
