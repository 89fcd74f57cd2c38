"""What happens when training workers fail: told, survived, or the end of the run."""

from __future__ import annotations

from typing import Any

from lorat.errors import UserError
from lorat_platform.cluster.console import Console
from lorat_platform.failures import _is_dead, cause, is_preempted, user_message

STARTING = "starting the training workers"
"""The phase before they say what they do."""


def watch_workers(console: Console, max_failures: int) -> Any:
    """Return Ray Train's callback that looks at what workers raised.

    Args:
        console: where failures are told.
        max_failures: failures in a row, without a new checkpoint in between, that are survived;
            -1 for any number.
    """
    from ray.train import UserCallback

    class WatchWorkers(UserCallback):
        """End the run when a worker says what the user can mend, or when it gets nowhere."""

        def __init__(self) -> None:
            self.failures = 0

        def after_report(
            self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any
        ) -> None:
            """Begin to count anew after every checkpoint."""
            if checkpoint is not None:
                self.failures = 0

        def after_exception(
            self, run_context: Any, worker_exceptions: dict[int, Exception]
        ) -> None:
            """Look at what the workers raised."""
            for rank, error in sorted(worker_exceptions.items()):
                message = user_message(error)
                if message is not None:
                    raise UserError(message)
                if "CUDA out of memory" in str(error):
                    raise UserError(
                        f"The GPU of worker {rank} ran out of memory; give a smaller "
                        "--micro-batch (the batch stays the same), --activation-checkpointing or "
                        "--frozen-dtype bf16, and the same command goes on."
                    )
                console.line(f"worker {rank} failed: {cause(error)}")
            console.phase(f"{STARTING} again")
            if any(is_preempted(error) for error in worker_exceptions.values()):
                return
            self.failures += 1
            if not 0 <= max_failures < self.failures:
                return
            # Of workers that fail together, the one that died is why the others could not go on.
            dead = [rank for rank, error in worker_exceptions.items() if _is_dead(error)]
            rank = min(dead or worker_exceptions)
            error = worker_exceptions[rank]
            for note in [] if dead else getattr(error, "__notes__", []):
                console.line(note)
            times = f"{self.failures} times" if self.failures > 1 else "once"
            raise UserError(
                f"Training workers failed {times} without a new checkpoint in between, more than "
                f"--max-failures {max_failures}, the last time worker {rank}: "
                f"{cause(error).rstrip('.')}; the same command goes on from the last checkpoint."
            )

    return WatchWorkers()
