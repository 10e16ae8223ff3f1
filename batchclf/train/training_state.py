"""Training checkpoints: one file with all that a run needs to go on as if it was never stopped.

`training.safetensors` holds the weights, the best ones so far, the averaged ones, AdamW's moments
and torch's random state of every process; its metadata holds, as JSON, where the run stands and
what it is a run of. It replaces the one before in one rename.
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from safetensors import SafetensorError, safe_open
from torch import Tensor

from batchclf.checkpoint import write_tensors
from batchclf.errors import CheckpointError, ConfigError
from batchclf.store.base import fsync, translate_os_error
from batchclf.train.history import History

FORMAT_VERSION = 1
FILE = "training.safetensors"

_KEY = "batchclf"


@dataclass
class Position:
    """Where a run stands: between two steps, or before the validation of an epoch.

    Attributes:
        epoch: finished ones.
        step: finished ones of the epoch that is under way.
        random_state: numpy's, as that epoch began: its plan is drawn from it again.
        loss_sum, num_hits, num_rows, seconds: of that epoch so far.
    """

    epoch: int = 0
    step: int = 0
    random_state: Mapping[str, Any] = field(default_factory=dict)
    loss_sum: float = 0.0
    num_hits: float = 0.0
    num_rows: int = 0
    seconds: float = 0.0
    history: History = field(default_factory=History)

    def next_epoch(self) -> None:
        """The epoch that was under way is finished."""
        self.epoch, self.step, self.num_rows = self.epoch + 1, 0, 0
        self.loss_sum = self.num_hits = self.seconds = 0.0

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        return cls(**{**values, "history": History.from_dict(values["history"])})


class TrainingCheckpoints:
    """The folder of one run's training checkpoint.

    Args:
        folder: made if need be.
        every_steps: how many steps of the optimizer lie between two; each epoch ends with one.
    """

    def __init__(self, folder: Path, every_steps: int) -> None:
        self.every_steps = every_steps
        self._folder = folder
        self._path = folder / FILE

    def read(self, identity: Mapping[str, Any]) -> tuple[Position, dict[str, Tensor]] | None:
        """What the last run left, or None.

        Args:
            identity: what the weights depend on: settings, examples, model; plain values.

        Raises:
            CheckpointError: the file is damaged, or not ours.
            ConfigError: it belongs to a run of other settings or examples.
        """
        if not self._path.exists():
            return None
        try:
            with safe_open(self._path, framework="pt") as file:
                note = json.loads((file.metadata() or {}).get(_KEY, "null"))
                if not isinstance(note, dict) or note.get("format_version") != FORMAT_VERSION:
                    raise CheckpointError(
                        f"{self._path} is not a training checkpoint of this version of batchclf; "
                        "choose another --checkpoint-dir, or delete it"
                    )
                _check_same(self._path, note["identity"], json.loads(json.dumps(identity)))
                position = Position.from_dict(note["position"])
                names = file.keys()
                tensors = {name: file.get_tensor(name).clone() for name in names}
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{self._path} is cut short or damaged ({error}); delete it to start again"
            ) from error
        except OSError as error:
            raise translate_os_error(error, str(self._path)) from error
        return position, tensors

    def write(
        self, position: Position, tensors: Mapping[str, Tensor], identity: Mapping[str, Any]
    ) -> None:
        """Replace what was there, at once or not at all.

        Raises:
            OutOfSpaceError: the disk is full; what was there still is.
        """
        temporary = self._path.with_name(f".{FILE}.tmp")
        note = {
            "format_version": FORMAT_VERSION,
            "identity": identity,
            "position": asdict(position),
        }
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_tensors(temporary, tensors, {_KEY: json.dumps(note)})
            fsync(temporary)
            temporary.replace(self._path)
            fsync(self._folder)
        except OSError as error:
            with suppress(OSError):  # where the folder is none, there is no file either
                temporary.unlink()
            raise translate_os_error(error, f"training checkpoint {self._path}") from error


def _check_same(path: Path, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    for name in {**here, **there}:
        if there.get(name) != here.get(name):
            raise ConfigError(
                f"{path} is of another run: {name.replace('_', ' ')} was {there.get(name)!r}, "
                f"now {here.get(name)!r}; choose another --checkpoint-dir, or delete it"
            )
