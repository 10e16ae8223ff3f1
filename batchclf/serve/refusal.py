"""Why a request gets no prediction, as an HTTP status and a JSON object."""

from batchclf.errors import InputError

CLIENT_GONE = 499  # nginx's number for a client that left; for our own log, nobody receives it


class Refusal(Exception):  # noqa: N818 - an answer, not an error of ours
    """A request that is answered with a status other than 200.

    Attributes:
        status: of HTTP.
        code: one word for programs.
        message: one sentence for people; never a part of the request's text.
        retry_after_s: when to try again, where that would help.
        allow: the methods that are allowed, where another one was used.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        retry_after_s: int | None = None,
        allow: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.retry_after_s = retry_after_s
        self.allow = allow

    def as_dict(self) -> dict[str, dict[str, str]]:
        """What stands in the answer."""
        return {"error": {"code": self.code, "message": self.message}}


# What a reader advises to set on the command line is set in the query of a request.
_IN_A_QUERY = (
    ("--text-column", "text_column in the query"),
    ("--keep-columns", "keep_columns in the query"),
    ("--id-column", "--id-column where the server is started"),
    ("--delimiter", "the query's delimiter to"),
)


def unreadable(error: InputError) -> Refusal:
    """The body is not what its type says, or lacks a column."""
    message = str(error)
    if "--max-source-bytes" in message:
        return too_large_inside()
    for option, in_query in _IN_A_QUERY:
        message = message.replace(option, in_query)
    return Refusal(400, "unreadable", message)


def too_large_inside() -> Refusal:
    """A body that is small, and large in memory."""
    return Refusal(413, "body_too_large", "unpacked, the body is too large; send it in parts")
