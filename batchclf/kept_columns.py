"""Which kept columns of an output hold dates and true labels, found by looking at some rows."""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.parquet as pq

from batchclf.errors import ConfigError
from batchclf.schema import PREDICTION_COLUMNS
from batchclf.tally import Columns, encode, parse_days

_SAMPLE_ROWS = 1_000  # of each file that is looked into
_MOST_VALUE_BYTES = 80  # on average; longer ones are neither dates nor labels
_LEAST_SHARE = 0.95  # of the values that are there


@dataclass
class KeptColumns:
    """What some rows of some files say of the kept columns.

    Attributes:
        kinds: types of all kept columns, in the order in which they were met.
        dates, truths: columns that look like dates and like true labels.
    """

    kinds: dict[str, list[pa.DataType]] = field(default_factory=dict)
    dates: list[str] = field(default_factory=list)
    truths: list[str] = field(default_factory=list)

    def choose(self, date_column: str | None, truth_column: str | None) -> Columns:
        """The columns that are asked for, else the first that looks like one.

        Raises:
            ConfigError: a column that is asked for was not kept, or cannot be what it is asked for.
        """
        self._check("--date-column", date_column, _may_be, "dates, timestamps or strings")
        self._check("--label-column", truth_column, _is_plain, "strings or integers")
        return Columns(
            date=date_column or next(iter(self.dates), None),
            truth=truth_column or next(iter(self.truths), None),
        )

    def _check(
        self, option: str, name: str | None, fits: Callable[[pa.DataType], bool], wanted: str
    ) -> None:
        if name is None:
            return
        if name not in self.kinds:
            kept = ", ".join(self.kinds) or "none"
            raise ConfigError(f"{option} {name}: no such column was kept; kept are: {kept}")
        for kind in self.kinds[name]:
            if not fits(kind):
                raise ConfigError(f"{option} {name}: holds {kind}, and {wanted} are needed")


class Sampler:
    """Looks at one file after the other."""

    def __init__(self, labels: Collection[str]) -> None:
        self._labels = frozenset(labels)
        self._kinds: dict[str, list[pa.DataType]] = {}
        self._dates: Counter[str] = Counter()  # values that are dates, less those that are not
        self._truths: Counter[str] = Counter()

    def look(self, file: pq.ParquetFile) -> None:
        """Read the first rows of the kept columns that are narrow enough.

        Raises:
            ArrowException, OSError: the file is torn.
        """
        schema = file.schema_arrow
        ours = len([name for name in schema.names if name in PREDICTION_COLUMNS])
        kept = list(schema)[: len(schema) - ours]
        for each in kept:
            kinds = self._kinds.setdefault(each.name, [])
            if each.type not in kinds:
                kinds.append(each.type)
        narrow = _narrow(file)
        names = [f.name for f in kept if _may_be(f.type) and f.name in narrow]
        if not names or not file.metadata.num_rows:
            return
        batch = next(file.iter_batches(_SAMPLE_ROWS, columns=names, use_threads=False))
        for name in names:
            self._count(name, batch.column(name))

    def _count(self, name: str, column: pa.Array) -> None:
        num_values = len(column) - column.null_count
        _, is_date = parse_days(column)
        self._dates[name] += _balance(int(is_date.sum()), num_values)
        if _is_text(column.type):
            values = encode(column, strip=True)
            is_label = [value in self._labels for value in values.names]
            num_labels = sum(is_label[place] for place in values.places.tolist() if place >= 0)
            num_values = int((values.places >= 0).sum())
            self._truths[name] += _balance(num_labels, num_values)

    def found(self) -> KeptColumns:
        return KeptColumns(
            kinds=self._kinds,
            dates=[name for name, balance in self._dates.items() if balance > 0],
            truths=[name for name, balance in self._truths.items() if balance > 0],
        )


def spread(names: Sequence[str], most: int) -> list[str]:
    """At most so many of some names, from their first to their last."""
    if len(names) <= most:
        return list(names)
    return [names[place * (len(names) - 1) // (most - 1)] for place in range(most)]


def _balance(num_good: int, num_values: int) -> int:
    """Above 0 if enough of the values are good."""
    if not num_values:
        return 0
    return num_values if num_good >= _LEAST_SHARE * num_values else -num_values


def _may_be(kind: pa.DataType) -> bool:
    return _is_text(kind) or pa.types.is_date(kind) or pa.types.is_timestamp(kind)


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _is_plain(kind: pa.DataType) -> bool:
    return _is_text(kind) or bool(pa.types.is_integer(kind) or pa.types.is_null(kind))


def _narrow(file: pq.ParquetFile) -> set[str]:
    """Columns whose values are short in the first row group: an article's text is not read."""
    if not file.num_row_groups:
        return set()
    group = file.metadata.row_group(0)
    most = _MOST_VALUE_BYTES * max(group.num_rows, 1) + _overhead(group)
    return {
        chunk.path_in_schema for chunk in _chunks(group) if chunk.total_uncompressed_size <= most
    }


def _chunks(group: pq.RowGroupMetaData) -> Iterator[pq.ColumnChunkMetaData]:
    return (group.column(place) for place in range(group.num_columns))


def _overhead(group: pq.RowGroupMetaData) -> int:
    """Of headers and dictionaries, which count in small row groups."""
    return (4 << 10) if group.num_rows else 0
