"""How a call to AWS is tried again: alike for S3 and SQS, and for every version of botocore.

The waits of botocore's own "standard" mode depend on its version (50 ms before the second attempt
since 1.44, a second before), and it allows 35 retries for all threads of a client together: a store
or queue that answers 500 for a few seconds uses them up, and then each call fails at its first
attempt. Here every call has its own attempts, with waits that are random ("full jitter",
https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/):

    wait before attempt n + 1 = uniform(0, min(first_s * 2**(n - 1), 20 s))

with `first_s` 1 s where we are too fast and 0.2 s otherwise: eight attempts wait 36 s and 13 s on
average.
"""

import os
import random
from collections.abc import Mapping
from typing import Any

from botocore.exceptions import ClientError, ConnectionError as BotoConnectionError, HTTPClientError

from batchclf.errors import ConfigError

ATTEMPTS = 8

_THROTTLED_FIRST_S = 1.0
_FIRST_S = 0.2
_MOST_WAIT_S = 20.0

_TOO_MANY_REQUESTS = 429
_SERVER_ERROR = 500
_TRANSIENT_STATUSES = {500, 502, 503, 504}
# The service did not get all of the request in time, or still works on the attempt before.
_TRANSIENT_CODES = {"RequestTimeout", "RequestTimeoutException", "PriorRequestNotComplete"}
# No connection, or one that broke off or stalled before the reply was there.
_TRANSIENT_ERRORS = (BotoConnectionError, HTTPClientError)
# https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html
# https://docs.aws.amazon.com/AWSSimpleQueueService/latest/APIReference/CommonErrors.html
THROTTLED = {
    "KMS.ThrottlingException",
    "KmsThrottled",
    "RequestLimitExceeded",
    "RequestThrottled",
    "RequestThrottledException",
    "ServiceUnavailable",
    "SlowDown",
    "Throttling",
    "ThrottledException",
    "ThrottlingException",
    "TooManyRequestsException",
}
BAD_CREDENTIALS = {
    "ExpiredToken",
    "ExpiredTokenException",
    "IncompleteSignature",
    "InvalidAccessKeyId",
    "InvalidClientTokenId",
    "InvalidSecurity",
    "InvalidToken",
    "MissingAuthenticationToken",
    "NotAuthorized",
    "OptInRequired",
    "RequestExpired",
    "RequestTimeTooSkewed",
    "SignatureDoesNotMatch",
    "UnrecognizedClientException",
}

# For `botocore.config.Config`: botocore itself tries once.
ONE_ATTEMPT: Any = {"mode": "standard", "total_max_attempts": 1}


def retry(client: Any, attempts: int = ATTEMPTS) -> None:
    """Have a boto3 client try each call so often, or as often as AWS_MAX_ATTEMPTS says.

    Raises:
        ConfigError: AWS_MAX_ATTEMPTS is no number.
    """
    asked = os.environ.get("AWS_MAX_ATTEMPTS")
    if asked is not None and not asked.isdecimal():
        raise ConfigError(f"AWS_MAX_ATTEMPTS={asked}: write a number of attempts")
    most = int(asked or attempts)

    def wait_s(
        attempts: int,
        response: tuple[Any, Mapping[str, Any]] | None,
        caught_exception: Exception | None,
        **_: Any,
    ) -> float | None:
        if attempts >= most or not _is_transient(response, caught_exception):
            return None
        first_s = _THROTTLED_FIRST_S if _is_throttled(response) else _FIRST_S
        return random.uniform(0, min(first_s * float(2 ** (attempts - 1)), _MOST_WAIT_S))

    client.meta.events.register("needs-retry", wait_s)


def code_of(error: ClientError) -> str:
    """What AWS calls the error."""
    return str(error.response.get("Error", {}).get("Code", ""))


def status_of(error: ClientError) -> int:
    """Of the HTTP reply."""
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def may_pass(code: str, status: int) -> bool:
    """Whether the service failed, or asks for patience, rather than refuses."""
    return (
        status >= _SERVER_ERROR
        or status == _TOO_MANY_REQUESTS
        or code in THROTTLED | _TRANSIENT_CODES
    )


def _is_transient(response: tuple[Any, Mapping[str, Any]] | None, caught: Exception | None) -> bool:
    if response is None:
        return isinstance(caught, _TRANSIENT_ERRORS)
    status = response[0].status_code
    return (
        status in _TRANSIENT_STATUSES
        or _is_throttled(response)
        or _code(response[1]) in _TRANSIENT_CODES
    )


def _is_throttled(response: tuple[Any, Mapping[str, Any]] | None) -> bool:
    if response is None:
        return False
    return response[0].status_code == _TOO_MANY_REQUESTS or _code(response[1]) in THROTTLED


def _code(parsed: Mapping[str, Any]) -> str:
    error = parsed.get("Error", {})
    return str(error.get("Code", "")) if isinstance(error, Mapping) else ""
