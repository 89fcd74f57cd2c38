"""Datasets as Parquet shards with an index of their frames: written, read, verified."""
