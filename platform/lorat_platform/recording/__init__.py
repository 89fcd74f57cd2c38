"""Runs in MLflow: written to a journal at once, delivered whenever the server takes them."""
