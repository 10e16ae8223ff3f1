"""What the ETag of an object on S3 says of its bytes."""

import hashlib
from collections.abc import Sequence


class EtagDigest:
    """The ETag that an upload gets: its MD5, or the MD5 of its parts' MD5s and their number.

    https://docs.aws.amazon.com/AmazonS3/latest/userguide/checking-object-integrity-upload.html

    Args:
        part_sizes: bytes of each part of a multipart upload.
    """

    def __init__(self, part_sizes: Sequence[int] = ()) -> None:
        self._num_parts = len(part_sizes)
        self._sizes = iter(part_sizes)
        self._left = next(self._sizes, None)  # bytes until the part ends
        self._current = hashlib.md5(usedforsecurity=False)
        self._parts = hashlib.md5(usedforsecurity=False)

    def update(self, chunk: bytes) -> None:
        while self._left is not None and len(chunk) >= self._left:
            self._current.update(chunk[: self._left])
            self._parts.update(self._current.digest())
            self._current = hashlib.md5(usedforsecurity=False)
            chunk = chunk[self._left :]
            self._left = next(self._sizes, None)
        self._current.update(chunk)
        if self._left is not None:
            self._left -= len(chunk)

    def etag(self) -> str:
        if self._num_parts:
            return f'"{self._parts.hexdigest()}-{self._num_parts}"'
        return f'"{self._current.hexdigest()}"'
