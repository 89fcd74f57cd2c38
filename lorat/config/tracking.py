"""Constants of tracking that whoever runs the network elsewhere has to know."""

WINDOW_PENALTY = 0.45
"""Weight of the Hann window against the score."""

MIN_OBJECT_SIZE = 10.0
"""Smallest side of the box that the search crop is computed from, in frame pixels."""
