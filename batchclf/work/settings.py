"""Everything that `work` was asked for."""

from dataclasses import dataclass, field

from batchclf.config import (
    CutSettings,
    ModelSettings,
    PredictSettings,
    ReadSettings,
    Share,
)


@dataclass(frozen=True)
class QueueSettings:
    """Which queue, and what is taken from it when.

    Attributes:
        allowed_sources: `s3://` prefixes that messages may point to.
        visibility_s: how long a message stays hidden when its worker dies.
        retry_delay_s: until a message that failed is tried again; then twice as long each time.
        max_rows: no more messages are taken after so many rows.
    """

    url: str
    allowed_sources: tuple[str, ...] = ()
    gather_rows: int = 4096
    gather_s: float = 5.0
    visibility_s: int = 60
    retry_delay_s: int = 10
    max_messages: int | None = None
    max_rows: int | None = None
    idle_exit_s: float | None = None


@dataclass(frozen=True)
class Settings:
    """Everything that `work` was asked for."""

    queue: QueueSettings
    output: str
    model: ModelSettings
    read: ReadSettings
    predict: PredictSettings
    cut: CutSettings
    share: Share = field(default_factory=Share)
    endpoint_url: str | None = None
