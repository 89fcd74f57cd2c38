"""Claims of run folders, and renewals of them, in an object store."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from lorat.errors import UserError
from lorat.files.storage import Location, join, locate
from lorat_platform.runs.claim import Lease, check_held

KEYS = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_DEFAULT_REGION": "us-east-1",
}
"""What the server on this machine is given; it asks for no right ones."""
ROUNDS = 2
"""Claims of each driver."""


@dataclass(frozen=True, kw_only=True)
class ClaimRate:
    """What some drivers reach, each with a folder of its own."""

    drivers: int
    claims_per_s: float
    """Of all drivers: taken and given back."""
    renewals_per_s: float
    checks_per_s: float
    """Looks before a checkpoint is written."""


def measure_claims(sizes: list[int], storage: str | None) -> list[ClaimRate]:
    """Let each number of drivers claim, renew and check at once.

    Args:
        sizes: numbers of drivers, each a thread of a process.
        storage: folder or bucket; none means an S3 server on this machine.
    """
    if storage is not None:
        return [_measure(storage, size) for size in sizes]
    context = multiprocessing.get_context("spawn")
    with s3_server() as uri, ProcessPoolExecutor(1, context, _set, (KEYS,)) as pool:
        return [pool.submit(_measure, uri, size).result() for size in sizes]


@contextlib.contextmanager
def s3_server() -> Iterator[str]:
    """Run an S3 server on loopback in a process of its own; yield the address of a bucket.

    Raises:
        UserError: if its package is not installed.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs,), daemon=True)
    process.start()
    try:
        theirs.close()
        port = ours.recv()
        if port is None:
            raise UserError(
                "The S3 server for this measurement is not installed; install moto[server], or "
                "name a folder or bucket with --storage."
            )
        options = f"endpoint_override=http%3A%2F%2F127.0.0.1%3A{port}&scheme=http&region=us-east-1"
        yield f"s3://scale?{options}"
    finally:
        ours.close()
        process.join()


def _set(variables: dict[str, str]) -> None:
    os.environ.update(variables)


def _serve(sender: Any) -> None:
    _set(KEYS)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    try:
        import boto3
        from moto.server import ThreadedMotoServer
    except ImportError:
        sender.send(None)
        return
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}")
    client.create_bucket(Bucket="scale")
    sender.send(port)
    with contextlib.suppress(EOFError):
        sender.recv()  # until the other end is closed
    server.stop()


def _measure(storage: str, size: int) -> ClaimRate:
    name = f"claims-{uuid.uuid4().hex}"
    root = locate(join(storage, name))
    folders = [root.child(f"run-{number:03d}") for number in range(size)]
    for folder in folders:
        folder.make()
    with ThreadPoolExecutor(size) as pool:
        began = time.perf_counter()
        list(pool.map(_claim, folders))
        claimed = time.perf_counter()
        leases = list(pool.map(lambda folder: _lease(folder).claim(), folders))
        pairs = list(zip(leases, folders, strict=True)) * ROUNDS
        ready = time.perf_counter()
        list(pool.map(lambda lease: lease.confirm(), leases * ROUNDS))
        renewed = time.perf_counter()
        list(pool.map(lambda pair: check_held(pair[1], pair[0].token), pairs))
        checked = time.perf_counter()
        list(pool.map(lambda lease: lease.release(), leases))
    locate(storage).delete_folder(name)
    return ClaimRate(
        drivers=size,
        claims_per_s=size * ROUNDS / (claimed - began),
        renewals_per_s=size * ROUNDS / (renewed - ready),
        checks_per_s=size * ROUNDS / (checked - renewed),
    )


def _lease(folder: Location) -> Lease:
    return Lease(folder, "The folder of the benchmark", "let it end")


def _claim(folder: Location) -> None:
    for _ in range(ROUNDS):
        _lease(folder).claim().release()
