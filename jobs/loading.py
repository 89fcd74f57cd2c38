"""The first phase of every job: its imports, which take long where the disk has to be asked."""

from __future__ import annotations

import functools

from lorat_platform.cluster.phases import Phases

LOADING = Phases(functools.partial(print, flush=True))
"""Goes on from the import of ``bootstrap`` to :func:`command.run`."""
