"""The region that the calls to S3 are made in."""

import pytest

from batchclf.store.s3 import S3


@pytest.mark.parametrize("name", ["AWS_REGION", "AWS_DEFAULT_REGION"])
def test_it_is_that_of_the_environment(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for other in ("AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, "eu-west-3")
    client = S3.connect.__wrapped__(S3).client  # type: ignore[attr-defined]
    assert client.meta.region_name == "eu-west-3"
    client.close()
