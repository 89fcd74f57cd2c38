"""The sockets on which processes wait for others, and who could reach them."""

from __future__ import annotations

import contextlib
import ipaddress

import psutil


def is_loopback(host: str) -> bool:
    """Tell whether only this machine reaches an IP address."""
    address = ipaddress.ip_address(host)
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def reachable() -> list[str]:
    """Return where this process or a descendant listens for other machines.

    Returns:
        ``PROGRAM on ADDRESS:PORT``, sorted; empty where all of them listen on loopback only.
    """
    found = set()
    this = psutil.Process()
    for process in (this, *this.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            for connection in process.net_connections("tcp"):
                if connection.status == psutil.CONN_LISTEN and not is_loopback(connection.laddr.ip):
                    host, port = connection.laddr
                    host = f"[{host}]" if ":" in host else host
                    found.add(f"{process.name()} on {host}:{port}")
    return sorted(found)
