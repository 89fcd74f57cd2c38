"""Tracking whole sets of sequences, spread over the cluster, and reporting their scores."""
