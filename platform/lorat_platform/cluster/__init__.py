"""The Ray cluster of a job: connecting, who listens where, places, and lines for the person."""

from lorat_platform.cluster.connection import Cluster, connect, connected, disconnect, runtime_env

__all__ = ["Cluster", "connect", "connected", "disconnect", "runtime_env"]
