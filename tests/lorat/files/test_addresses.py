"""Passwords and keys in addresses are refused, and left out of what is shown."""

from __future__ import annotations

import re

import pytest

from lorat.config.training import TrainConfig
from lorat.errors import UserError
from lorat.files.addresses import refuse_secrets, without_secrets
from lorat.files.storage import locate

BEARING = [
    ("s3://KEY:PLANTED@bucket/a", "s3://bucket/a"),
    ("s3://KEY:PLAN/TED+PLANTED@bucket/a", "s3://bucket/a"),
    ("s3://PLANTED@bucket/a", "s3://bucket/a"),
    ("a=s3://open/x,b=s3://KEY:PLANTED@bucket/y*2", "a=s3://open/x,b=s3://bucket/y*2"),
    ("http://me:PLANTED@server:5000/x", "http://server:5000/x"),
    ("https://PLANTED@server/x", "https://server/x"),
    ("postgresql+psycopg2://me:PLAN@TED@db/mlflow", "postgresql+psycopg2://db/mlflow"),
    (
        "s3://bucket/a?access_key=PLANTED&secret_key=PLANTED&scheme=http",
        "s3://bucket/a?access_key=***&secret_key=***&scheme=http",
    ),
    ("s3://b/a?scheme=http&session_token=PLANTED", "s3://b/a?scheme=http&session_token=***"),
    ("http://server/a?X-Amz-Signature=PLANTED", "http://server/a?X-Amz-Signature=***"),
]
FREE = [
    "s3://bucket/a?endpoint_override=http://127.0.0.1:9000&scheme=http",
    "s3://bucket/a:b@c",
    "gs://anonymous@bucket/a",
    "http://127.0.0.1:5000/a@b",
    "http://[::1]:5000/a@b",
    "postgresql://mlflow@db/mlflow",
    "sqlite:////home/me@work:x@y/mlflow.db",
    "file:///data/a:b@c",
    "models:/lorat@champion",
    "head.depth=choice(1,2)",
]


@pytest.mark.parametrize(("address", "shown"), BEARING)
def test_a_secret_is_refused_and_not_repeated(address: str, shown: str) -> None:
    with pytest.raises(UserError, match=f"^--storage {re.escape(shown)} was given with") as caught:
        refuse_secrets(address, "--storage")
    assert not re.search("PLAN|TED", str(caught.value))
    assert "environment or a file for credentials" in str(caught.value)
    assert without_secrets(f"no answer from {address}, again") == f"no answer from {shown}, again"


def test_an_encoded_secret_is_refused_as_well() -> None:
    for address in (
        "s3://bucket?endpoint_override=http%3A%2F%2Fme%3APLANTED%40server",
        "s3://bucket?%73ecret_key=PLANTED",
    ):
        with pytest.raises(UserError) as caught:
            refuse_secrets(address, "data")
        assert "PLANTED" not in str(caught.value)


@pytest.mark.parametrize("address", FREE)
def test_an_address_without_a_secret_is_left_as_it_is(address: str) -> None:
    refuse_secrets(address, "--storage")
    assert without_secrets(address) == address


def test_places_and_configurations_take_no_secret() -> None:
    with pytest.raises(UserError, match="AWS_SECRET_ACCESS_KEY"):
        locate("s3://KEY:PLANTED@bucket")
    for name in ("data", "val_data", "init_from"):
        with pytest.raises(UserError, match=f"^{name} s3://bucket"):
            TrainConfig(**{name: "s3://KEY:PLANTED@bucket"})
