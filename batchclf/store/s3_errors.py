"""What goes wrong with S3, as errors of ours; and what is worth another attempt of our own.

A call is tried again by `batchclf.retries` until the head of its reply is there. What breaks after
that, or needs more than the same call once more, is here.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionError as BotoConnectionError,
    CredentialRetrievalError,
    FlexibleChecksumError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    ParamValidationError,
    PartialCredentialsError,
    ReadTimeoutError,
    ResponseStreamingError,
)
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential
from urllib3.exceptions import HTTPError as UrllibError

from batchclf.errors import (
    BatchclfError,
    ConfigError,
    CredentialsError,
    DamagedError,
    InputChangedError,
    InputError,
    StoreError,
)
from batchclf.retries import BAD_CREDENTIALS, code_of, may_pass, status_of

NOT_FOUND = 404
PRECONDITION_FAILED = 412
# https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html
_WRONG_REGION = {
    "PermanentRedirect",
    "AuthorizationHeaderMalformed",
    "IllegalLocationConstraintException",
}

# A download that broke off, or whose bytes do not fit their checksum, is done again from its start:
# botocore retries a call until its headers are there, but never the body.
BROKEN_BODY = (
    IncompleteReadError,  # fewer bytes than Content-Length said
    ResponseStreamingError,  # reset, or a broken chunk
    ReadTimeoutError,  # stalled
    FlexibleChecksumError,  # a byte flipped on the way
    UrllibError,  # a stall while botocore reads the body of an error comes out as it is
)


class WrongDigestError(BotoCoreError):
    """The bytes do not fit the MD5 that the ETag of a plain upload is."""

    fmt = "The body does not fit its ETag {etag}"


class NotTakenError(Exception):
    """An upload that has to be made again, a multipart one from its start; botocore does neither.

    409: another conditional write of this key was under way.
    https://docs.aws.amazon.com/AmazonS3/latest/userguide/conditional-writes.html
    400 BadDigest and its like: the bytes that arrived do not fit their checksum.
    https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html
    """


def retrying(*transient: type[BaseException]) -> Retrying:
    """Five attempts of what raises these errors."""
    return Retrying(
        retry=retry_if_exception_type(transient),
        stop=stop_after_attempt(5),
        wait=wait_random_exponential(multiplier=0.2, max=5),
        reraise=True,
    )


@contextmanager
def s3_errors(what: str, *, reading: bool) -> Iterator[None]:
    """Errors of ours in place of botocore's; `what` was read, or written."""
    try:
        yield
    except NotTakenError as error:
        raise StoreError(f"{what}: {error}; try again later") from error
    except ClientError as error:
        raise _translate(error, what, reading=reading) from error
    except (NoCredentialsError, PartialCredentialsError, CredentialRetrievalError) as error:
        raise CredentialsError(
            f"{what}: {error}. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or "
            "give the machine a role"
        ) from error
    except ParamValidationError as error:
        raise ConfigError(f"{what}: {error}") from error
    except (FlexibleChecksumError, WrongDigestError) as error:
        raise DamagedError(f"{what}: {error}") from error
    except (BotoConnectionError, HTTPClientError, *BROKEN_BODY) as error:
        raise StoreError(f"{what}: {error}") from error
    except BotoCoreError as error:
        raise ConfigError(f"{what}: {error}") from error


def _translate(error: ClientError, what: str, *, reading: bool) -> BatchclfError:
    code, status = code_of(error), status_of(error)
    refused: type[BatchclfError] = InputError if reading else ConfigError
    message = error.response.get("Error", {}).get("Message", "")
    said = f"{code} {message}".strip()
    if code in BAD_CREDENTIALS:
        return CredentialsError(f"{what}: the credentials are not accepted ({said}); renew them")
    if code in _WRONG_REGION:
        region = error.response["ResponseMetadata"]["HTTPHeaders"].get("x-amz-bucket-region")
        advice = f"set AWS_REGION={region}" if region else "set AWS_REGION to the bucket's region"
        return ConfigError(f"{what}: the bucket is in another region; {advice}")
    if code == "NoSuchBucket":
        return refused(f"{what}: there is no such bucket")
    if status == NOT_FOUND:
        return refused(f"{what}: there is no such object")
    if status == PRECONDITION_FAILED and reading:
        return InputChangedError(f"{what}: replaced since the plan was made; run again")
    if may_pass(code, status):
        return StoreError(f"{what}: the store keeps answering {status} {said}; try again later")
    return refused(f"{what}: the store answered {status} {said}")
