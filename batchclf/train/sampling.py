"""What one epoch sees, and in which order. The same for every process of a run."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from batchclf.batching import plan_batches
from batchclf.train.examples import Ids
from batchclf.train.settings import TrainSettings

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class EpochPlan:
    """One epoch.

    Attributes:
        texts: token ids of every example as this epoch sees it.
        steps: the batches of each step of the optimizer, as positions in `texts`.
    """

    texts: Sequence[Ids]
    steps: Sequence[Sequence[Rows]]


def plan_epoch(
    texts: Sequence[Ids],
    settings: TrainSettings,
    vocab_size: int,
    grain: int,
    rng: np.random.Generator,
) -> EpochPlan:
    """Cut and shuffle the texts as `settings` say.

    Args:
        texts: all token ids of each example.
        settings: crops, noise, budget and accumulation.
        vocab_size: of the model, for random tokens.
        grain: see `plan_batches`.
        rng: all that is random is drawn from it.
    """
    seen = augment(texts, settings, vocab_size, rng)
    batches = shuffled_batches(seen, settings.batch_tokens, grain, rng)
    size = settings.accumulate
    return EpochPlan(seen, [batches[at : at + size] for at in range(0, len(batches), size)])


def augment(
    texts: Sequence[Ids], settings: TrainSettings, vocab_size: int, rng: np.random.Generator
) -> list[Ids]:
    """The texts as one epoch sees them: cut, some at random places, and with random tokens."""
    seen = []
    for text in texts:
        ids = text
        if rng.random() < settings.crop_share:
            shortest = max(1, settings.max_length // 4)
            length = int(rng.integers(shortest, settings.max_length, endpoint=True))
            start = int(rng.integers(max(len(ids) - length, 0), endpoint=True))
            ids = ids[start : start + length]
        ids = ids[: settings.max_length]
        noise = rng.random(len(ids)) < settings.noise_share
        seen.append(np.where(noise, rng.integers(vocab_size, size=len(ids), dtype=np.int32), ids))
    return seen


def shuffled_batches(
    texts: Sequence[Ids], batch_tokens: int, grain: int, rng: np.random.Generator
) -> list[Rows]:
    """Batches of similar lengths in random order, with random company among equal lengths."""
    order = rng.permutation(len(texts))
    planned = plan_batches([len(texts[row]) for row in order], batch_tokens, grain)
    return [order[planned[place]] for place in rng.permutation(len(planned))]
