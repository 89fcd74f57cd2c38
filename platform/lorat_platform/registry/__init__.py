"""Trackers as registered models of MLflow."""
