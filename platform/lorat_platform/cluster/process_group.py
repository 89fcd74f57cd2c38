"""The process group of training workers, which listens no further than they need.

Ray Train's own set-up lets the first worker's store listen on every address of its machine, and
whoever reaches that may read and change what the workers exchange.
"""

from __future__ import annotations

import datetime
import os
import socket
from dataclasses import dataclass
from typing import Any

import psutil
import torch.distributed as dist
from ray.train.torch import TorchConfig

from lorat_platform.cluster import ray_internals
from lorat_platform.cluster.connection import LOOPBACK

_kept: list[dist.Store] = []
"""The store of this worker, which serves the others as long as its process lives."""


@dataclass
class PrivateTorchConfig(TorchConfig):
    """As Ray Train's: workers of one node meet on its loopback address, others on their nodes' own.

    A worker alone has nobody to meet and listens nowhere.
    """

    @property
    def backend_cls(self) -> type:
        """What starts the process group."""
        return _PrivateTorchBackend


_TorchBackend: Any = ray_internals.torch_backend()


class _PrivateTorchBackend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        import ray

        size = len(worker_group)
        hosts = worker_group.execute(_node_address)
        together = len(set(hosts)) == 1
        gpus = worker_group.get_resources_per_worker().get("GPU", 0)
        backend = backend_config.backend or ("nccl" if gpus > 0 else "gloo")
        host = LOOPBACK if together else hosts[0]
        port = worker_group.execute_single(0, _serve, host, size) if size > 1 else None
        joins = [
            worker_group.execute_single_async(
                rank,
                _join,
                rank,
                size,
                backend,
                None if port is None else (host, port),
                _interface(LOOPBACK) if together else None,
                backend_config.timeout_s,
            )
            for rank in range(size)
        ]
        ray.get(joins)


def _node_address() -> str:
    import ray.util

    return ray.util.get_node_ip_address()


def _interface(address: str) -> str | None:
    """Return the name of this machine's network interface that has the address, or none."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(known.address == address for known in addresses):
            return name
    return None


def _serve(host: str, size: int) -> int:
    """Start the store of the group in this process, on one address; return its port."""
    with socket.create_server((host, 0)) as listener:
        port = listener.getsockname()[1]
        # The store closes the descriptor that it is given.
        _kept[:] = [
            dist.TCPStore(
                host,
                port,
                size,
                is_master=True,
                wait_for_workers=False,
                master_listen_fd=os.dup(listener.fileno()),
            )
        ]
    return port


def _join(
    rank: int,
    size: int,
    backend: str,
    store_address: tuple[str, int] | None,
    interface: str | None,
    timeout_s: int,
) -> None:
    """Make this process a member of the group."""
    if store_address is None:
        store: dist.Store = dist.HashStore()
    elif rank == 0:
        store = _kept[0]
    else:
        store = dist.TCPStore(*store_address, size, is_master=False)
    # Between nodes gloo would ask for the address of the host's name, which is often loopback.
    own = interface or _interface(_node_address())
    if own is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", own)
    if interface is not None:
        os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)
    dist.init_process_group(
        backend,
        store=store,
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=timeout_s),
    )
