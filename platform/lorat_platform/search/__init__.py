"""Searches for good configurations with Ray Tune."""
