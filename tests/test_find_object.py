import pytest
from servers import Endpoint

from batchclf.errors import InputError
from batchclf.store import Source, find_object

pytestmark = pytest.mark.usefixtures("s3_of_this_process")


def put(server: Endpoint, bucket: str, key: str, content: bytes = b"text\nwords\n") -> Source:
    etag = server.s3.put_object(Bucket=bucket, Key=key, Body=content)["ETag"]
    return Source(f"s3://{bucket}/{key}", etag, len(content))


@pytest.mark.parametrize("key", ["a.csv", "in/a b+c%20d ü.csv", "in/[a]*?.csv", "A.JSONL.GZ"])
def test_an_object_is_found_by_its_exact_name_in_its_current_version(
    s3_server: Endpoint, bucket: str, key: str
) -> None:
    expected = put(s3_server, bucket, key)
    found = find_object(expected.uri)
    assert (found, found.size_bytes) == (expected, expected.size_bytes)


@pytest.mark.parametrize("key", ["in/*.csv", "in/?.csv", "in/[a].csv", "in/", "in", "in/b.csv"])
def test_a_name_is_neither_a_glob_nor_a_prefix(s3_server: Endpoint, bucket: str, key: str) -> None:
    put(s3_server, bucket, "in/a.csv")
    with pytest.raises(InputError, match="no such object"):
        find_object(f"s3://{bucket}/{key}")


def test_a_bucket_that_is_not_there_is_an_input_error(s3_server: Endpoint) -> None:
    with pytest.raises(InputError, match="there is no such"):
        find_object("s3://no-bucket-of-this-name/a.csv")


def test_an_object_of_no_known_kind_is_an_input_error(s3_server: Endpoint, bucket: str) -> None:
    expected = put(s3_server, bucket, "a.exe")
    with pytest.raises(InputError, match=r"not a \.parquet"):
        find_object(expected.uri)
