"""A session: one video, its targets, and the frames that wait.

The methods are called under the lock of the engine that has the session, but for those of the
thread that tracks, which are marked.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from lorat.errors import UserError
from lorat.image.boxes import Box
from lorat_platform.serving import messages
from lorat_platform.serving.messages import Add, Drop, Order, SetOrder, SetRaw
from lorat_platform.serving.settings import ServingSettings

if TYPE_CHECKING:
    from lorat.tracking.tracker import FirstView, Target
    from lorat_platform.serving.served_model import ServedModel

MAX_WAITING_BYTES = 64_000_000
"""Of the frames of a session that wait, beyond the first."""


@dataclass(frozen=True)
class WaitingFrame:
    """A frame that came and was not tracked yet."""

    number: int
    data: memoryview
    raw: tuple[int, int] | None
    commands: tuple[Add | Drop, ...]
    """What changes with this frame."""
    skipped: int
    """Frames before it that gave way to it."""
    came: float
    """On the monotonic clock."""


@dataclass
class Followed:
    """A target of a session."""

    view: FirstView
    """What its template is made from, also for another model."""
    target: Target
    box: Box
    """Where it is, xyxy pixels."""
    score: float
    prepared: tuple[ServedModel, Target] | None = None
    """The target for a model that is to come."""


@dataclass(eq=False)
class Session:
    """One video."""

    id: str
    settings: ServingSettings
    answer: Callable[[dict[str, Any]], None]
    """Called with every answer, from the thread that tracks."""
    model: ServedModel
    """Which tracks its targets now; that of the thread that tracks."""
    followed: dict[str, Followed] = field(default_factory=dict)
    """By name; that of the thread that tracks."""
    order: Order = "strict"
    ended: str | None = None
    """Why the session is over; an empty text means that the client ended it."""
    last_message: float = field(default_factory=time.monotonic)
    last_number: int = -1
    answered: int = 0
    read: int = 0

    def __post_init__(self) -> None:
        self._frames: deque[WaitingFrame] = deque()
        self._waiting_bytes = 0
        self._commands: list[Add | Drop] = []
        self._raw: tuple[int, int] | None = None
        self._names: set[str] = set()

    @property
    def waiting(self) -> int:
        """Frames that wait."""
        return len(self._frames)

    @property
    def waiting_bytes(self) -> int:
        """Their size."""
        return self._waiting_bytes

    @property
    def has_work(self) -> bool:
        """Whether a frame waits that may be tracked: a client that does not read gets no answer."""
        unread = self.answered - self.read
        return bool(self._frames) and self.ended is None and unread < self.settings.window

    def command(self, given: Add | Drop | SetOrder | SetRaw) -> None:
        """Take a command.

        Raises:
            UserError: if it cannot be obeyed.
        """
        self.last_message = time.monotonic()
        if isinstance(given, SetOrder):
            if self.last_number >= 0:
                raise UserError("The order is given after the first frame; give it before.")
            self.order = given.order
        elif isinstance(given, SetRaw):
            self._raw = given.size
        elif isinstance(given, Add):
            if given.name in self._names:
                raise UserError(f"The target {given.name!r} is there already; drop it first.")
            if len(self._names) >= self.settings.max_targets:
                raise UserError(
                    f"The session has {len(self._names)} targets, the most that it may have; drop "
                    "one first."
                )
            self._names.add(given.name)
            self._commands.append(given)
        else:
            if given.name not in self._names:
                raise UserError(f"There is no target {given.name!r} to drop.")
            self._names.remove(given.name)
            self._commands.append(given)
        if len(self._commands) > 4 * self.settings.max_targets:
            raise UserError(
                f"{len(self._commands)} targets were added and dropped since the last frame; send "
                "a frame."
            )

    def frame(self, number: int, read: int, data: memoryview) -> None:
        """Take a frame.

        Raises:
            UserError: if it cannot be one, or too many wait.
        """
        self.last_message = time.monotonic()
        settings = self.settings
        if number <= self.last_number:
            raise UserError(
                f"The frame has the number {number} after {self.last_number}; numbers must grow."
            )
        if not self.read <= read <= self.answered:
            raise UserError(
                f"The frame says that {read} answers were read, where {self.answered} were sent "
                f"and {self.read} read before."
            )
        if len(data) > settings.max_frame_bytes:
            raise UserError(
                f"The frame has {len(data)} bytes; give at most {settings.max_frame_bytes:,}."
            )
        messages.check_image(data, self._raw, settings.max_frame_pixels)
        self.last_number, self.read = number, read
        skipped = 0
        if self.order == "newest":
            while self._frames and not self._frames[-1].commands:
                dropped = self._frames.pop()
                self._waiting_bytes -= len(dropped.data)
                skipped += 1 + dropped.skipped
        waiting = self._waiting_bytes
        if (self._frames and waiting + len(data) > MAX_WAITING_BYTES) or (
            len(self._frames) >= settings.window
        ):
            raise UserError(
                f"{len(self._frames)} frames ({waiting:,} bytes) wait to be tracked, and more than "
                f"{settings.window} frames or {MAX_WAITING_BYTES:,} bytes may not: read the "
                "answers and send no faster than they come, or choose the order newest."
            )
        self._frames.append(
            WaitingFrame(number, data, self._raw, tuple(self._commands), skipped, self.last_message)
        )
        self._waiting_bytes += len(data)
        self._commands.clear()

    def take(self) -> WaitingFrame:
        """Return the frame to track now, which waits no longer."""
        self.answered += 1
        taken = self._frames.popleft()
        self._waiting_bytes -= len(taken.data)
        return taken

    def end(self, why: str = "") -> None:
        """End the session; nothing more is tracked."""
        if self.ended is None:
            self.ended = why
        self._frames.clear()
        self._waiting_bytes = 0

    def obey(self, image: np.ndarray, commands: Iterable[Add | Drop]) -> list[str]:
        """Add and drop targets; for the thread that tracks.

        Returns:
            The names of those that are new with this frame.

        Raises:
            UserError: if a box lies outside of the frame.
        """
        from lorat.tracking.tracker import FirstView

        new = []
        for command in commands:
            if isinstance(command, Drop):
                del self.followed[command.name]
                continue
            view = FirstView.of(image, command.box)
            (target,) = self.model.tracker.start_from([view])
            kept = view.reduced(self.model.kept_area_factor)
            box = command.at or view.box
            target.box = box
            self.followed[command.name] = Followed(kept, target, box, 1.0)
            new.append(command.name)
        return [name for name in new if name in self.followed]

    def prepare(self, model: ServedModel) -> None:
        """Make the targets for a model to which the session is to move; in any thread."""
        for each in list(self.followed.values()):
            with contextlib.suppress(UserError):  # which the move will meet, too
                (target,) = model.tracker.start_from([each.view])
                each.prepared = model, target

    def move(self, model: ServedModel) -> None:
        """Go on with another model, from the same first views and boxes; in the thread that tracks.

        Raises:
            UserError: if the other cannot begin with them; then nothing has changed.
        """
        old = list(self.followed.values())
        prepared = [each.prepared for each in old]  # once, as another thread may replace them
        targets = [
            known[1] if known and known[0] is model else model.tracker.start_from([each.view])[0]
            for each, known in zip(old, prepared, strict=True)
        ]
        for each, target in zip(old, targets, strict=True):
            target.box = each.target.box
            each.target, each.prepared = target, None
        self.model = model
