"""What a server is told: which model, how it batches, and what it takes at most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from lorat.config import fields
from lorat.config.bounds import Bounds, Share, check_bounds
from lorat_platform.registry import versions

Seconds = Annotated[float, Bounds(0, 86_400, above=True)]
Milliseconds = Annotated[float, Bounds(0, 60_000, above=True)]
Few = Annotated[int, Bounds(1, 100_000)]
Bytes = Annotated[int, Bounds(1_000, 1_000_000_000)]


@dataclass(frozen=True, kw_only=True)
class ServingSettings:
    """What every replica is told."""

    model: str | None = None
    """Registered model, checkpoint folder or released file; an alias is followed.  None means the
    champion, or the candidate as long as there is none."""
    variant: str | None = None
    """Variant of a released file, which does not name it."""
    poll_s: Seconds = 5.0
    """Time between two looks at the alias, more than 0, at most 86,400 seconds."""
    max_latency_ms: Milliseconds = 1000.0
    """A new version that needs longer for one target is refused, more than 0, at most 60,000."""
    shadow: str | None = None
    """Model that tracks beside and never answers; what both found is compared in an MLflow run."""
    shadow_share: Share = 0.1
    """Share of the sessions that the shadow sees, 0 to 1."""
    batch_wait_ms: Annotated[float, Bounds(0, 1000)] = 3.0
    """Longest wait of a frame for those of other sessions, 0 to 1000 milliseconds."""
    max_batch: Few = 64
    """Targets in one pass of the network, 1 to 100,000."""
    max_sessions: Few = 256
    """Sessions of a replica, 1 to 100,000."""
    max_targets: Few = 64
    """Targets of a session, 1 to 100,000."""
    max_frame_bytes: Bytes = 16_000_000
    """Size of a frame as it is sent, 1,000 to 1,000,000,000 bytes.  More than 16,777,200 only over
    plain HTTP: a message of a WebSocket is larger than Ray Serve takes then."""
    max_frame_pixels: Bytes = 16_777_216
    """Pixels of a frame, 1,000 to 1,000,000,000."""
    idle_s: Seconds = 60.0
    """A session without a message for this long ends, more than 0, at most 86,400 seconds."""
    window: Annotated[int, Bounds(1, 10_000)] = 32
    """Frames that wait, and answers that a client has not read, of a session, 1 to 10,000."""

    def __post_init__(self) -> None:
        check_bounds(self, fields.flag)

    @property
    def follows(self) -> bool:
        """Whether the model may be another one later."""
        return self.model is None or versions.pinned(self.model) != self.model

    def present(self) -> str:
        """Return the model as it is meant now, with a version instead of an alias.

        Raises:
            UserError: if there is none, or MLflow cannot be reached.
        """
        return versions.usual_alias()[1] if self.model is None else versions.pinned(self.model)
