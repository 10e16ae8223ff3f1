"""Media types: what a body is, and which of our types a client takes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from email.message import Message
from functools import lru_cache

JSON = "application/json"
JSON_LINES = "application/jsonlines"
CSV = "text/csv"
PARQUET = "application/vnd.apache.parquet"

# The first of each is what we answer with.
_NAMES = {
    JSON: JSON,
    JSON_LINES: JSON_LINES,
    "application/jsonl": JSON_LINES,
    "application/x-jsonlines": JSON_LINES,
    "application/x-ndjson": JSON_LINES,
    CSV: CSV,
    "application/csv": CSV,
    PARQUET: PARQUET,
    "application/x-parquet": PARQUET,
}
KNOWN = (JSON, JSON_LINES, CSV, PARQUET)


@dataclass(frozen=True)
class MediaType:
    """One of ours, with the parameters that came with it, such as `header=absent`."""

    name: str
    parameters: Mapping[str, str] = field(default_factory=dict)

    @property
    def has_header(self) -> bool:
        """Whether a CSV begins with the names of its columns (RFC 4180, section 3)."""
        return self.parameters.get("header", "present").lower() != "absent"


@lru_cache(256)
def parse_media_type(value: str) -> MediaType | None:
    """A Content-Type as one of ours; None where it is of another kind."""
    written, parameters = _split(value)
    name = _NAMES.get(written)
    return MediaType(name, parameters) if name else None


def choose_media_type(accept: str | None, default: MediaType) -> MediaType | None:
    """The type that a client likes best (RFC 9110, section 12.5.1); None where it takes none.

    Args:
        accept: the header; absent or empty, anything will do.
        default: what is sent where anything will do.
    """
    if not accept or not accept.strip() or accept in ("*/*", default.name):
        return default
    best: MediaType | None = None
    best_rank = (0.0, 0)
    for position, item in enumerate(accept.split(",")):
        written, parameters = _split(item)
        quality = _quality(parameters.pop("q", "1"))
        rank = (quality, -position)
        if quality > 0 and (best is None or rank > best_rank):
            found = _match(written, parameters, default)
            if found is not None:
                best, best_rank = found, rank
    return best


def _match(written: str, parameters: dict[str, str], default: MediaType) -> MediaType | None:
    if written == "*/*":
        return default
    if written.endswith("/*"):
        kind = written.removesuffix("*")
        names: Sequence[str] = [default.name, *KNOWN]
        name = next((name for name in names if name.startswith(kind)), None)
        return default if name == default.name else MediaType(name) if name else None
    name = _NAMES.get(written)
    if name is None:
        return None
    return MediaType(name, parameters or (default.parameters if name == default.name else {}))


def _quality(value: str) -> float:
    try:
        return min(max(float(value), 0.0), 1.0)
    except ValueError:
        return 1.0


def _split(value: str) -> tuple[str, dict[str, str]]:
    message = Message()
    message["content-type"] = " ".join(value.split())
    written, *parameters = message.get_params([("", "")])
    return written[0].strip().lower(), {name.lower(): text for name, text in parameters}
