"""Addresses of clusters: is Ray there, before anything waits for it."""

from __future__ import annotations

import socket

from lorat.errors import UserError
from lorat_platform.cluster import ray_internals

CONNECT_S = 5.0
"""Longest wait for a machine to take a connection."""
ANSWER_S = 5.0
"""Longest wait for the first bytes of what answers there."""
_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
"""How a client of gRPC begins: the preface of HTTP/2 and empty settings (RFC 9113, section 3.4)."""
_SETTINGS = 4
"""Type of the frame with which a server answers it."""
REMEDY = (
    "start one with 'ray start --head', correct --address or RAY_ADDRESS, or unset it for an "
    "embedded Ray"
)


def check_address(address: str) -> None:
    """Look whether a Ray cluster answers at an address, and answers this user, in some 10 s.

    ``ray.init`` would try for minutes, and hear no signal meanwhile.

    Args:
        address: host:port, or ``auto``.

    Raises:
        UserError: that says what is wrong there.
    """
    if address.startswith(("http://", "https://")):
        raise UserError(
            f"{address} is the address of a dashboard, which takes jobs; give the cluster's own, "
            "host:port with the port 6379 unless it was started with another."
        )
    let_in = True
    try:
        place = ray_internals.address_of(address)
        host, _, port = place.rpartition(":")
        reason = _why_silent(host.strip("[]"), int(port))
        let_in = bool(reason) or ray_internals.lets_in(place)
    except (ValueError, ConnectionError) as error:
        lines = str(error).strip().splitlines()
        reason = lines[0].rstrip(".") if lines else type(error).__name__
    if reason:
        raise UserError(f"No Ray cluster answers at {address} ({reason}); {REMEDY}.")
    if not let_in:
        raise UserError(
            f"The Ray cluster at {address} does not let this user in: its token is another, or is "
            "missing here; set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH."
        )


def _why_silent(host: str, port: int) -> str:
    """Return why nothing that speaks gRPC answers there, else nothing."""
    try:
        with socket.create_connection((host, port), timeout=CONNECT_S) as connection:
            connection.settimeout(ANSWER_S)
            connection.sendall(_HELLO)
            answer = b""
            while len(answer) < 9 and (more := connection.recv(9 - len(answer))):
                answer += more
    except TimeoutError:
        return f"nothing came from there for {CONNECT_S:.0f} s"
    except OSError as error:
        return error.strerror or str(error)
    return "" if answer[3:4] == bytes([_SETTINGS]) else "what answers there is no Ray"
