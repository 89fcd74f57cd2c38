"""A training on the cluster: driver, workers, validation, and what comes after the last step."""
