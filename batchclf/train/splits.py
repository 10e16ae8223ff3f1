"""The articles of a run: labels that fit together, and articles that stand in two splits."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from batchclf.errors import ConfigError, InputError
from batchclf.labelled import Labelled
from batchclf.log import fields
from batchclf.text import normalise
from batchclf.train.examples import Examples

log = logging.getLogger(__name__)

_LEAST_LABELS = 2


@dataclass(frozen=True)
class Splits:
    """Articles by split.

    Attributes:
        by_name: `train`, `val`, and `test` where there is one.
        repeats: `train_val` -> articles of the first split that also stand in the second, letter
            case and white space aside.
        num_dropped: training articles that were left out for that.
    """

    by_name: Mapping[str, Labelled]
    repeats: Mapping[str, int]
    num_dropped: int

    @property
    def train(self) -> Labelled:
        return self.by_name["train"]


def compare(by_name: Mapping[str, Labelled], *, drop_leaked: bool) -> Splits:
    """Report the articles that stand in two splits; they make a model look better than it is.

    Args:
        by_name: `train` first.
        drop_leaked: leave those out of `train`.

    Raises:
        InputError: nothing is left to train on.
    """
    texts = {
        name: [normalise(text, "lower+collapse") for text in found.texts]
        for name, found in by_name.items()
    }
    known = {name: set(found) for name, found in texts.items()}
    repeats = {}
    for one, other in combinations(by_name, 2):
        count = sum(text in known[other] for text in texts[one])
        repeats[f"{one}_{other}"] = count
        if count:
            is_dropped = drop_leaked and one == "train"
            hint = "" if drop_leaked or one != "train" else "; --drop-leaked leaves them out"
            log.log(
                logging.INFO if is_dropped else logging.WARNING,
                "%d %s articles also stand in the %s data%s",
                count,
                _WORDS[one],
                _WORDS[other],
                hint,
                extra=fields(repeats=count, split=one, also_in=other),
            )
    if not drop_leaked:
        return Splits(by_name, repeats, 0)
    held_out = set().union(*(found for name, found in known.items() if name != "train"))
    leaked = [text in held_out for text in texts["train"]]
    if all(leaked):
        raise InputError("all training articles stand in the other data too; nothing is left")
    if any(leaked):
        log.info("left out %d training articles that stand in the other data", sum(leaked))
    return Splits({**by_name, "train": by_name["train"].without(leaked)}, repeats, sum(leaked))


_WORDS = {"train": "training", "val": "validation", "test": "test"}


def choose_labels(train: Labelled, wanted: Sequence[str]) -> tuple[str, ...]:
    """The labels of a model, in their order: those wanted, else those of the training data, sorted.

    Raises:
        InputError: there is one label only, or two that differ by letter case alone.
        ConfigError: a label is wanted twice, or has no name.
    """
    labels = tuple(wanted) or tuple(sorted(set(train.labels)))
    if not all(labels):
        raise ConfigError(f"--labels has an empty name: {','.join(labels)!r}; write A,B")
    if len(set(labels)) != len(labels):
        raise ConfigError(f"--labels names a label twice: {', '.join(labels)}")
    _refuse_case_twins(labels, train)
    if len(labels) < _LEAST_LABELS:
        raise InputError(f"all articles have one label, {labels[0]!r}; nothing to learn")
    counts = Counter(train.labels)
    for label in labels:
        if counts[label] < _LEAST_LABELS:
            log.warning(
                "%s training articles have the label %r; the model will hardly know it",
                "no" if not counts[label] else "only 1 of the",
                label,
            )
    return labels


def to_examples(found: Labelled, labels: Sequence[str]) -> Examples:
    """Labels as positions.

    Raises:
        InputError: an unknown label; says which and where.
    """
    index = {label: number for number, label in enumerate(labels)}
    for label, place in zip(found.labels, found.places, strict=True):
        if label not in index:
            twin = next((known for known in labels if known.casefold() == label.casefold()), None)
            hint = f"; {twin!r} differs in letter case alone" if twin else ""
            raise InputError(
                f"{place}: unknown label {label!r}; known are {', '.join(labels)}{hint}"
            )
    return Examples(found.texts, [index[label] for label in found.labels], found.places)


def _refuse_case_twins(labels: Sequence[str], train: Labelled) -> None:
    first: dict[str, str] = {}
    for label in labels:
        twin = first.setdefault(label.casefold(), label)
        if twin != label:
            raise InputError(
                f"the labels {twin!r} and {label!r} differ in letter case alone"
                f"{_seen(twin, train)}{_seen(label, train)}; write them alike"
            )


def _seen(label: str, train: Labelled) -> str:
    if label not in train.labels:
        return ""
    return f", {label!r} at {train.places[train.labels.index(label)]}"
