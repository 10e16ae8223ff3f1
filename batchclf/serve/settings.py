"""What `serve` was asked for."""

from dataclasses import dataclass, field

from batchclf.config import ModelSettings, ReadSettings
from batchclf.errors import ConfigError

MIB = 1 << 20


@dataclass(frozen=True)
class Limits:
    """How much is taken on, and for how long it may take the client.

    Attributes:
        max_wait_s: how long a request waits for others to share its batch.
        max_queue_rows: rows that wait for the model; a request beyond them is refused with 429.
        max_body_bytes: of one request.
        max_rows: of one request.
        max_connections: open at once; one more is refused with 503.
        client_timeout_s: for a client to send its headers, to go on with its body, and to take
            the next piece of its answer.
    """

    max_wait_s: float = 0.005
    max_queue_rows: int = 20_000
    max_body_bytes: int = 32 * MIB
    max_rows: int = 10_000
    max_connections: int = 1000
    client_timeout_s: float = 20.0


@dataclass(frozen=True)
class ServeSettings:
    """Everything that `serve` was asked for.

    Attributes:
        min_score: below this probability the label is null.
        token: what clients have to send as `Authorization: Bearer`; None: anybody may ask.
        endpoint_url: another server of the S3 protocol, for a model that is there.
    """

    model: ModelSettings
    host: str
    port: int
    read: ReadSettings = field(default_factory=ReadSettings)
    limits: Limits = field(default_factory=Limits)
    min_score: float = 0.0
    token: str | None = field(default=None, repr=False)
    endpoint_url: str | None = None

    def __post_init__(self) -> None:
        if self.token is not None and not (self.token.isascii() and self.token.isprintable()):
            raise ConfigError("the token must be of printable ASCII characters")
        if self.token is not None and (not self.token or " " in self.token):
            raise ConfigError("the token is empty or holds a space; leave it out or set another")
