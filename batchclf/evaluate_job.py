"""The job of `batchclf evaluate`: labelled files in, how good the model is on them out.

The files go through `classify` into a temporary folder, and its Parquet is read back, so what is
measured is what `classify` would have written.

Shape suffixes: N rows of a shard, C labels.
"""
# ruff: noqa: N806, N815 - names of arrays end in their shape, in capitals

import json
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from batchclf import __version__
from batchclf.classify import ClassifyJob, Settings
from batchclf.config import CutSettings, ModelSettings, PredictSettings, ReadSettings, Share
from batchclf.errors import InputError, Interrupted
from batchclf.evaluation import (
    MOST_MISTAKES,
    Measures,
    Mistake,
    confident_mistakes,
    measure,
    top_scores,
)
from batchclf.labelled import read_texts
from batchclf.progress import Progress, Style
from batchclf.schema import output_name
from batchclf.shards import Shard
from batchclf.store import Folder
from batchclf.text import join_text

EVALUATION = "evaluation.json"
PAGE = "evaluation.html"
_MOST_EXAMPLES = 3  # of rows that failed, for each code
_LEAST_PROB = float(np.finfo(np.float32).tiny)  # the logarithm of a probability of 0 is no number


@dataclass
class Failures:
    """Rows that got no label, by the code of their error: how many, and where some of them are."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, place: str, error: str) -> None:
        code = error.partition(":")[0]
        self.counts[code] += 1
        if self.counts[code] <= _MOST_EXAMPLES:
            self.examples.setdefault(code, []).append(f"{place}: {error}")


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        measures: over the rows that got a label.
        mistakes: the wrong predictions with the highest scores.
        failures: the rows that got none.
        num_truncated: rows whose text goes on beyond what the model saw.
        setup: model, device and the like, in plain values.
    """

    inputs: tuple[str, ...]
    measures: Measures
    mistakes: tuple[Mistake, ...]
    failures: Failures
    num_truncated: int
    setup: Mapping[str, Any]
    seconds: float

    @property
    def num_rows(self) -> int:
        return self.measures.num_examples + self.failures.counts.total()

    def as_dict(self) -> dict[str, Any]:
        """The numbers, as JSON takes them."""
        return {
            "inputs": list(self.inputs),
            "num_rows": self.num_rows,
            "num_failed": self.failures.counts.total(),
            "failed": dict(self.failures.counts),
            "failed_examples": self.failures.examples,
            "num_truncated": self.num_truncated,
            **self.measures.as_dict(),
            "mistakes": [asdict(mistake) for mistake in self.mistakes],
            "setup": dict(self.setup),
            "seconds": round(self.seconds, 3),
        }

    def write(self, folder: Folder) -> None:
        """Write `evaluation.json` and `evaluation.html`.

        Raises:
            StoreError, ConfigError: the folder cannot be written.
        """
        content = json.dumps(self.as_dict(), indent=1, ensure_ascii=False) + "\n"
        folder.put(EVALUATION, content.encode("utf-8", "replace"))
        folder.put(PAGE, self._page())

    def _page(self) -> bytes:
        from batchclf import pages
        from batchclf.evaluation_page import details_section, measure_sections, mistakes_section

        sections = [*measure_sections(self.measures), mistakes_section(self.mistakes)]
        if self.failures.counts:
            table = pages.table(
                "By code, with some of them",
                ["code", "rows", "for example"],
                (
                    (code, f"{count:,}", "; ".join(self.failures.examples[code]))
                    for code, count in self.failures.counts.most_common()
                ),
                num_texts=3,
            )
            sections.append(pages.section("Rows that could not be labelled", table, wide=True))
        sections.append(details_section("How it was measured", self.setup))
        named = ", ".join(self.inputs[:3]) + (" …" if len(self.inputs) > 3 else "")  # noqa: PLR2004
        return pages.page(
            "Evaluation",
            f"{self.setup['model']} on {named}: {self.num_rows:,} rows",
            sections,
            f"batchclf {__version__}",
        )


@dataclass(frozen=True)
class _Part:
    """The rows of one shard that got a label.

    Attributes:
        logits_NC: divided by the temperature, each row up to a number of its own.
        labels_N: the true ones, as positions.
    """

    logits_NC: npt.NDArray[np.float64]
    labels_N: npt.NDArray[np.int64]
    mistakes: tuple[Mistake, ...]


