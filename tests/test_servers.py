"""What the other tests rely on: how the servers behave, and that none outlives the tests."""

import functools
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
import servers
from botocore.exceptions import ClientError, FlexibleChecksumError
from fault_proxy import FaultProxy
from fault_rules import Fault, FlipReply, FlipRequest, Match
from servers import Endpoint, Queue

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

ANOTHER_ETAG = '"0123456789abcdef0123456789abcdef"'


def status_of(call: Callable[..., Any], **arguments: Any) -> int:
    """The HTTP status that a call ends with, as success or as an error."""
    try:
        reply = call(**arguments)
    except ClientError as error:
        reply = error.response
    status: int = reply["ResponseMetadata"]["HTTPStatusCode"]
    return status


def error_code_of(call: Callable[..., Any], **arguments: Any) -> str:
    with pytest.raises(ClientError) as caught:
        call(**arguments)
    return caught.value.response["Error"]["Code"]


def start_upload(s3: "S3Client", bucket: str, key: str, body: bytes) -> dict[str, Any]:
    """Upload one part; returns the arguments that complete the upload."""
    upload = s3.create_multipart_upload(Bucket=bucket, Key=key, ChecksumAlgorithm="CRC32")
    place: dict[str, Any] = {"Bucket": bucket, "Key": key, "UploadId": upload["UploadId"]}
    part = s3.upload_part(PartNumber=1, Body=body, **place)
    parts = [{"PartNumber": 1, "ETag": part["ETag"], "ChecksumCRC32": part["ChecksumCRC32"]}]
    return {**place, "MultipartUpload": {"Parts": parts}}


# Conditional writes


def test_a_create_only_put_of_an_existing_key_is_refused(s3_server: Endpoint, bucket: str) -> None:
    put = s3_server.s3.put_object
    assert status_of(put, Bucket=bucket, Key="k", Body=b"1", IfNoneMatch="*") == 200
    assert status_of(put, Bucket=bucket, Key="k", Body=b"2", IfNoneMatch="*") == 412


def test_a_create_only_completion_on_an_existing_key_is_refused(
    s3_server: Endpoint, bucket: str
) -> None:
    s3 = s3_server.s3
    late = start_upload(s3, bucket, "k", b"late")
    first = start_upload(s3, bucket, "k", b"first")
    assert status_of(s3.complete_multipart_upload, **first, IfNoneMatch="*") == 200
    assert status_of(s3.complete_multipart_upload, **late, IfNoneMatch="*") == 412


def test_completing_the_same_upload_again_succeeds(s3_server: Endpoint, bucket: str) -> None:
    complete = s3_server.s3.complete_multipart_upload
    upload = start_upload(s3_server.s3, bucket, "k", b"1")
    assert [status_of(complete, **upload, IfNoneMatch="*") for _ in range(2)] == [200, 200]


def test_an_upload_that_is_not_completed_is_invisible(s3_server: Endpoint, bucket: str) -> None:
    start_upload(s3_server.s3, bucket, "k", b"1")
    assert s3_server.s3.list_objects_v2(Bucket=bucket)["KeyCount"] == 0


def test_of_simultaneous_create_only_puts_one_succeeds(s3_server: Endpoint, bucket: str) -> None:
    def put(key: str) -> int:
        return status_of(
            s3_server.s3.put_object, Bucket=bucket, Key=key, Body=b"x" * 100_000, IfNoneMatch="*"
        )

    with ThreadPoolExecutor(6) as pool:
        for key in ("a", "b", "c", "d", "e"):
            assert sorted(pool.map(put, [key] * 6)) == [200, *[412] * 5]


def test_of_simultaneous_create_only_completions_one_succeeds(
    s3_server: Endpoint, bucket: str
) -> None:
    s3 = s3_server.s3
    uploads = [start_upload(s3, bucket, "k", b"%d" % i) for i in range(6)]

    def complete(upload: dict[str, Any]) -> int:
        return status_of(s3.complete_multipart_upload, **upload, IfNoneMatch="*")

    with ThreadPoolExecutor(6) as pool:
        assert sorted(pool.map(complete, uploads)) == [200, *[412] * 5]


def test_rclone_ignores_the_condition_of_a_put(rclone: Endpoint) -> None:
    put = rclone.s3.put_object
    with servers.fresh_bucket(rclone) as bucket:
        status_of(put, Bucket=bucket, Key="k", Body=b"1", IfNoneMatch="*")
        assert status_of(put, Bucket=bucket, Key="k", Body=b"2", IfNoneMatch="*") == 200


