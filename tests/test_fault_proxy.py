"""The fault proxy passes everything on unchanged, and each fault does what it says."""

import base64
import http.client
import io
import json
import random
import socket
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest
from botocore.exceptions import (
    ClientError,
    ConnectionClosedError,
    ReadTimeoutError,
    ResponseStreamingError,
)
from fault_proxy import FaultProxy
from fault_rules import (
    Action,
    Delay,
    Edit,
    Exchange,
    Fault,
    FlipReply,
    FlipRequest,
    Forward,
    Hold,
    LoseReply,
    Match,
    Reset,
    Status,
    Truncate,
)
from servers import Endpoint

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

BODY = random.Random(0).randbytes(300_000)
PART_BYTES = 5 << 20
PUT = Match(operation="PutObject")
GET = Match(operation="GetObject")


@pytest.fixture
def s3(proxied: Endpoint) -> "S3Client":
    """An S3 client behind the proxy that never tries again."""
    return proxied.s3_client(retries={"total_max_attempts": 1})


@pytest.fixture
def hasty_s3(proxied: Endpoint) -> "S3Client":
    """The same, but it waits for a reply only so long."""
    return proxied.s3_client(retries={"total_max_attempts": 1}, read_timeout=0.3)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as executor:
        yield executor


@pytest.fixture
def deaf_proxy() -> Iterator[FaultProxy]:
    """A proxy in front of nothing, for faults that never ask the server."""
    with FaultProxy("http://127.0.0.1:9") as proxy:
        yield proxy


def connect(proxy: FaultProxy) -> http.client.HTTPConnection:
    parts = urlsplit(proxy.endpoint_url)
    assert parts.hostname is not None
    return http.client.HTTPConnection(parts.hostname, parts.port, timeout=20)


def ask(
    proxy: FaultProxy, path: str, method: str = "GET", headers: dict[str, str] | None = None
) -> tuple[int, bytes]:
    with closing(connect(proxy)) as connection:
        connection.request(method, path, headers=headers or {})
        answer = connection.getresponse()
        return answer.status, answer.read()


def read_object(s3: "S3Client", bucket: str, key: str) -> bytes:
    return s3.get_object(Bucket=bucket, Key=key)["Body"].read()


def exists(endpoint: Endpoint, bucket: str, key: str) -> bool:
    return endpoint.s3.list_objects_v2(Bucket=bucket, Prefix=key)["KeyCount"] == 1


# Without faults


def test_an_object_comes_back_as_it_was_sent(s3: "S3Client", bucket: str) -> None:
    s3.put_object(Bucket=bucket, Key="k", Body=BODY)
    assert s3.get_object(Bucket=bucket, Key="k")["Body"].read() == BODY


def test_a_head_request_announces_the_length_without_a_body(s3: "S3Client", bucket: str) -> None:
    s3.put_object(Bucket=bucket, Key="k", Body=BODY)
    assert s3.head_object(Bucket=bucket, Key="k")["ContentLength"] == len(BODY)


def test_an_empty_object_comes_back_empty(s3: "S3Client", bucket: str) -> None:
    s3.put_object(Bucket=bucket, Key="k", Body=b"")
    assert s3.get_object(Bucket=bucket, Key="k")["Body"].read() == b""


def test_a_listing_has_all_keys(s3: "S3Client", bucket: str) -> None:
    keys = [f"k{i}" for i in range(7)]
    for key in keys:
        s3.put_object(Bucket=bucket, Key=key, Body=b"")
    pages = s3.get_paginator("list_objects_v2").paginate(
        Bucket=bucket, PaginationConfig={"PageSize": 3}
    )
    assert [entry["Key"] for page in pages for entry in page["Contents"]] == keys


def test_a_deletion_answered_204_leaves_the_connection_usable(s3: "S3Client", bucket: str) -> None:
    s3.put_object(Bucket=bucket, Key="k", Body=b"")
    s3.delete_object(Bucket=bucket, Key="k")
    assert s3.list_objects_v2(Bucket=bucket)["KeyCount"] == 0


def test_not_modified_passes_without_a_body(s3: "S3Client", bucket: str) -> None:
    etag = s3.put_object(Bucket=bucket, Key="k", Body=BODY)["ETag"]
    with pytest.raises(ClientError) as caught:
        s3.get_object(Bucket=bucket, Key="k", IfNoneMatch=etag)
    assert caught.value.response["ResponseMetadata"]["HTTPStatusCode"] == 304


