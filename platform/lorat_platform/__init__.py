"""Ray Data, Ray Train, Ray Tune and MLflow around the tracker in :mod:`lorat`."""
