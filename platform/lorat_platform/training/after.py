"""How long a training goes on after its last step: validation, evaluation and registration."""

from __future__ import annotations

from dataclasses import dataclass

from lorat.config.training import TrainConfig
from lorat_platform.cluster.connection import Cluster
from lorat_platform.data.sources import Datasets, open_indexes
from lorat_platform.training.options import RunOptions
from lorat_platform.training.resources import Placement

CPU_FLOPS = 2e10
"""What tracking reaches of a CPU thread."""
FRAME_S = 0.006
"""Reading, decoding and cropping a frame of 720p, on one thread."""
BASELINE_FPS = {"static": 200.0, "mil": 12.0, "csrt": 25.0}
"""Of one thread, reading included."""
START_S = 8.0
"""Processes that track one set with one tracker start, and measure its speed."""
REPORT_S = 4.0
REGISTER_S = 6.0
END_S = 4.0


@dataclass(frozen=True, kw_only=True)
class AfterLastStep:
    """The work after the last step."""

    forwards: float
    """Forward passes of the network on one pair, as a training worker takes them, one after
    another."""
    other_s: float

    def seconds(self, forward_s: float) -> float:
        """Return the time it takes, from that of one of the forward passes."""
        return self.forwards * forward_s + self.other_s

    @classmethod
    def plan(
        cls,
        config: TrainConfig,
        options: RunOptions,
        datasets: Datasets,
        cluster: Cluster,
        place: Placement,
        *,
        validated: bool,
        val_gpus: float,
    ) -> AfterLastStep:
        """Count what will be done.

        Args:
            config: resolved.
            options: of the run.
            datasets: validation sets.
            cluster: where the evaluation spreads.
            place: of the training workers.
            validated: whether checkpoints are validated, the last one after the last step.
            val_gpus: share of a GPU that a validation has.
        """
        from lorat.model.complexity import describe

        indexes = open_indexes(datasets.val)
        frames = sum(index.num_frames for index in indexes)
        sequences = sum(index.num_tracks for index in indexes)
        forwards, other_s = 0.0, END_S + (REGISTER_S if options.register else 0.0)
        if validated:
            tracked = frames * min(1.0, options.val_sequences / max(sequences, 1))
            threads = place.validation_threads
            other_s += tracked * FRAME_S / threads
            if place.use_gpu and val_gpus:
                forwards += options.val_pairs + tracked
            else:
                flops = 2.0 * describe(config.model_variant, config).macs
                other_s += (options.val_pairs + tracked) * flops / (CPU_FLOPS * threads)
        if indexes and options.final_evaluation:
            names = options.chosen_baselines(sequences)
            at_once = max(1, min(int(cluster.gpus or cluster.cpus), sequences))
            # Training workers share all CPUs, as those of the evaluation do.
            forwards += frames / (at_once if place.use_gpu else place.low)
            frame_s = FRAME_S + sum(1 / BASELINE_FPS[name] for name in names)
            other_s += frames * frame_s / at_once
            other_s += START_S * len(indexes) * (1 + len(names)) + REPORT_S
        return cls(forwards=forwards, other_s=other_s)
