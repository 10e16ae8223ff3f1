"""The loop: epochs of steps, each epoch validated, the best weights kept.

Shapes: B rows of a batch, T tokens of its longest row, C labels.
"""

import json
import logging
import math
import threading
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the field's name for it

from batchclf.compute import choose_compute
from batchclf.errors import ConfigError, InputError, Interrupted
from batchclf.log import fields
from batchclf.model import GPT2Classifier
from batchclf.train.display import TrainingDisplay
from batchclf.train.examples import Examples, tokenise
from batchclf.train.history import Epoch, History
from batchclf.train.identity import check_alike, describe
from batchclf.train.objective import Objective, PaddedBatch, label_weights, pad
from batchclf.train.optimisation import Average, freeze, learning_rate_share, new_optimizer
from batchclf.train.prediction import length_grain, predict
from batchclf.train.processes import Processes, unsynced
from batchclf.train.sampling import EpochPlan, Rows, plan_epoch
from batchclf.train.settings import TrainSettings
from batchclf.train.snapshot import Parts, put_back, take
from batchclf.train.training_state import Position, TrainingCheckpoints

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fitted:
    """The model after its best epoch, in eval mode.

    Attributes:
        val_logits: float32 [validation examples, C], of that model.
    """

    model: GPT2Classifier
    history: History
    val_logits: npt.NDArray[np.float32]


@dataclass(frozen=True)
class Surroundings:
    """What a run has around it.

    Attributes:
        processes: the others of this run.
        checkpoints: where training checkpoints go; None for nowhere.
        interrupt: set when the run should stop soon.
        display: told of every step.
    """

    processes: Processes
    checkpoints: TrainingCheckpoints | None = None
    interrupt: threading.Event | None = None
    display: TrainingDisplay | None = None


def fit(
    model: GPT2Classifier,
    tokenizer: Tokenizer,
    train: Examples,
    val: Examples,
    settings: TrainSettings,
    surroundings: Surroundings | None = None,
) -> Fitted:
    """Train a model, in place, and keep the weights of the epoch with the lowest validation loss.

    The same seed on the same CPU with as many threads gives the same weights, also when the run was
    stopped and went on from a training checkpoint.

    Raises:
        ConfigError: the settings do not fit the model, or the checkpoint is of another run.
        InputError: a text without tokens, a label that the model does not have, or a loss that is
            not a number.
        Interrupted: the run was asked to stop; its training checkpoint is written.
    """
    if settings.max_length > model.config.longest:
        raise ConfigError(
            f"max_length {settings.max_length}: the model reads at most {model.config.longest}"
        )
    if settings.lm_weight and model.config.head != "last_token":
        raise ConfigError(f"lm_weight needs the last_token head, not {model.config.head}")
    device = next(model.parameters()).device
    around = surroundings or Surroundings(Processes(0, 1, device))
    training = _Training(model, tokenizer, train, val, settings, around)
    training.resume()
    training.run()
    return training.finish()