@dataclass(frozen=True)
class EvaluateJob:
    """What `evaluate` was asked for.

    Attributes:
        label_column: the true labels; stray spaces around them are dropped.
        limit: rows of the whole input, the first ones.
    """

    inputs: tuple[str, ...]
    model: ModelSettings
    text_columns: tuple[str, ...] = ("text",)
    label_column: str = "category"
    delimiter: str = ","
    limit: int | None = None
    endpoint_url: str | None = None

    def run(self, interrupt: threading.Event, style: Style) -> Evaluation:
        """Label and compare.

        Raises:
            InputError: an input cannot be read, or a row has no label or one that the model does
                not know; says which row.
            ConfigError, CheckpointError: the settings or the model make no sense.
            Interrupted: `interrupt` was set.
        """
        began = time.perf_counter()
        with tempfile.TemporaryDirectory(prefix="batchclf-evaluate-") as scratch:
            job = ClassifyJob(self._classify_settings(scratch))
            known = {label: place for place, label in enumerate(job.checkpoint.labels)}
            self._check_labels(known, interrupt)
            num_rows = sum(shard.num_rows for shard in job.mine)
            with Progress(num_rows, style) as shown:
                summary = job.run(interrupt, shown)
            if summary.errors:
                raise summary.errors[0]
            failures = Failures()
            parts = list(self._read_back(job, known, failures))
            if not sum(len(part.labels_N) for part in parts):
                raise InputError(
                    f"{', '.join(self.inputs)}: none of the {num_rows:,} rows there could be "
                    f"labelled{_first(failures)}"
                )
            temperature = job.checkpoint.temperature
            mistakes = sorted(
                (mistake for part in parts for mistake in part.mistakes),
                key=lambda mistake: -mistake.score,
            )
            return Evaluation(
                inputs=self.inputs,
                measures=measure(
                    np.concatenate([part.logits_NC for part in parts]) * temperature,
                    np.concatenate([part.labels_N for part in parts]),
                    job.checkpoint.labels,
                    temperature,
                ),
                mistakes=tuple(mistakes[:MOST_MISTAKES]),
                failures=failures,
                num_truncated=summary.counts.num_truncated,
                setup={
                    "model": self.model.model,
                    "model_sha256": job.checkpoint.content_hash,
                    "max_length": job.checkpoint.max_length,
                    "normalise": job.checkpoint.normalise,
                    "text_columns": list(self.text_columns),
                    "label_column": self.label_column,
                    "device": str(job.compute.device),
                    "dtype": job.compute.dtype_name,
                    "batchclf": __version__,
                },
                seconds=time.perf_counter() - began,
            )

    @property
    def _keep(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((self.label_column, *self.text_columns)))

    @property
    def _read(self) -> ReadSettings:
        return ReadSettings(self.text_columns, keep=self._keep, delimiter=self.delimiter)

    @property
    def _cut(self) -> CutSettings:
        return CutSettings(limit=self.limit)

    def _classify_settings(self, output: str) -> Settings:
        return Settings(
            inputs=self.inputs,
            output=output,
            model=self.model,
            read=self._read,
            predict=PredictSettings(),
            cut=self._cut,
            share=Share(),
            endpoint_url=self.endpoint_url,
        )

    def _check_labels(self, known: Mapping[str, int], interrupt: threading.Event) -> None:
        """Look at all labels before the model is asked, which may take an hour."""
        for source, batch, texts in read_texts(
            self.inputs, self._read, self._cut, self.endpoint_url
        ):
            if interrupt.is_set():
                raise Interrupted("interrupted while the labels were read; nothing was measured")
            column = self._label_column(batch.kept, str(source))
            for index, label in enumerate(column):
                place = f"{source} row {batch.first_row + index}"
                if texts[index] is not None or label is not None:
                    _position(label, place, known)

    def _label_column(self, kept: pa.RecordBatch | pa.Table, where: str) -> list[str | None]:
        """The labels; blank ones are None."""
        try:
            labels = kept.column(self._kept_name(self.label_column)).cast(pa.string()).to_pylist()
        except (pa.ArrowException, UnicodeDecodeError) as error:
            raise InputError(
                f"{where}: the label column {self.label_column!r} cannot be read as text: {error}"
            ) from error
        return [(label or "").strip() or None for label in labels]

    def _kept_name(self, name: str) -> str:
        """What a kept input column is called in the output."""
        return output_name(name, self._keep)

    def _read_back(
        self, job: ClassifyJob, known: Mapping[str, int], failures: Failures
    ) -> Iterator[_Part]:
        for shard in job.mine:
            # not as a dataset: `fp=...` in the path would become a column
            table = pq.ParquetFile(Path(job.settings.output) / job.sink.name(shard)).read()
            errors = table.column("error").to_pylist()
            for row, error in zip(table.column("row").to_pylist(), errors, strict=True):
                if error is not None:
                    failures.add(f"{shard.source} row {row}", error)
            fine = table.filter(pa.array([error is None for error in errors], pa.bool_()))
            yield self._part(fine, shard, known)

    def _part(self, table: pa.Table, shard: Shard, known: Mapping[str, int]) -> _Part:
        rows = table.column("row").to_pylist()
        places = [f"{shard.source} row {row}" for row in rows]
        labels = self._label_column(table, str(shard.source))
        labels_N = np.array(
            [_position(*each, known) for each in zip(labels, places, strict=True)], np.int64
        )
        probs = table.column("probs").combine_chunks()
        probs_NC = np.stack([column.to_numpy() for column in probs.flatten()], axis=1)
        logits_NC = np.log(np.maximum(probs_NC.astype(np.float64), _LEAST_PROB))
        wrong = confident_mistakes(logits_NC, labels_N)
        names = tuple(known)
        mistakes = zip(
            [places[row] for row in wrong],
            self._texts(table.take(pa.array(wrong, pa.int64()))),
            [names[labels_N[row]] for row in wrong],
            [names[column] for column in logits_NC[wrong].argmax(axis=1)],
            top_scores(logits_NC[wrong]).tolist(),
            strict=True,
        )
        return _Part(logits_NC, labels_N, tuple(Mistake(*each) for each in mistakes))

    def _texts(self, table: pa.Table) -> list[str]:
        """The texts of a few rows, as the model saw their beginning."""
        columns = {
            name: table.column(self._kept_name(name)).combine_chunks() for name in self.text_columns
        }
        return [text or "" for text in join_text(columns).texts]


def _position(label: str | None, place: str, known: Mapping[str, int]) -> int:
    if label is None:
        raise InputError(f"{place}: has no label")
    if label not in known:
        raise InputError(f"{place}: unknown label {label!r}; the model knows {', '.join(known)}")
    return known[label]


def _first(failures: Failures) -> str:
    return next((f"; {places[0]}" for places in failures.examples.values()), "")
