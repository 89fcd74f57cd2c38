"""Following an alias: a version that it comes to mean is loaded beside the one that serves."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from lorat.errors import UserError
from lorat_platform.serving.served_model import ServedModel, load_served
from lorat_platform.serving.settings import ServingSettings

log = logging.getLogger(__name__)


class Following:
    """Looks where the alias points to, again and again, in a thread of its own.

    Args:
        settings: model, variant, time between two looks, longest latency.
        present: that serves.
        use: called with every new model that is fit; from the thread.
        refused: called with the name and the reason of one that is not, once; from the thread.
    """

    def __init__(
        self,
        settings: ServingSettings,
        present: ServedModel,
        use: Callable[[ServedModel], None],
        refused: Callable[[str, str], None],
    ) -> None:
        self._settings = settings
        self._present = present
        self._use, self._refused = use, refused
        self._stopped = threading.Event()
        self._bad: dict[str, str] = {}
        self.trouble: str | None = None
        """Why the alias could not be read the last time."""
        self._thread = threading.Thread(target=self._run, name="following", daemon=True)
        self._thread.start()

    @property
    def refusals(self) -> dict[str, str]:
        """Models that were refused, and why."""
        return dict(self._bad)

    def stop(self) -> None:
        """End the thread after what it does now."""
        self._stopped.set()

    def _run(self) -> None:
        while not self._stopped.wait(self._settings.poll_s):
            try:
                uri = self._settings.present()
            except UserError as error:
                if self.trouble is None:
                    log.warning("What serves goes on: %s", error)
                self.trouble = str(error)
                continue
            self.trouble = None
            if uri == self._present.uri:
                self._bad.clear()  # a rolled back version may be tried again
            elif uri not in self._bad:
                self._change_to(uri)

    def _change_to(self, uri: str) -> None:
        settings = self._settings
        try:
            model = load_served(
                uri, variant=settings.variant, max_latency_ms=settings.max_latency_ms
            )
        except Exception as error:  # whatever a version does when it is loaded, the old one serves
            self._bad[uri] = str(error).strip() or type(error).__name__
            log.error(
                "ALARM: %s is refused, %s goes on: %s", uri, self._present.uri, self._bad[uri]
            )
            self._refused(uri, self._bad[uri])
            return
        log.warning("%s serves now, after %s.", model.name, self._present.name)
        self._present = model
        self._use(model)
