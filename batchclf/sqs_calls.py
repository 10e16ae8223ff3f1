"""One call to SQS: its JSON protocol, signed, and made again while it may pass.

boto3 makes the same calls with three times the processor time, and holds Python's lock meanwhile:
two of them for ten small articles took as long as a tenth of labelling those. Credentials, region,
proxies and certificates are found as boto3 finds them.

https://docs.aws.amazon.com/AWSSimpleQueueService/latest/SQSDeveloperGuide/sqs-making-api-requests-json.html
https://docs.aws.amazon.com/IAM/latest/UserGuide/reference_sigv-create-signed-request.html
"""

import functools
import hashlib
import hmac
import itertools
import json
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import botocore.session
import urllib3
from botocore.credentials import ReadOnlyCredentials
from botocore.exceptions import (
    BotoCoreError,
    CredentialRetrievalError,
    PartialCredentialsError,
)
from botocore.httpsession import ProxyConfiguration, get_cert_path
from botocore.utils import get_environ_proxies
from urllib3.connection import HTTPConnection
from urllib3.exceptions import HTTPError

from batchclf import __version__
from batchclf.errors import BatchclfError, ConfigError, CredentialsError, QueueError
from batchclf.retries import BAD_CREDENTIALS, is_throttled, may_pass, most_attempts, wait_s

_CONNECT_TIMEOUT_S = 5
_OK = 200
_CONTENT_TYPE = "application/x-amz-json-1.0"
_SOCKET_OPTIONS = [
    *HTTPConnection.default_socket_options,
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
]
_DEFAULT_PORTS = {"http": 80, "https": 443}

_NO_QUEUE = {"AWS.SimpleQueueService.NonExistentQueue", "QueueDoesNotExist", "InvalidAddress"}
_OVER_LIMIT = {"OverLimit", "AWS.SimpleQueueService.OverLimit"}


class OverLimitError(QueueError):
    """More messages are in flight than the queue allows; they have to be deleted first."""


class Patience:
    """How long a call may take.

    Args:
        reply_s: until a reply counts as stalled.
        attempts: in all, where AWS_MAX_ATTEMPTS does not say otherwise.

    Raises:
        ConfigError: AWS_MAX_ATTEMPTS is no number.
    """

    def __init__(self, reply_s: float, attempts: int) -> None:
        self.timeout = urllib3.Timeout(connect=min(_CONNECT_TIMEOUT_S, reply_s), read=reply_s)
        self.attempts = most_attempts(attempts)


@dataclass(eq=False)
class _FailedError(Exception):
    """An attempt that failed: without a reply, or with one that says so (status 0: none)."""

    code: str
    status: int
    said: str


class Caller:
    """Calls for one queue, made by any number of threads.

    Args:
        url: of the queue.
        endpoint_url: where the calls go.
        region: of the queue; None: that of the environment or the profile.
        num_connections: that are kept open.

    Raises:
        ConfigError: no region is known, or the AWS configuration makes no sense.
    """

    def __init__(
        self, url: str, endpoint_url: str, region: str | None, num_connections: int
    ) -> None:
        self._url = url
        session = botocore.session.Session()
        try:
            region = region or os.environ.get("AWS_REGION") or session.get_config_variable("region")
            self._credentials = session.get_credentials()
            ca_bundle = session.get_config_variable("ca_bundle")
        except PartialCredentialsError as error:
            raise self._without_credentials(error) from error
        except BotoCoreError as error:
            raise ConfigError(f"{url}: {error}") from error
        if not region:
            raise ConfigError(f"{url}: this does not say its region. Set AWS_REGION.")
        parts = urlsplit(endpoint_url)
        if parts.scheme not in _DEFAULT_PORTS or not parts.hostname:
            raise ConfigError(f"{url}: no calls can go to {endpoint_url}; write https://HOST")
        self.region = region
        self.endpoint_url = endpoint_url
        self._path = parts.path or "/"
        host = parts.netloc.rpartition("@")[2]
        self._host = host.removesuffix(f":{_DEFAULT_PORTS[parts.scheme]}")
        self._address = f"{parts.scheme}://{host}{self._path}"
        self._connections = _connections(self._address, ca_bundle, num_connections)
        if self._connections.proxy and parts.scheme == "http":
            self._post = functools.partial(self._connections.urlopen, "POST", self._address)
        else:  # found once, which spares a tenth of each call
            pool = self._connections.connection_from_url(self._address)
            self._post = functools.partial(pool.urlopen, "POST", self._path)

    def close(self) -> None:
        self._connections.clear()

    def call(self, operation: str, patience: Patience, **asked: Any) -> dict[str, Any]:
        """The reply of the queue.

        Args:
            operation: as the API names it, such as `ReceiveMessage`.
            patience: how long and how often.
            asked: parameters of the API, but for QueueUrl.

        Raises:
            QueueError: it failed each time, also after waits.
            OverLimitError: too many messages are in flight.
            ConfigError, CredentialsError: asking again would not help.
        """
        body = json.dumps({"QueueUrl": self._url, **asked}).encode()
        for attempt in itertools.count(1):
            try:
                return self._once(operation, body, patience.timeout)
            except _FailedError as failed:
                passes = not failed.status or may_pass(failed.code, failed.status)
                if not passes or attempt >= patience.attempts:
                    raise self._translated(failed) from failed.__cause__
                is_too_fast = is_throttled(failed.code, failed.status)
            time.sleep(wait_s(attempt, is_throttled=is_too_fast))
        raise AssertionError  # the last attempt returns or raises

    def _once(self, operation: str, body: bytes, timeout: urllib3.Timeout) -> dict[str, Any]:
        try:
            reply = self._post(
                body=body,
                headers=self._sign(f"AmazonSQS.{operation}", body),
                timeout=timeout,
                retries=False,
                redirect=False,
            )
        except HTTPError as error:
            raise _FailedError("", 0, str(error)) from error
        said = _parsed(reply.data)
        if reply.status != _OK:
            raise _FailedError(_code(reply.headers, said or {}), reply.status, _message(said or {}))
        if said is None:
            raise _FailedError("", 0, "a reply that is no JSON object")
        return said

    def _sign(self, target: str, body: bytes) -> dict[str, str]:
        if self._credentials is None:
            raise self._without_credentials("Unable to locate credentials")
        try:
            keys = self._credentials.get_frozen_credentials()
        except CredentialRetrievalError as error:
            raise self._without_credentials(error) from error
        except BotoCoreError as error:
            raise ConfigError(f"{self._url}: {error}") from error
        now = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        return signed_headers(keys, self.region, self._host, self._path, target, body, now)

    def _without_credentials(self, reason: object) -> CredentialsError:
        return CredentialsError(
            f"{self._url}: {reason}. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
            "AWS_PROFILE, or give the machine a role"
        )

    def _translated(self, failed: _FailedError) -> BatchclfError:
        url, code, status = self._url, failed.code, failed.status
        if not status:
            return QueueError(f"{url}: {failed.said}")
        said = f"{code} {failed.said}".strip()
        if code in BAD_CREDENTIALS:
            return CredentialsError(f"{url}: the credentials are not accepted ({said}); renew them")
        if code in _NO_QUEUE:
            return ConfigError(f"{url}: there is no such queue")
        if code in _OVER_LIMIT:
            return OverLimitError(f"{url}: too many messages are in flight ({said})")
        if may_pass(code, status):
            return QueueError(f"{url}: the queue keeps answering {status} {said}; try again later")
        return ConfigError(f"{url}: the queue answered {status} {said}")


