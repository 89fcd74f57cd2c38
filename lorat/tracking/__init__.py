"""The tracker: one pass over a video from the box in its first frame."""
