"""Measure the platform on this machine.

python jobs/benchmark.py data       the pair stream, stage by stage, beside its limit
python jobs/benchmark.py train      the step loop beside bare PyTorch; memory of LoRA and full
python jobs/benchmark.py search     early stopping beside full training of all trials
python jobs/benchmark.py scale      what breaks first on 8, 64 and 256 GPUs
python jobs/benchmark.py --describe B-224     parameters and work of a model
"""

from __future__ import annotations

import bootstrap  # noqa: F401  (makes the packages importable)

import logging
import sys

import command
import flags

from lorat.errors import UserError

log = logging.getLogger(__name__)


def main() -> int:
    """Run the job."""
    first, *rest = sys.argv[1:] or ["--help"]
    if first == "data":
        from lorat_platform.data.benchmark import DataBenchmark, benchmark_data

        benchmark_data(flags.parse(DataBenchmark, rest))
    elif first == "train":
        from lorat_platform.training.benchmark import TrainBenchmark, benchmark_train

        benchmark_train(flags.parse(TrainBenchmark, rest))
    elif first == "search":
        from lorat_platform.search.benchmark import SearchBenchmark, benchmark_search

        benchmark_search(flags.parse(SearchBenchmark, rest))
    elif first == "scale":
        from lorat_platform.scale.benchmark import ScaleBenchmark, benchmark_scale

        benchmark_scale(flags.parse(ScaleBenchmark, rest))
    elif first in ("-h", "--help"):
        print(__doc__.strip())
    elif first == "--describe" or first.startswith("--describe="):
        from lorat.config.variants import VARIANTS
        from lorat.model.complexity import describe

        name = first.partition("=")[2] or " ".join(rest)
        for variant in [name] if name else VARIANTS:
            print(describe(variant).text)
    else:
        raise UserError(
            f"There is no benchmark {first}; give data, train, search, scale or --describe."
        )
    return 0


if __name__ == "__main__":
    command.run(main)
