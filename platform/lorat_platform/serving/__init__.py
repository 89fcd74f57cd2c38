"""Serving a registered tracker to live video: sessions, batches, changes of the model."""
