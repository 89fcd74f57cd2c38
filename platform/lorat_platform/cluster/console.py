"""Lines from workers anywhere in the cluster, printed by the driver in order."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Sequence
from typing import Any, Literal

from lorat_platform.cluster.phases import Phases

POLL_S = 0.25
END_S = 10.0
"""Longest wait for the last lines."""
KEPT = 10_000

Kind = int | Literal["phase", "quiet phase"]
"""Of what is sent: a line of a level of logging, or a phase."""


class _Lines:
    """The actor: keeps lines until the driver has fetched them."""

    def __init__(self) -> None:
        self._lines: list[tuple[Kind, str]] = []
        self._dropped = 0

    def write(self, kind: Kind, line: str, *_: Any) -> None:
        """Append a line; Ray waits for the other arguments, which are results of other calls."""
        if len(self._lines) >= KEPT:
            self._dropped += 1
            return
        self._lines.append((kind, line))

    def take(self) -> list[tuple[Kind, str]]:
        """Return and forget all lines."""
        lines, self._lines = self._lines, []
        if self._dropped:
            lines.append((logging.WARNING, f"{self._dropped} lines of the workers were dropped"))
            self._dropped = 0
        return lines


class Console(logging.Handler):
    """A logging handler that can be sent to any worker; what it gets is printed by the driver."""

    def __init__(self, actor: Any) -> None:
        super().__init__()
        self.actor = actor
        self.setFormatter(logging.Formatter("%(message)s"))

    def __reduce__(self) -> tuple[Any, ...]:
        return Console, (self.actor,)

    def emit(self, record: logging.LogRecord) -> None:
        """Send a record of a worker's log."""
        try:
            self.actor.write.remote(record.levelno, self.format(record))
        except Exception:
            self.handleError(record)

    def line(self, text: str, after: Sequence[Any] = ()) -> None:
        """Send a line, which is shown once the calls ``after`` have been answered, if they are."""
        self.actor.write.remote(logging.INFO, text, *after)

    def phase(self, text: str = "", *, quiet: bool = False) -> None:
        """Tell which phase the training goes over to; none for one of which nothing is said.

        Args:
            text: as for :meth:`lorat_platform.cluster.phases.Phases.begin`.
            quiet: as there.
        """
        self.actor.write.remote("quiet phase" if quiet else "phase", text)

    def install(self, level: int = logging.INFO) -> None:
        """Let the logs of both packages in this process go here."""
        self.setLevel(level)
        for name in ("lorat", "lorat_platform"):
            logger = logging.getLogger(name)
            logger.handlers = [h for h in logger.handlers if not isinstance(h, Console)]
            logger.addHandler(self)
            logger.setLevel(min(level, logging.INFO))
            logger.propagate = False


class ConsolePrinter:
    """The driver's end: makes the actor, and prints in a thread while it is entered.

    Args:
        phases: what the workers' phases are told; none for nothing.
    """

    def __init__(self, phases: Phases | None = None) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        actor = ray.remote(_Lines).options(
            num_cpus=0, scheduling_strategy=here, max_restarts=-1, max_task_retries=-1
        )
        self.console = Console(actor.remote())
        self._phases = phases or Phases()
        self._log = logging.getLogger("lorat_platform.workers")
        self._asked: Any = None
        """A question to the actor that was not answered yet: it may take long to start."""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="console", daemon=True)

    def __enter__(self) -> Console:
        self._thread.start()
        return self.console

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=5.0)
        with contextlib.suppress(Exception):  # the cluster may be gone; its error is told elsewhere
            self._print(END_S)
            self._print(END_S)  # what came after the question that the first one has answered

    def _loop(self) -> None:
        import ray

        while not self._stop.wait(POLL_S):
            try:
                self._print(POLL_S)
            except ray.exceptions.RayError:
                return

    def _print(self, patience_s: float) -> None:
        """Print what the actor has; where it does not answer yet, a later call takes the answer."""
        import ray

        if self._asked is None:
            self._asked = self.console.actor.take.remote()
        if not ray.wait([self._asked], timeout=patience_s)[0]:
            return
        answer, self._asked = self._asked, None
        for kind, line in ray.get(answer):
            if isinstance(kind, int):
                self._log.log(kind, "%s", line)
            elif line:
                self._phases.begin(line, quiet=kind == "quiet phase")
            else:
                self._phases.end()