@pytest.mark.parametrize("key", ["a b+c%20d", "ü/é😀", "x//y", "q?a=b&c#d"])
def test_keys_with_reserved_characters_pass_unchanged(
    s3: "S3Client", bucket: str, proxy: FaultProxy, key: str
) -> None:
    s3.put_object(Bucket=bucket, Key=key, Body=b"1")
    assert [e["Key"] for e in s3.list_objects_v2(Bucket=bucket)["Contents"]] == [key]
    assert proxy.log(PUT)[-1].request.path == f"/{bucket}/{key}"


def test_a_multipart_upload_comes_back_as_it_was_sent(s3: "S3Client", bucket: str) -> None:
    whole = random.Random(1).randbytes(2 * PART_BYTES + 1)
    upload = s3.create_multipart_upload(Bucket=bucket, Key="m")["UploadId"]
    parts = []
    for number, start in enumerate(range(0, len(whole), PART_BYTES), start=1):
        part = s3.upload_part(
            Bucket=bucket,
            Key="m",
            UploadId=upload,
            PartNumber=number,
            Body=io.BytesIO(whole[start : start + PART_BYTES]),
        )
        parts.append({"PartNumber": number, "ETag": part["ETag"]})
    s3.complete_multipart_upload(
        Bucket=bucket,
        Key="m",
        UploadId=upload,
        MultipartUpload={"Parts": parts},  # type: ignore[typeddict-item]
    )
    assert s3.get_object(Bucket=bucket, Key="m")["Body"].read() == whole


def test_a_second_create_only_put_is_refused(s3: "S3Client", bucket: str) -> None:
    s3.put_object(Bucket=bucket, Key="k", Body=b"1", IfNoneMatch="*")
    with pytest.raises(ClientError) as caught:
        s3.put_object(Bucket=bucket, Key="k", Body=b"2", IfNoneMatch="*")
    assert caught.value.response["ResponseMetadata"]["HTTPStatusCode"] == 412


@pytest.mark.parametrize("chunked", [False, True])
def test_an_upload_with_a_trailing_checksum_passes_unchanged(
    proxy: FaultProxy, s3: "S3Client", bucket: str, chunked: bool
) -> None:
    checksum = base64.b64encode(zlib.crc32(BODY).to_bytes(4, "big"))
    framed = b"%x\r\n%b\r\n0\r\nx-amz-checksum-crc32:%b\r\n\r\n" % (len(BODY), BODY, checksum)
    headers = {
        "Content-Encoding": "aws-chunked",
        "X-Amz-Decoded-Content-Length": str(len(BODY)),
        "X-Amz-Content-SHA256": "STREAMING-UNSIGNED-PAYLOAD-TRAILER",
        "X-Amz-Trailer": "x-amz-checksum-crc32",
    }
    with closing(connect(proxy)) as connection:
        # http.client frames an iterable with chunks of its own.
        body = iter([framed[:1000], framed[1000:]]) if chunked else framed
        connection.request("PUT", f"/{bucket}/k", body, headers, encode_chunked=chunked)
        assert connection.getresponse().status == 200
    assert s3.get_object(Bucket=bucket, Key="k")["Body"].read() == BODY


def test_one_connection_serves_many_requests(proxy: FaultProxy, bucket: str) -> None:
    with closing(connect(proxy)) as connection:
        connection.connect()
        first_socket = connection.sock
        for _ in range(3):
            connection.request("PUT", f"/{bucket}/k", BODY)
            connection.getresponse().read()
        assert connection.sock is first_socket


def test_a_client_that_expects_100_continue_is_told_to_go_on(
    proxy: FaultProxy, bucket: str
) -> None:
    with closing(connect(proxy)) as connection:
        connection.connect()
        connection.putrequest("PUT", f"/{bucket}/k")
        connection.putheader("Expect", "100-continue")
        connection.putheader("Content-Length", "3")
        connection.endheaders()
        assert connection.sock.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.send(b"abc")
        assert connection.getresponse().status == 200


def test_signatures_stay_valid(rclone: Endpoint) -> None:
    """rclone checks them, as another test says."""
    with FaultProxy(rclone.endpoint_url) as proxy, closing(Endpoint(proxy.endpoint_url)) as proxied:
        proxied.s3.list_buckets()
        assert [e.server_status for e in proxy.log()] == [200]


