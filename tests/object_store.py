"""An S3-compatible object store on loopback, for tests."""

from __future__ import annotations

import contextlib
import os
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

KEYS = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_DEFAULT_REGION": "us-east-1",
}
"""What the environment must hold."""


@dataclass
class ObjectStore:
    """A server with the bucket ``videos``."""

    server: Any
    endpoint: str

    def pause(self) -> None:
        """Stop answering; what is stored stays."""
        self.server.stop()

    def resume(self) -> None:
        """Answer again, at the same address."""
        from moto.server import ThreadedMotoServer

        port = int(self.endpoint.rpartition(":")[2])
        self.server = ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
        self.server.start()

    def uri(self, path: str) -> str:
        """Return the address of a folder in the bucket."""
        endpoint = self.endpoint.replace(":", "%3A").replace("/", "%2F")
        options = f"endpoint_override={endpoint}&scheme=http&region=us-east-1"
        return f"s3://videos/{path}?{options}"


@contextlib.contextmanager
def object_store() -> Iterator[ObjectStore]:
    """Run the server; ``KEYS`` must be in the environment."""
    import boto3
    from moto.server import ThreadedMotoServer

    assert KEYS.items() <= os.environ.items()
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    store = ObjectStore(server, f"http://{host}:{port}")
    # All servers of a process share what is stored; a test begins with nothing.
    urllib.request.urlopen(f"{store.endpoint}/moto-api/reset", data=b"", timeout=10).close()
    client = boto3.client("s3", endpoint_url=store.endpoint, region_name="us-east-1")
    client.create_bucket(Bucket="videos")
    client.close()
    try:
        yield store
    finally:
        store.server.stop()
