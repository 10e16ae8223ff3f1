"""Settings as frozen dataclasses; validation is pure and raises ConfigError."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from batchclf.errors import ConfigError, InputError

Keep = Literal["id", "all", "none"] | tuple[str, ...]
Backend = Literal["torch", "openvino"]
DEFAULT_ID_COLUMN = "id"
DEFAULT_ROWS_PER_SHARD = 100_000
DEFAULT_MAX_SOURCE_BYTES = 5 << 30  # of a source that a message names


@dataclass(frozen=True)
class ReadSettings:
    """Which columns of an input are text, which travel to the output, and how large it may be.

    Attributes:
        max_source_bytes: of an object as it is stored, of a compressed text when it is expanded,
            and of the rows of one shard of Parquet; for sources that strangers name. None: as
            large as it is.
    """

    text_columns: tuple[str, ...] = ("text",)
    id_column: str | None = None  # None: the column `id`, where the input has one
    keep: Keep = "id"
    delimiter: str = ","
    max_source_bytes: int | None = None

    def __post_init__(self) -> None:
        if not self.text_columns:
            raise ConfigError("name at least one text column")
        if len(set(self.text_columns)) != len(self.text_columns):
            raise ConfigError(f"a text column is named twice: {', '.join(self.text_columns)}")
        if len(self.delimiter) != 1 or self.delimiter in '\r\n"':
            raise ConfigError(
                f"the CSV delimiter must be one character other than a quote or a line break, "
                f"not {self.delimiter!r}"
            )

    def kept_columns(self, available: Sequence[str], uri: str) -> tuple[str, ...]:
        """The columns of one input that travel to its output, in the order they will stand there.

        The id column comes first unless nothing is kept.

        Raises:
            InputError: a column that was asked for by name is not there, or stands twice.
        """
        if self.keep == "none":
            return ()
        if self.keep == "all":
            wanted = tuple(available)
        else:
            named = self.keep if isinstance(self.keep, tuple) else ()
            id_column = self.id_column
            if id_column is None and DEFAULT_ID_COLUMN in available:
                id_column = DEFAULT_ID_COLUMN
            first = () if id_column is None or id_column in named else (id_column,)
            wanted = tuple(dict.fromkeys(first + named))
        if self.id_column is not None:
            self._check((self.id_column,), available, uri, "id column", "--id-column")
        self._check(wanted, available, uri, "column", "--keep-columns")
        return wanted

    def check_size(self, size_bytes: int, uri: str) -> None:
        """Raise InputError when a source has, or expands to, more bytes than it may."""
        if self.max_source_bytes is not None and size_bytes > self.max_source_bytes:
            raise InputError(
                f"{uri}: has or expands to more than {self.max_source_bytes:,} bytes, which is "
                "the most that a message may point to; raise --max-source-bytes if it is wanted"
            )

    def check_text_columns(self, available: Sequence[str], uri: str) -> None:
        """Raise InputError when a text column is missing from an input or stands there twice."""
        self._check(self.text_columns, available, uri, "text column", "--text-column")

    @staticmethod
    def _check(
        wanted: Sequence[str], available: Sequence[str], uri: str, kind: str, option: str
    ) -> None:
        for name in wanted:
            count = sum(1 for other in available if other == name)
            if count == 0:
                raise InputError(
                    f"{uri}: no {kind} {name!r}; it has {describe_names(available)}. "
                    f"{_delimiter_advice(available) or f'Name one of them with {option}'}"
                )
            if count > 1:
                raise InputError(f"{uri}: the {kind} {name!r} stands there {count} times")


@dataclass(frozen=True)
class CutSettings:
    """How inputs are cut into shards. The cut depends on the input and on this alone."""

    rows_per_shard: int = DEFAULT_ROWS_PER_SHARD
    limit: int | None = None  # rows of the whole input, the first ones


@dataclass(frozen=True)
class PredictSettings:
    """What becomes of a row's probabilities and of its errors."""

    min_score: float = 0.0
    probs: bool = True
    on_error: Literal["keep", "fail"] = "keep"
    max_error_rate: float = 1.0

    def __post_init__(self) -> None:
        for option, value in (
            ("--min-score", self.min_score),
            ("--max-error-rate", self.max_error_rate),
        ):
            if not 0 <= value <= 1:  # NaN passes click's range
                raise ConfigError(f"{option} {value}: must be from 0 to 1")