def test_queue_urls_lead_through_the_proxy(proxy: FaultProxy, proxied: Endpoint) -> None:
    queue = proxied.sqs.create_queue(QueueName="passing-through")["QueueUrl"]
    assert queue.startswith(proxy.endpoint_url)
    proxied.sqs.send_message(QueueUrl=queue, MessageBody="hello")
    messages = proxied.sqs.receive_message(QueueUrl=queue, WaitTimeSeconds=1)["Messages"]
    assert [message["Body"] for message in messages] == ["hello"]
    proxied.sqs.delete_queue(QueueUrl=queue)


def test_a_server_that_is_down_looks_like_a_reset_connection(deaf_proxy: FaultProxy) -> None:
    with pytest.raises(ConnectionResetError):
        ask(deaf_proxy, "/")


# Status


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (403, "AccessDenied"),
        (409, "ConditionalRequestConflict"),
        (500, "InternalError"),
        (503, "SlowDown"),
    ],
)
def test_an_injected_status_is_an_s3_error(
    s3: "S3Client", bucket: str, proxy: FaultProxy, status: int, code: str
) -> None:
    proxy.add(Fault(PUT, Status(status)))
    with pytest.raises(ClientError) as caught:
        s3.put_object(Bucket=bucket, Key="k", Body=BODY)
    assert caught.value.response["ResponseMetadata"]["HTTPStatusCode"] == status
    assert caught.value.response["Error"]["Code"] == code


def test_an_injected_status_can_name_its_code(
    s3: "S3Client", bucket: str, proxy: FaultProxy
) -> None:
    proxy.add(Fault(PUT, Status(400, code="ExpiredToken", message="log in <again>")))
    with pytest.raises(ClientError, match=r"ExpiredToken.*log in <again>"):
        s3.put_object(Bucket=bucket, Key="k", Body=BODY)


def test_an_injected_status_keeps_the_request_from_the_server(
    s3: "S3Client", s3_server: Endpoint, bucket: str, proxy: FaultProxy
) -> None:
    proxy.add(Fault(PUT, Status(500)))
    with pytest.raises(ClientError):
        s3.put_object(Bucket=bucket, Key="k", Body=BODY)
    assert not exists(s3_server, bucket, "k")


def test_an_injected_status_is_an_sqs_error(proxied: Endpoint, proxy: FaultProxy) -> None:
    proxy.add(Fault(Match(operation="ListQueues"), Status(403)))
    with pytest.raises(ClientError) as caught:
        proxied.sqs.list_queues()
    assert caught.value.response["Error"]["Code"] == "AccessDenied"


def test_boto3_tries_again_after_503(proxied: Endpoint, bucket: str, proxy: FaultProxy) -> None:
    proxy.add(Fault(PUT, Status(503), times=1))
    proxied.s3.put_object(Bucket=bucket, Key="k", Body=BODY)
    assert [e.status for e in proxy.log(PUT)] == [503, 200]


def test_boto3_does_not_try_again_after_409(
    proxied: Endpoint, bucket: str, proxy: FaultProxy
) -> None:
    conflict = proxy.add(Fault(PUT, Status(409)))
    with pytest.raises(ClientError):
        proxied.s3.put_object(Bucket=bucket, Key="k", Body=BODY, IfNoneMatch="*")
    assert proxy.hits(conflict) == 1


def test_headers_and_body_of_an_injected_status_are_sent(deaf_proxy: FaultProxy) -> None:
    deaf_proxy.add(Fault(Match(), Status(503, headers={"Retry-After": "7"}, body=b"later")))
    with closing(connect(deaf_proxy)) as connection:
        connection.request("GET", "/")
        answer = connection.getresponse()
        assert (answer.headers["Retry-After"], answer.read()) == ("7", b"later")


# Connections


def test_a_reset_is_seen_as_a_reset(deaf_proxy: FaultProxy) -> None:
    deaf_proxy.add(Fault(Match(), Reset()))
    with pytest.raises(ConnectionResetError):
        ask(deaf_proxy, "/")


