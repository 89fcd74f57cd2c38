"""The resources of a training's workers: who gets what, and whether it fits."""

from __future__ import annotations

from dataclasses import dataclass

from lorat.errors import UserError
from lorat_platform.cluster.connection import Cluster
from lorat_platform.training.options import RunOptions


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Resources of the training workers."""

    low: int
    high: int
    use_gpu: bool
    cpus: float
    """CPUs per worker."""
    threads: int | None
    """Torch threads per worker; none on a GPU."""
    spare_gpus: float
    validation_threads: int
    """CPU threads of a validation that gets no GPU."""

    @classmethod
    def plan(cls, options: RunOptions, cluster: Cluster, batch_size: int) -> Placement:
        """Choose what each worker asks for.

        Raises:
            UserError: if the cluster can never give it, or there are more workers than pairs.
        """
        low, high = options.workers_for(batch_size)
        use_gpu = options.device == "gpu" or (options.device == "auto" and cluster.gpus >= 1)
        total = int(cluster.cpus)
        if use_gpu:
            cpus = options.cpus_per_worker or max(1, min(4, total // (2 * high)))
        else:
            cpus = options.cpus_per_worker or max(1, total // high)
        if cluster.embedded:
            if low * cpus > total:
                raise UserError(
                    f"{low} workers with {cpus} CPUs each do not fit into the {total} CPUs of this "
                    "machine; lower --workers or --cpus-per-worker, or give a cluster's --address."
                )
            if use_gpu and low > cluster.gpus:
                raise UserError(
                    f"{low} workers need a GPU each and this machine has {cluster.gpus:g}; lower "
                    "--workers, or give --device cpu."
                )
        return cls(
            low=low,
            high=high,
            use_gpu=use_gpu,
            cpus=cpus,
            threads=None if use_gpu else cpus,
            spare_gpus=max(0.0, cluster.gpus - high) if use_gpu else 0.0,
            validation_threads=max(1, min(8, int(total - high * cpus))) if use_gpu else 1,
        )

    def wanted(self) -> str:
        """Say what the fewest workers ask for."""
        gpus = f" and {self.low} GPUs" if self.use_gpu else ""
        return f"{self.low * self.cpus:g} CPUs{gpus}"

    def missing(self, cluster: Cluster) -> str | None:
        """Say what the cluster does not have yet for the fewest workers, if so."""
        enough = self.low * self.cpus <= cluster.cpus
        if enough and (not self.use_gpu or self.low <= cluster.gpus):
            return None
        there = f"{cluster.cpus:g} CPUs and {cluster.gpus:g} GPUs"
        return f"{self.wanted()} are asked for, {there} are there"