def _connections(address: str, ca_bundle: str | None, count: int) -> urllib3.PoolManager:
    options: dict[str, Any] = {
        "maxsize": count,
        "socket_options": _SOCKET_OPTIONS,
        "cert_reqs": "CERT_REQUIRED",
        "ca_certs": ca_bundle or get_cert_path(True),
    }
    proxies = ProxyConfiguration(get_environ_proxies(address))
    proxy: str | None = proxies.proxy_url_for(address)
    if not proxy:
        return urllib3.PoolManager(**options)
    return urllib3.ProxyManager(proxy, proxy_headers=proxies.proxy_headers_for(proxy), **options)


def signed_headers(
    keys: ReadOnlyCredentials,
    region: str,
    host: str,
    path: str,
    target: str,
    body: bytes,
    now: str,
) -> dict[str, str]:
    """The headers of a call, its signature of version 4 among them.

    Args:
        keys: access key, secret key and, where they are temporary, token.
        region: of the queue.
        host: as in the header.
        path: of the endpoint.
        target: such as `AmazonSQS.ReceiveMessage`.
        body: of the call.
        now: in UTC, such as `20240131T235959Z`.
    """
    signed = {
        "content-type": _CONTENT_TYPE,
        "host": host,
        "x-amz-date": now,
        **({"x-amz-security-token": keys.token} if keys.token else {}),
        "x-amz-target": target,
        "x-amzn-query-mode": "true",  # name errors as ever
    }
    names = ";".join(signed)
    lines = "\n".join(f"{name}:{value}" for name, value in signed.items())
    request = f"POST\n{path}\n\n{lines}\n\n{names}\n{hashlib.sha256(body).hexdigest()}"
    scope = f"{now[:8]}/{region}/sqs/aws4_request"
    text = f"AWS4-HMAC-SHA256\n{now}\n{scope}\n{hashlib.sha256(request.encode()).hexdigest()}"
    key = _signing_key(keys.secret_key, now[:8], region)
    signature = hmac.digest(key, text.encode(), "sha256").hex()
    credential = f"Credential={keys.access_key}/{scope}"
    return {
        **signed,
        "user-agent": f"batchclf/{__version__}",
        "authorization": (
            f"AWS4-HMAC-SHA256 {credential}, SignedHeaders={names}, Signature={signature}"
        ),
    }


@functools.lru_cache(maxsize=4)
def _signing_key(secret_key: str, day: str, region: str) -> bytes:
    key = f"AWS4{secret_key}".encode()
    for part in (day, region, "sqs", "aws4_request"):
        key = hmac.digest(key, part.encode(), "sha256")
    return key


def _parsed(body: bytes) -> dict[str, Any] | None:
    try:
        said = json.loads(body or b"{}")
    except ValueError:
        return None
    return said if isinstance(said, dict) else None


def _code(headers: Mapping[str, str], said: Mapping[str, Any]) -> str:
    """What AWS calls an error: as it always did, where it tells that too."""
    old, semicolon, _ = headers.get("x-amzn-query-error", "").partition(";")
    return old if old and semicolon else str(said.get("__type", "")).rpartition("#")[2]


def _message(said: Mapping[str, Any]) -> str:
    return str(said.get("message") or said.get("Message") or "")