def test_rclone_ignores_the_condition_of_a_completion(rclone: Endpoint) -> None:
    s3 = rclone.s3
    with servers.fresh_bucket(rclone) as bucket:
        s3.put_object(Bucket=bucket, Key="k", Body=b"1")
        place: dict[str, Any] = {"Bucket": bucket, "Key": "k"}
        place["UploadId"] = s3.create_multipart_upload(**place)["UploadId"]
        part = s3.upload_part(PartNumber=1, Body=b"2", **place)
        parts = {"Parts": [{"PartNumber": 1, "ETag": part["ETag"]}]}
        complete = s3.complete_multipart_upload
        assert status_of(complete, **place, MultipartUpload=parts, IfNoneMatch="*") == 200


# Conditional reads


@pytest.mark.parametrize("extra", [{}, {"Range": "bytes=0-3"}])
def test_a_read_that_expects_another_etag_is_refused(
    s3_server: Endpoint, bucket: str, extra: dict[str, str]
) -> None:
    s3_server.s3.put_object(Bucket=bucket, Key="k", Body=b"hello world")
    get = s3_server.s3.get_object
    assert status_of(get, Bucket=bucket, Key="k", IfMatch=ANOTHER_ETAG, **extra) == 412


def test_a_replaced_object_has_another_etag(s3_server: Endpoint, bucket: str) -> None:
    etags = [
        s3_server.s3.put_object(Bucket=bucket, Key="k", Body=body)["ETag"] for body in (b"1", b"2")
    ]
    assert etags[0] != etags[1]


# Checksums


def test_an_object_put_with_defaults_comes_with_its_crc32(s3_server: Endpoint, bucket: str) -> None:
    s3_server.s3.put_object(Bucket=bucket, Key="k", Body=b"hello world")
    assert s3_server.s3.get_object(Bucket=bucket, Key="k")["ChecksumCRC32"] == "DUoRhQ=="


def test_a_bit_flipped_in_a_whole_read_is_noticed(
    proxy: FaultProxy, proxied: Endpoint, bucket: str
) -> None:
    proxied.s3.put_object(Bucket=bucket, Key="k", Body=b"hello world")
    proxy.add(Fault(Match(operation="GetObject"), FlipReply()))
    body = proxied.s3.get_object(Bucket=bucket, Key="k")["Body"]
    with pytest.raises(FlexibleChecksumError):
        body.read()


def test_a_bit_flipped_in_a_range_goes_unnoticed(
    proxy: FaultProxy, proxied: Endpoint, bucket: str
) -> None:
    proxied.s3.put_object(Bucket=bucket, Key="k", Body=b"hello world")
    proxy.add(Fault(Match(operation="GetObject"), FlipReply(index=0)))
    reply = proxied.s3.get_object(Bucket=bucket, Key="k", Range="bytes=0-4")
    assert reply["Body"].read() == b"iello"


def test_a_bit_flipped_in_an_object_made_of_parts_goes_unnoticed(
    proxy: FaultProxy, proxied: Endpoint, bucket: str
) -> None:
    """Its checksum is one of checksums (`...-1`), which botocore does not check."""
    s3 = proxied.s3
    s3.complete_multipart_upload(**start_upload(s3, bucket, "k", b"hello world"))
    proxy.add(Fault(Match(operation="GetObject"), FlipReply(index=0)))
    reply = s3.get_object(Bucket=bucket, Key="k")
    assert reply["ChecksumCRC32"].endswith("-1")
    assert reply["Body"].read() == b"iello world"


def test_ministack_refuses_a_bit_flipped_on_the_way_in(ministack: Endpoint) -> None:
    with (
        servers.fresh_bucket(ministack) as bucket,
        FaultProxy(ministack.endpoint_url) as proxy,
        closing(Endpoint(proxy.endpoint_url)) as proxied,
    ):
        proxy.add(Fault(Match(operation="PutObject"), FlipRequest()))
        put = proxied.s3.put_object
        assert error_code_of(put, Bucket=bucket, Key="k", Body=b"hello world") == "BadDigest"


def test_moto_keeps_the_checksum_of_what_was_meant(moto: Endpoint) -> None:
    """It stores a payload that was flipped on the way in; reading it back shows the difference."""
    with (
        servers.fresh_bucket(moto) as bucket,
        FaultProxy(moto.endpoint_url) as proxy,
        closing(Endpoint(proxy.endpoint_url)) as proxied,
    ):
        proxy.add(Fault(Match(operation="PutObject"), FlipRequest()))
        proxied.s3.put_object(Bucket=bucket, Key="k", Body=b"hello world")
        body = moto.s3.get_object(Bucket=bucket, Key="k")["Body"]
        with pytest.raises(FlexibleChecksumError):
            body.read()


