from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self


@dataclass(frozen=True)
class Epoch:
    """What came of one epoch.

    Attributes:
        epoch: from 1.
        train_loss: mean over its steps, weighted by rows; as it was made small.
        train_accuracy: of its rows when they were trained on.
        val_loss: cross-entropy of the validation examples, without temperature.
        learning_rate: of the last step.
        seconds: with its validation.
    """

    epoch: int
    train_loss: float
    train_accuracy: float
    val_loss: float
    val_accuracy: float
    learning_rate: float
    seconds: float


@dataclass
class History:
    """The run so far.

    Attributes:
        step_losses: one a step of the optimizer.
    """

    epochs: list[Epoch] = field(default_factory=list)
    step_losses: list[float] = field(default_factory=list)

    @property
    def best_epoch(self) -> int:
        """The epoch with the lowest validation loss, the first of several; 0 before the first."""
        best = min(self.epochs, key=lambda epoch: epoch.val_loss, default=None)
        return 0 if best is None else best.epoch

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "best_epoch": self.best_epoch}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        return cls([Epoch(**epoch) for epoch in values["epochs"]], list(values["step_losses"]))