@dataclass(frozen=True)
class ModelSettings:
    """Which model, and where and how it computes. None and `auto` are chosen for the device.

    Attributes:
        model: a model directory, or a name on the hub.
        max_length: tokens of a text that the model sees; None: as many as it was made for.
        max_batch_tokens: longest row times rows of one batch.
    """

    model: str
    max_length: int | None = None
    max_batch_tokens: int | None = None
    dtype: str = "auto"
    device: str = "auto"
    backend: Backend = "torch"

    def __post_init__(self) -> None:
        if self.max_batch_tokens is not None and self.max_batch_tokens < 1:
            raise ConfigError(f"max_batch_tokens must be at least 1, not {self.max_batch_tokens}")
        if self.backend not in get_args(Backend):
            raise ConfigError(f"the backend {self.backend!r} is none of torch, openvino")


@dataclass(frozen=True)
class Share:
    """This worker's share of an array: `index` of `count`, both from the same source."""

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ConfigError(f"the number of shares must be at least 1, not {self.count}")
        if not 0 <= self.index < self.count:
            raise ConfigError(f"share {self.index} is outside 0 to {self.count - 1}")

    def part(self, index: int, count: int) -> "Share":
        """Part `index` of `count` of this share; all parts together are this share."""
        return Share(self.index * count + index, self.count * count)


# Who tells a worker its place: our options, AWS Batch array jobs, Slurm job arrays.
# https://docs.aws.amazon.com/batch/latest/userguide/array_jobs.html
# https://slurm.schedmd.com/job_array.html
_SHARE_VARIABLES = (
    ("AWS_BATCH_JOB_ARRAY_INDEX", "AWS_BATCH_JOB_ARRAY_SIZE"),
    ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT"),
)


def find_share(index: int | None, count: int | None, environment: Mapping[str, str]) -> Share:
    """The share from the options, else from AWS Batch, else from Slurm, else everything.

    Raises:
        ConfigError: an index without a size or a size without an index, or one outside the other.
    """
    if index is not None or count is not None:
        return _pair(index, count, "--shard-index", "--num-shards")
    for index_name, count_name in _SHARE_VARIABLES:
        values = environment.get(index_name), environment.get(count_name)
        if any(values):
            index, count = _integer(values[0], index_name), _integer(values[1], count_name)
            return _pair(index, count, index_name, count_name)
    return Share()


def _pair(index: int | None, count: int | None, index_name: str, count_name: str) -> Share:
    if index is None or count is None:
        present, missing = (count_name, index_name) if index is None else (index_name, count_name)
        raise ConfigError(f"{present} is set without {missing}; set both or neither")
    try:
        return Share(index, count)
    except ConfigError as error:
        raise ConfigError(f"{index_name}={index} with {count_name}={count}: {error}") from None


def _integer(value: str | None, name: str) -> int | None:
    if not value:
        return None
    try:
        return int(value)
    except ValueError:
        raise ConfigError(f"{name}={value!r} is not a whole number") from None


def _delimiter_advice(available: Sequence[str]) -> str | None:
    """What to do about a CSV whose whole header was taken for one column, if it looks so."""
    for delimiter, written in ((";", ";"), ("\t", r"\t"), ("|", "|")):
        if len(available) == 1 and delimiter in available[0]:
            return f"If a {written} stands between its fields, set --delimiter '{written}'"
    return None


def _printable(name: str, most: int = 100) -> str:
    """A name from a file, which may be anything, for a line of the log."""
    short = name if len(name) <= most else f"{name[:most]}..."
    return short if short.isprintable() else ascii(short)[1:-1]


def describe_names(names: Sequence[str], most: int = 20) -> str:
    """`the columns a, b, c`, cut after `most` names."""
    if not names:
        return "no columns"
    shown = ", ".join(_printable(name) for name in names[:most])
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return f"the columns {shown}{rest}"