# Errors


def test_a_missing_key_and_a_missing_bucket_have_codes_of_their_own(
    s3_server: Endpoint, bucket: str
) -> None:
    get = s3_server.s3.get_object
    assert error_code_of(get, Bucket=bucket, Key="k") == "NoSuchKey"
    assert error_code_of(get, Bucket=f"no-{bucket}", Key="k") == "NoSuchBucket"


def test_a_head_tells_no_more_than_404(s3_server: Endpoint, bucket: str) -> None:
    head = s3_server.s3.head_object
    assert error_code_of(head, Bucket=bucket, Key="k") == "404"
    assert error_code_of(head, Bucket=f"no-{bucket}", Key="k") == "404"


def test_rclone_refuses_unknown_keys(rclone: Endpoint) -> None:
    with closing(Endpoint(rclone.endpoint_url, access_key="unknown")) as stranger:
        assert error_code_of(stranger.s3.list_buckets) == "InvalidAccessKeyId"


def test_rclone_refuses_wrong_signatures(rclone: Endpoint) -> None:
    with closing(Endpoint(rclone.endpoint_url, secret_key="wrong")) as stranger:
        assert error_code_of(stranger.s3.list_buckets) == "SignatureDoesNotMatch"


# Processes


def test_a_server_ends_with_its_context(tmp_path: Path) -> None:
    before = set(psutil.Process().children())
    with servers.moto(tmp_path):
        (server,) = set(psutil.Process().children()) - before
    assert not server.is_running()


def test_a_tethered_process_dies_with_a_parent_that_is_killed() -> None:
    program = (
        "import subprocess, sys, servers\n"
        "command = [sys.executable, '-c', 'import time; time.sleep(600)']\n"
        "with subprocess.Popen(servers.tethered(command)):\n"
        "    print('started', flush=True)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        cwd=Path(servers.__file__).parent,
    )
    with parent:
        assert parent.stdout is not None
        parent.stdout.readline()
        parent.kill()
        # The pipe ends when its last writer, the tethered process, is gone.
        parent.communicate(timeout=20)


def test_a_server_that_is_not_installed_is_named_with_the_way_to_get_it(tmp_path: Path) -> None:
    with (
        pytest.raises(servers.ServerMissingError, match="pip install ministack"),
        servers.ministack(tmp_path, tmp_path / "venv"),
    ):
        pass


def test_a_server_that_does_not_start_shows_its_log(tmp_path: Path) -> None:
    program = tmp_path / "bin" / "ministack"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho out of luck\nexit 3\n")
    program.chmod(0o755)
    with (
        pytest.raises(servers.ServerStartError, match=r"(?s)exit status 3.*out of luck"),
        servers.ministack(tmp_path, tmp_path),
    ):
        pass


# Queues


@pytest.mark.parametrize("fifo", [False, True], ids=["standard", "fifo"])
def test_what_is_received_too_often_goes_to_the_dead_letters(
    s3_server: Endpoint, fifo: bool
) -> None:
    with servers.fresh_queue(s3_server, fifo=fifo, max_receive_count=1) as queue:
        queue.send("poison")
        receive = functools.partial(s3_server.sqs.receive_message, QueueUrl=queue.url)
        assert len(receive(VisibilityTimeout=0)["Messages"]) == 1
        assert "Messages" not in receive()
        assert queue.dead_letters() == ["poison"]
        assert queue.backlog().total == 0


def test_the_ids_of_sent_messages_come_in_the_order_of_their_bodies(queue: Queue) -> None:
    bodies = [str(number) for number in range(25)]
    sent = dict(zip(queue.send(*bodies), bodies, strict=True))
    received: dict[str, str] = {}
    while queue.backlog().num_visible:
        reply = queue.endpoint.sqs.receive_message(QueueUrl=queue.url, MaxNumberOfMessages=10)
        received |= {m["MessageId"]: m["Body"] for m in reply["Messages"]}
    assert received == sent


def test_a_receipt_handle_that_no_server_gave_deletes_nothing(queue: Queue) -> None:
    queue.send("kept")
    queue.endpoint.sqs.delete_message_batch(
        QueueUrl=queue.url, Entries=[{"Id": "0", "ReceiptHandle": "of-another-time"}]
    )
    assert queue.backlog().num_visible == 1
