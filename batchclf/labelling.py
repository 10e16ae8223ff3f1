"""What the jobs that label share: the model, the output folder under its fingerprint, the notes."""

import json
import os
import platform
import uuid
from collections.abc import Mapping
from dataclasses import asdict, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from batchclf import __version__
from batchclf.checkpoint import fingerprint
from batchclf.classifier import build_encoder, build_engine
from batchclf.compute import find_devices, open_model
from batchclf.config import CutSettings, ModelSettings, PredictSettings, ReadSettings
from batchclf.engine import Engine
from batchclf.log import always
from batchclf.notes import NOTE_FORMAT, RUNS
from batchclf.sink import Sink
from batchclf.store import Folder, open_folder
from batchclf.token_budget import choose_way, tune
from batchclf.worker import Tools


class Labelling:
    """A model and an output that fit together. Making it reads the model's files; no writes.

    The fingerprint depends on the model and on the settings that change what stands in the output,
    so that whatever labels with the same ones writes into the same folder.

    Attributes:
        devices: all that `--device` names; `compute` is the first of them.

    Raises:
        ConfigError, CheckpointError: the settings make no sense together.
    """

    def __init__(
        self,
        model: ModelSettings,
        read: ReadSettings,
        predict: PredictSettings,
        cut: CutSettings,
        output: str,
        endpoint_url: str | None,
    ) -> None:
        self._model = model
        self._read = read
        self._predict = predict
        self._cut = cut
        self._endpoint_url = endpoint_url
        self.run_id = uuid.uuid4().hex[:8]
        self.devices = find_devices(model.device)
        self.checkpoint, self.compute = open_model(
            replace(model, device=self.devices[0]), endpoint_url
        )
        self.folder: Folder = open_folder(output, endpoint_url)
        self.sink = Sink(
            self.folder,
            fingerprint(self.checkpoint, self._result_settings()),
            self.checkpoint.labels,
            probs=predict.probs,
        )

    def _result_settings(self) -> dict[str, Any]:
        """The settings that change what stands in the output, and so belong to the fingerprint."""
        return {
            **self.compute.identity,
            "max_length": self.checkpoint.max_length,
            "text_columns": self._read.text_columns,
            "id_column": self._read.id_column,
            "keep": self._read.keep,
            "delimiter": self._read.delimiter,
            "min_score": self._predict.min_score,
            "probs": self._predict.probs,
            "limit": self._cut.limit,
        }

    def sign_log(self) -> None:
        """Have every log line from here on say which run it is of, and which try of its job."""
        given = {
            "job": os.environ.get("AWS_BATCH_JOB_ID"),
            "job_attempt": os.environ.get("AWS_BATCH_JOB_ATTEMPT"),
        }
        always(run=self.run_id, **{name: value for name, value in given.items() if value})

    @property
    def output(self) -> str:
        """Where the labelled files are."""
        return f"{self.folder.uri}/{self.sink.prefix.rstrip('/')}"

    def tools(self, num_rows: int = 0) -> Tools:
        """The model on its device, and all else that shards need.

        Args:
            num_rows: about to be labelled, where it is known: a long job measures its token budget.
        """
        engine = build_engine(self.checkpoint, self.compute, self._model)
        self.tune(engine, num_rows)
        return Tools(
            read=self._read,
            encoder=build_encoder(self.checkpoint),
            engine=engine,
            temperature=self.checkpoint.temperature,
            predict=self._predict,
            sink=self.sink,
            endpoint_url=self._endpoint_url,
        )

    def tune(self, engine: Engine, num_rows: int) -> None:
        """Have the engine compute in the best way and, if nobody chose one, with the best budget.

        Args:
            engine: of this model.
            num_rows: about to be labelled; where they are many, what is best here is measured.
        """
        config, max_length = self.checkpoint.config, self.checkpoint.max_length
        choose_way(engine, config, max_length, num_rows * max_length)
        if self._model.max_batch_tokens is None:
            tune(engine, config, max_length, num_rows * max_length)

    def identity(self) -> dict[str, Any]:
        """What every note says of how its output came to be."""
        return {
            "format": NOTE_FORMAT,
            "fingerprint": self.sink.fingerprint,
            "read": plain(asdict(self._read)),
            "cut": asdict(self._cut),
            "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
        }

    def record_run(self, settings: Mapping[str, Any], what: Mapping[str, Any]) -> None:
        """Write a note about a run: its settings, and what it did."""
        note = {
            **self.identity(),
            "run": self.run_id,
            "directory": str(Path.cwd()),
            "settings": plain(settings),
            "model": {"path": str(self.checkpoint.path), "labels": self.checkpoint.labels},
            "device": str(self.compute.device),
            "dtype": self.compute.dtype_name,
            **what,
            "versions": {
                "batchclf": __version__,
                "python": platform.python_version(),
                **{name: version(name) for name in ("torch", "tokenizers", "pyarrow")},
            },
        }
        name = f"{self.sink.prefix}{RUNS}{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{self.run_id}.json"
        self.folder.put(name, json.dumps(note, indent=1).encode())


def plain(value: Any) -> Any:
    """Settings as JSON takes them, without what may be secret in a URL."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items() if key != "endpoint_url"}
    return value