def test_a_reset_keeps_the_request_from_the_server(
    s3: "S3Client", s3_server: Endpoint, bucket: str, proxy: FaultProxy
) -> None:
    proxy.add(Fault(PUT, Reset()))
    with pytest.raises(ConnectionClosedError):
        s3.put_object(Bucket=bucket, Key="k", Body=BODY)
    assert not exists(s3_server, bucket, "k")


def test_a_lost_reply_leaves_the_object_written(
    s3: "S3Client", s3_server: Endpoint, bucket: str, proxy: FaultProxy
) -> None:
    proxy.add(Fault(PUT, LoseReply()))
    with pytest.raises(ConnectionClosedError):
        s3.put_object(Bucket=bucket, Key="k", Body=BODY)
    assert exists(s3_server, bucket, "k")
    (exchange,) = proxy.log(PUT)
    assert (exchange.server_status, exchange.status) == (200, None)


def test_boto3_meets_its_own_object_after_a_lost_reply(
    proxied: Endpoint, bucket: str, proxy: FaultProxy
) -> None:
    proxy.add(Fault(PUT, LoseReply(), times=1))
    with pytest.raises(ClientError, match="PreconditionFailed"):
        proxied.s3.put_object(Bucket=bucket, Key="k", Body=BODY, IfNoneMatch="*")
    assert [e.server_status for e in proxy.log(PUT)] == [200, 412]


@pytest.mark.parametrize("after", [False, True])
def test_a_delay_outlasts_an_impatient_client(
    s3: "S3Client", hasty_s3: "S3Client", bucket: str, proxy: FaultProxy, after: bool
) -> None:
    s3.put_object(Bucket=bucket, Key="k", Body=BODY)
    proxy.add(Fault(GET, Delay(60, after=after)))
    with pytest.raises(ReadTimeoutError):
        hasty_s3.get_object(Bucket=bucket, Key="k")


def test_a_delayed_reply_arrives(s3: "S3Client", bucket: str, proxy: FaultProxy) -> None:
    proxy.add(Fault(PUT, Delay(0.2)))
    start = time.monotonic()
    s3.put_object(Bucket=bucket, Key="k", Body=BODY)
    assert time.monotonic() - start >= 0.2


# Hold


def test_a_request_held_before_the_server_goes_on_when_released(
    s3: "S3Client", s3_server: Endpoint, bucket: str, proxy: FaultProxy, pool: ThreadPoolExecutor
) -> None:
    hold = Hold("before")
    held = proxy.add(Fault(PUT, hold))
    put = pool.submit(s3.put_object, Bucket=bucket, Key="k", Body=BODY)
    proxy.wait_for(held)
    assert not exists(s3_server, bucket, "k")
    hold.release()
    assert put.result(20)["ResponseMetadata"]["HTTPStatusCode"] == 200


def test_a_dropped_request_never_reaches_the_server(
    s3: "S3Client", s3_server: Endpoint, bucket: str, proxy: FaultProxy, pool: ThreadPoolExecutor
) -> None:
    hold = Hold("before")
    held = proxy.add(Fault(PUT, hold))
    put = pool.submit(s3.put_object, Bucket=bucket, Key="k", Body=BODY)
    proxy.wait_for(held)
    hold.drop()
    with pytest.raises(ConnectionClosedError):
        put.result(20)
    assert not exists(s3_server, bucket, "k")


def test_a_reply_held_after_the_server_has_had_its_effect(
    s3: "S3Client", s3_server: Endpoint, bucket: str, proxy: FaultProxy, pool: ThreadPoolExecutor
) -> None:
    hold = Hold("after")
    held = proxy.add(Fault(PUT, hold))
    put = pool.submit(s3.put_object, Bucket=bucket, Key="k", Body=BODY)
    assert proxy.wait_for(held).server_status == 200
    assert exists(s3_server, bucket, "k")
    assert not put.done()
    hold.release()
    put.result(20)