class _Training:
    def __init__(
        self,
        model: GPT2Classifier,
        tokenizer: Tokenizer,
        train: Examples,
        val: Examples,
        settings: TrainSettings,
        around: Surroundings,
    ) -> None:
        self._model, self._settings, self._around = model, settings, around
        self._processes, self._checkpoints = around.processes, around.checkpoints
        self._display = around.display or TrainingDisplay()
        num_labels = model.config.num_labels
        self._train = tokenise(tokenizer, train, settings.normalise, num_labels)
        self._val = tokenise(tokenizer, val, settings.normalise, num_labels).cut(
            settings.max_length
        )
        self._train_labels, self._val_labels = torch.tensor(train.labels), torch.tensor(val.labels)
        self._dtype = choose_compute(str(self._processes.device), settings.precision).dtype
        self._grain = length_grain(self._dtype)
        self._identity = describe(
            model, self._train, self._val, settings, self._dtype, self._processes
        )
        check_alike(self._identity, self._processes)

        if settings.dropout is not None:
            model.set_dropout(settings.dropout)
        freeze(model, settings.freeze_layers)
        model.transformer.gradient_checkpointing = settings.gradient_checkpointing
        torch.manual_seed(settings.seed + self._processes.rank)
        self._rng = np.random.default_rng(settings.seed)
        self._average = Average(model, settings.average) if settings.average else None
        self._parts = Parts(
            model,
            new_optimizer(model, settings),
            self._average.model if self._average else None,
            {},
        )
        self._label_weights = label_weights(train.labels, num_labels, settings.class_weights)
        self._at = Position()

    def resume(self) -> None:
        """Go on from the training checkpoint, if there is one; the first process reads it."""
        found = None
        if self._checkpoints and self._processes.is_first:
            found = self._checkpoints.read(self._identity)
        position, tensors = found or (None, {})
        text = self._processes.broadcast_text(json.dumps(position and asdict(position)))
        if json.loads(text) is None:
            return
        self._at = Position.from_dict(json.loads(text))
        put_back(self._processes.broadcast(tensors), self._parts, self._processes)
        self._rng.bit_generator.state = self._at.random_state
        log.info("goes on after epoch %d, step %d", self._at.epoch, self._at.step)

    def run(self) -> None:
        settings, device = self._settings, self._processes.device
        weights = self._label_weights
        objective = Objective(
            self._model, settings, None if weights is None else weights.to(device), self._dtype
        )
        wrapped = self._processes.wrap(objective)
        num_rows = len(self._train.ids)
        self._display.begin(
            num_rows * settings.epochs, num_rows * self._at.epoch + self._at.num_rows
        )
        while self._at.epoch < settings.epochs and not self._out_of_patience():
            self._run_epoch(wrapped)

    def finish(self) -> Fitted:
        """Take the best weights."""
        model = self._model
        model.load_state_dict(self._parts.best)
        model.requires_grad_(requires_grad=True)
        model.transformer.gradient_checkpointing = False
        return Fitted(model.eval(), self._at.history, self._predict_val(model).numpy())

    def _run_epoch(self, wrapped: nn.Module) -> None:
        at, settings = self._at, self._settings
        began = time.perf_counter() - at.seconds
        at.random_state = self._rng.bit_generator.state
        plan = plan_epoch(
            self._train.ids, settings, self._model.config.vocab_size, self._grain, self._rng
        )
        self._model.train()
        while at.step < len(plan.steps):
            learning_rate = self._learning_rate(at.step / len(plan.steps))
            for group in self._parts.optimizer.param_groups:
                group["lr"] = learning_rate
            try:
                interrupted = self._take_step(wrapped, plan)
            except torch.OutOfMemoryError as error:
                raise MemoryError(
                    f"{error} Lower --batch-tokens (and raise --accumulate by as much), or use "
                    "--gradient-checkpointing"
                ) from error
            at.seconds = time.perf_counter() - began
            self._keep(interrupted=interrupted)
        val_logits = self._predict_val(self._parts.average or self._model)
        at.seconds = time.perf_counter() - began
        self._end_epoch(val_logits, self._learning_rate(1 - 1 / len(plan.steps)))

    def _learning_rate(self, share_of_epoch: float) -> float:
        settings = self._settings
        progress = (self._at.epoch + share_of_epoch) / settings.epochs
        share = learning_rate_share(progress, settings.warmup_share, settings.schedule)
        return settings.learning_rate * share

    def _take_step(self, wrapped: nn.Module, plan: EpochPlan) -> bool:
        """One step of the optimizer; returns whether any process was asked to stop."""
        at, processes = self._at, self._processes
        batches = plan.steps[at.step]
        rows = np.concatenate(batches)
        step_weight = self._label_weight(rows)
        lm_norm = float(sum(len(plan.texts[row]) - 1 for row in rows))
        loss_sum = hits_sum = 0.0
        self._parts.optimizer.zero_grad()
        for index, batch in enumerate(batches):
            with nullcontext() if index + 1 == len(batches) else unsynced(wrapped):
                own = batch[processes.rank :: processes.size]
                # All processes take part in every batch, or the others would wait for gradients.
                padded = self._pad(plan, own if len(own) else batch[:1], is_counted=len(own) > 0)
                loss, hits = wrapped(padded, self._label_weight(own) / step_weight, lm_norm)
                # DistributedDataParallel takes the mean over the processes; wanted is the sum.
                (loss * processes.size).backward()
            loss_sum += loss.item()
            hits_sum += hits.item()
        loss_sum, hits_sum, num_stops = processes.sum([loss_sum, hits_sum, self._is_interrupted()])
        self._check_finite(loss_sum, "loss", rows)
        norm = nn.utils.clip_grad_norm_(self._model.parameters(), self._settings.clip_norm)
        self._check_finite(norm.item(), "norm of the gradient", rows)
        self._parts.optimizer.step()

        at.step += 1
        at.history.step_losses.append(loss_sum)
        if self._average:
            self._average.update(self._model, len(at.history.step_losses))
        at.loss_sum += loss_sum * len(rows)
        at.num_hits += hits_sum
        at.num_rows += len(rows)
        self._display.step(
            len(rows),
            epoch=at.epoch + 1,
            loss=at.loss_sum / at.num_rows,
            accuracy=at.num_hits / at.num_rows,
        )
        return num_stops > 0

    def _label_weight(self, rows: Rows) -> float:
        weights = self._label_weights
        return len(rows) if weights is None else weights[self._train_labels[rows]].sum().item()

    def _pad(self, plan: EpochPlan, rows: Rows, *, is_counted: bool = True) -> PaddedBatch:
        device = self._processes.device
        ids, lengths = pad([plan.texts[row] for row in rows], self._model, device, self._grain)
        return PaddedBatch(ids, lengths, self._train_labels[rows].to(device), is_counted)

    def _check_finite(self, value: float, name: str, rows: Rows) -> None:
        if math.isfinite(value):
            return
        raise InputError(
            f"the {name} is {value} at step {self._at.step + 1} of epoch {self._at.epoch + 1}, "
            f"whose batch is {self._train.examples.name_rows(sorted(rows))}; try a lower learning "
            "rate, or look at these texts"
        )

    def _predict_val(self, model: GPT2Classifier) -> Tensor:
        """Each process takes a part, and all get all of it."""
        rank, size = self._processes.rank, self._processes.size
        logits = torch.zeros(len(self._val.ids), model.config.num_labels)
        # Several processes may be told to stop at different moments; they agree after a step.
        on_batch = self._stop_if_asked if size == 1 else None
        own = self._val.ids[rank::size]
        logits[rank::size] = predict(model, own, self._settings.batch_tokens, self._dtype, on_batch)
        return self._processes.sum_tensor(logits)

    def _end_epoch(self, val_logits: Tensor, learning_rate: float) -> None:
        at, settings = self._at, self._settings
        val_loss = F.cross_entropy(val_logits, self._val_labels).item()
        if not math.isfinite(val_loss):
            raise InputError(
                f"the validation loss is {val_loss} after epoch {at.epoch + 1}; try a lower "
                "learning rate"
            )
        epoch = Epoch(
            epoch=at.epoch + 1,
            train_loss=at.loss_sum / at.num_rows,
            train_accuracy=at.num_hits / at.num_rows,
            val_loss=val_loss,
            val_accuracy=(val_logits.argmax(1) == self._val_labels).float().mean().item(),
            learning_rate=learning_rate,
            seconds=round(at.seconds, 3),
        )
        at.history.epochs.append(epoch)
        if at.history.best_epoch == epoch.epoch:
            state = (self._parts.average or self._model).state_dict()
            self._parts.best = {name: tensor.cpu().clone() for name, tensor in state.items()}
        log.info(
            "epoch %d of %d: loss %.4f; validation loss %.4f, accuracy %.4f",
            epoch.epoch,
            settings.epochs,
            epoch.train_loss,
            epoch.val_loss,
            epoch.val_accuracy,
            extra=fields(**asdict(epoch)),
        )
        at.next_epoch()
        at.random_state = self._rng.bit_generator.state
        self._write()

    def _out_of_patience(self) -> bool:
        patience = self._settings.patience
        if patience is None or self._at.epoch - self._at.history.best_epoch < patience:
            return False
        log.info("stopped early: no lower validation loss in %d epochs", patience)
        return True

    def _is_interrupted(self) -> bool:
        return self._around.interrupt is not None and self._around.interrupt.is_set()

    def _stop_if_asked(self) -> None:
        if self._is_interrupted():
            self._keep(interrupted=True)

    def _keep(self, *, interrupted: bool) -> None:
        """Write a training checkpoint if it is time; stop if the run was asked to."""
        checkpoints = self._checkpoints
        if interrupted or (checkpoints and self._at.step % checkpoints.every_steps == 0):
            self._write()
        if interrupted:
            raise Interrupted(
                "interrupted; run the same command again to go on"
                if checkpoints
                else "interrupted; with --checkpoint-dir the same command would go on from here"
            )

    def _write(self) -> None:
        if self._checkpoints is None:
            return
        tensors = take(self._parts, self._processes)
        if self._processes.is_first:
            self._checkpoints.write(self._at, tensors, self._identity)
