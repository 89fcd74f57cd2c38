"""A mixture is read as it is documented, and wrong ones are refused in a sentence."""

from __future__ import annotations

import pytest

from lorat.errors import UserError
from lorat_platform.sources import parse_sources


def test_names_and_weights_are_optional() -> None:
    (only,) = parse_sources("/data/got10k-train")
    assert (only.name, only.uri, only.weight) == ("got10k-train", "/data/got10k-train", 1.0)
    lasot, coco = parse_sources("lasot=s3://bucket/lasot?endpoint_override=x, coco=/data/coco*0.5")
    assert (lasot.name, lasot.uri) == ("lasot", "s3://bucket/lasot?endpoint_override=x")
    assert (coco.name, coco.uri, coco.weight) == ("coco", "/data/coco", 0.5)


@pytest.mark.parametrize("text", ["", "a=/x,,b=/y", "/x*0", "/x*-1", "/x*many", "/a/x,/b/x"])
def test_a_wrong_mixture_is_refused(text: str) -> None:
    with pytest.raises(UserError):
        parse_sources(text)
