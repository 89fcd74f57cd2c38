"""Data on the cluster: ingesting datasets, naming them, streaming pairs to the workers."""