def test_a_body_held_halfway_stalls_the_reader(
    s3: "S3Client", hasty_s3: "S3Client", bucket: str, proxy: FaultProxy
) -> None:
    s3.put_object(Bucket=bucket, Key="k", Body=BODY)
    proxy.add(Fault(GET, Hold("body")))
    body = hasty_s3.get_object(Bucket=bucket, Key="k")["Body"]
    assert body.read(len(BODY) // 2) == BODY[: len(BODY) // 2]
    with pytest.raises(ReadTimeoutError):
        body.read()


def test_a_body_held_halfway_is_whole_when_released(
    s3: "S3Client", bucket: str, proxy: FaultProxy, pool: ThreadPoolExecutor
) -> None:
    s3.put_object(Bucket=bucket, Key="k", Body=BODY)
    hold = Hold("body")
    held = proxy.add(Fault(GET, hold))
    read = pool.submit(read_object, s3, bucket, "k")
    proxy.wait_for(held)
    hold.release()
    assert read.result(20) == BODY


@pytest.mark.parametrize("released", [True, False])
def test_a_held_request_survives_its_client_only_when_released(
    s3_server: Endpoint, bucket: str, proxy: FaultProxy, released: bool
) -> None:
    hold = Hold("before")
    held = proxy.add(Fault(PUT, hold))
    url = urlsplit(proxy.endpoint_url)
    program = (
        "import http.client\n"
        f"connection = http.client.HTTPConnection({url.hostname!r}, {url.port})\n"
        f"connection.request('PUT', '/{bucket}/k', b'x' * 100000)\n"
        "connection.getresponse()\n"
    )
    with subprocess.Popen([sys.executable, "-c", program]) as client:
        proxy.wait_for(held)
        client.kill()
    if released:
        hold.release()
    else:
        hold.drop()
    proxy.wait_until_idle()
    assert exists(s3_server, bucket, "k") is released


# Bodies


def test_a_body_cut_short_is_noticed_by_its_length(
    s3: "S3Client", bucket: str, proxy: FaultProxy
) -> None:
    s3.put_object(Bucket=bucket, Key="k", Body=BODY)
    proxy.add(Fault(GET, Truncate(0.25)))
    reply = s3.get_object(Bucket=bucket, Key="k")
    assert reply["ContentLength"] == len(BODY)
    with pytest.raises(ResponseStreamingError, match=rf"{len(BODY) // 4} bytes read"):
        reply["Body"].read()


def test_a_flipped_reply_differs_in_one_bit(
    s3: "S3Client", proxy: FaultProxy, bucket: str, proxied: Endpoint
) -> None:
    s3.put_object(Bucket=bucket, Key="k", Body=BODY)
    proxy.add(Fault(GET, FlipReply(index=10)))
    trusting = proxied.s3_client(response_checksum_validation="when_required")
    got = trusting.get_object(Bucket=bucket, Key="k")["Body"].read()
    expected = bytearray(BODY)
    expected[10] ^= 1
    assert got == expected


def test_a_flipped_request_stores_another_payload(
    proxied: Endpoint, bucket: str, proxy: FaultProxy
) -> None:
    proxy.add(Fault(PUT, FlipRequest()))
    trusting = proxied.s3_client(request_checksum_calculation="when_required")
    trusting.put_object(Bucket=bucket, Key="k", Body=b"abc")
    assert trusting.get_object(Bucket=bucket, Key="k")["Body"].read() == b"acc"


def test_a_flip_of_a_chunked_request_hits_the_payload(
    proxy: FaultProxy, s3: "S3Client", bucket: str
) -> None:
    proxy.add(Fault(PUT, FlipRequest()))
    headers = {
        "Content-Encoding": "aws-chunked",
        "X-Amz-Decoded-Content-Length": "3",
        "X-Amz-Content-SHA256": "STREAMING-UNSIGNED-PAYLOAD-TRAILER",
    }
    with closing(connect(proxy)) as connection:
        connection.request("PUT", f"/{bucket}/k", b"3\r\nabc\r\n0\r\n\r\n", headers)
        assert connection.getresponse().status == 200
    assert s3.get_object(Bucket=bucket, Key="k")["Body"].read() == b"acc"


def test_an_edited_request_and_reply_replace_the_real_ones(
    proxied: Endpoint, proxy: FaultProxy
) -> None:
    def ask_for_another_name(body: bytes) -> bytes:
        return json.dumps(json.loads(body) | {"QueueName": "edited-in"}).encode()

    def answer_with_another_name(body: bytes) -> bytes:
        return body.replace(b"edited-in", b"edited-back-out")

    proxy.add(
        Fault(
            Match(operation="CreateQueue"),
            Edit(request=ask_for_another_name, reply=answer_with_another_name),
        )
    )
    url = proxied.sqs.create_queue(QueueName="asked-for")["QueueUrl"]
    (real,) = proxied.sqs.list_queues(QueueNamePrefix="edited-in")["QueueUrls"]
    proxied.sqs.delete_queue(QueueUrl=real)
    assert url.endswith("/edited-back-out")


# Rules


def statuses(proxy: FaultProxy, num_requests: int) -> list[int]:
    return [ask(proxy, "/")[0] for _ in range(num_requests)]


def test_a_fault_happens_so_many_times_after_so_many_skips(deaf_proxy: FaultProxy) -> None:
    deaf_proxy.add(Fault(Match(), Status(503), skip=1, times=2))
    deaf_proxy.add(Fault(Match(), Status(200)))
    assert statuses(deaf_proxy, 5) == [200, 503, 503, 200, 200]


def test_the_fault_added_first_decides(deaf_proxy: FaultProxy) -> None:
    deaf_proxy.add(Fault(Match(), Status(500)))
    deaf_proxy.add(Fault(Match(), Status(503)))
    assert statuses(deaf_proxy, 1) == [500]


def test_a_probability_is_drawn_from_the_seed() -> None:
    runs = []
    for seed in (1, 1, 2):
        with FaultProxy("http://127.0.0.1:9", seed=seed) as proxy:
            proxy.add(Fault(Match(), Status(503), probability=0.5))
            proxy.add(Fault(Match(), Status(200)))
            runs.append(statuses(proxy, 20))
    assert runs[0] == runs[1] != runs[2]
    assert set(runs[0]) == {200, 503}


@pytest.mark.parametrize(
    ("match", "hit"),
    [
        (Match(method="PUT"), True),
        (Match(method="GET"), False),
        (Match(path=r"ü b\.parquet$"), True),
        (Match(path=r"\.csv$"), False),
        (Match(operation="UploadPart"), True),
        (Match(operation="PutObject"), False),
        (Match(query={"partNumber": "^2$", "uploadId": ""}), True),
        (Match(query={"partNumber": "^1$"}), False),
        (Match(query={"tagging": ""}), False),
        (Match(headers={"if-none-match": r"\*"}), True),
        (Match(headers={"if-match": ""}), False),
        (Match(amz_target="SQS"), False),
        (Match(method="PUT", path=r"\.csv$"), False),
    ],
)
def test_every_field_of_a_match_must_fit(deaf_proxy: FaultProxy, match: Match, hit: bool) -> None:
    deaf_proxy.add(Fault(match, Status(503)))
    deaf_proxy.add(Fault(Match(), Status(200)))
    status, _ = ask(
        deaf_proxy,
        "/bucket/%C3%BC%20b.parquet?uploadId=u&partNumber=2",
        "PUT",
        {"If-None-Match": "*"},
    )
    assert (status == 503) is hit


def test_an_sqs_request_matches_by_its_target(deaf_proxy: FaultProxy) -> None:
    deaf_proxy.add(Fault(Match(amz_target=r"^AmazonSQS\.Delete"), Status(503)))
    status, body = ask(deaf_proxy, "/", "POST", {"X-Amz-Target": "AmazonSQS.DeleteMessageBatch"})
    assert status == 503
    assert json.loads(body)["__type"] == "com.amazonaws.sqs#ServiceUnavailable"


@pytest.mark.parametrize(
    ("method", "target", "operation"),
    [
        ("PUT", "/b", "CreateBucket"),
        ("GET", "/b?list-type=2&prefix=x", "ListObjectsV2"),
        ("POST", "/b?delete", "DeleteObjects"),
        ("HEAD", "/b/k", "HeadObject"),
        ("POST", "/b/k?uploads", "CreateMultipartUpload"),
        ("POST", "/b/k?uploadId=u", "CompleteMultipartUpload"),
        ("DELETE", "/b/k?uploadId=u", "AbortMultipartUpload"),
        ("PATCH", "/b/k", "PATCH"),
    ],
)
def test_operations_are_named_as_aws_names_them(
    deaf_proxy: FaultProxy, method: str, target: str, operation: str
) -> None:
    deaf_proxy.add(Fault(Match(), Status(200)))
    ask(deaf_proxy, target, method)
    assert deaf_proxy.log()[-1].request.operation == operation


def test_cleared_faults_do_nothing_more_but_keep_their_counts(deaf_proxy: FaultProxy) -> None:
    storm = deaf_proxy.add(Fault(Match(), Status(503)))
    assert statuses(deaf_proxy, 2) == [503, 503]
    deaf_proxy.clear()
    deaf_proxy.add(Fault(Match(), Status(200)))
    assert statuses(deaf_proxy, 1) == [200]
    assert deaf_proxy.hits(storm) == 2


# Watching


def test_the_callback_sees_the_exchange_before_the_fault(deaf_proxy: FaultProxy) -> None:
    seen: list[Exchange] = []
    deaf_proxy.add(Fault(Match(), Status(503), on_match=seen.append))
    ask(deaf_proxy, "/bucket/k")
    assert [exchange.request.path for exchange in seen] == ["/bucket/k"]


def test_waiting_in_vain_tells_what_was_requested_instead(deaf_proxy: FaultProxy) -> None:
    deaf_proxy.add(Fault(Match(), Status(503)))
    never = deaf_proxy.add(Fault(Match(path="never"), Forward()))
    ask(deaf_proxy, "/bucket/k")
    with pytest.raises(TimeoutError, match="GET /bucket/k"):
        deaf_proxy.wait_for(never, timeout=0.01)


def test_forward_changes_nothing_and_can_be_waited_for(
    s3: "S3Client", bucket: str, proxy: FaultProxy
) -> None:
    seen = proxy.add(Fault(PUT, Forward()))
    s3.put_object(Bucket=bucket, Key="k", Body=BODY)
    assert proxy.wait_for(seen, timeout=0).status == 200


def test_the_log_keeps_the_order_of_requests(deaf_proxy: FaultProxy) -> None:
    deaf_proxy.add(Fault(Match(), Status(200)))
    for name in "abc":
        ask(deaf_proxy, f"/bucket/{name}")
    assert [e.request.path[-1] for e in deaf_proxy.log(GET)] == ["a", "b", "c"]


def test_waiting_until_idle_gives_up_while_a_request_is_held(
    deaf_proxy: FaultProxy, pool: ThreadPoolExecutor
) -> None:
    held = deaf_proxy.add(Fault(Match(), Hold()))
    asked = pool.submit(ask, deaf_proxy, "/")
    deaf_proxy.wait_for(held)
    with pytest.raises(TimeoutError, match="1 requests under way"):
        deaf_proxy.wait_until_idle(timeout=0.01)
    deaf_proxy.clear()
    with pytest.raises(ConnectionResetError):
        asked.result(20)


# The end


@pytest.mark.parametrize("action", [Hold(), Delay(600)])
def test_closing_cuts_what_is_still_under_way(action: Action, pool: ThreadPoolExecutor) -> None:
    with FaultProxy("http://127.0.0.1:9") as proxy:
        held = proxy.add(Fault(Match(), action))
        asked = pool.submit(ask, proxy, "/")
        proxy.wait_for(held)
    with pytest.raises(ConnectionError):
        asked.result(20)


def test_closing_cuts_a_request_that_the_server_does_not_answer(pool: ThreadPoolExecutor) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        host, port = silent.getsockname()
        with FaultProxy(f"http://{host}:{port}") as proxy:
            seen = proxy.add(Fault(Match(), Forward()))
            asked = pool.submit(ask, proxy, "/")
            proxy.wait_for(seen)
            silent.accept()[0].close()
        with pytest.raises(ConnectionError):
            asked.result(20)


def test_no_thread_outlives_the_proxy() -> None:
    before = threading.active_count()
    with FaultProxy("http://127.0.0.1:9") as proxy:
        proxy.add(Fault(Match(), Status(200)))
        with closing(connect(proxy)) as connection:
            connection.request("GET", "/")
            connection.getresponse().read()
            assert threading.active_count() > before
    assert threading.active_count() == before


def test_an_error_in_a_callback_is_raised_at_the_end() -> None:
    def fail(exchange: Exchange) -> None:
        raise ZeroDivisionError(exchange.request.path)

    proxy = FaultProxy("http://127.0.0.1:9").__enter__()
    proxy.add(Fault(Match(), Status(200), on_match=fail))
    with pytest.raises(http.client.RemoteDisconnected):
        ask(proxy, "/")
    with pytest.raises(RuntimeError, match="the fault proxy failed"):
        proxy.close()
