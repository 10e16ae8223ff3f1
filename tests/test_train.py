"""Training in memory, on the toy task."""

import copy
import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
import toy_training as toy
from torch.nn import functional as F  # noqa: N812 - the field's name for it
from toy_training import BUSY, TRAIN, VAL, same, train, weights

from batchclf.errors import ConfigError, InputError
from batchclf.train import Examples, Fitted, predict
from batchclf.train.objective import Objective
from batchclf.train.optimisation import Average


@pytest.fixture(scope="module")
def trained() -> Fitted:
    return train()


@pytest.fixture(scope="module")
def busy() -> Fitted:
    return train(**BUSY)


def test_a_simple_task_is_learnt(trained: Fitted) -> None:
    assert trained.history.epochs[-1].val_accuracy == 1.0


def test_a_simple_task_is_learnt_with_all_options_at_once(busy: Fitted) -> None:
    assert busy.history.epochs[-1].val_accuracy > 0.9


def test_the_validation_loss_of_the_best_epoch_is_that_of_the_model_that_is_kept(
    busy: Fitted,
) -> None:
    logits = predict(busy.model, toy.ids_of(VAL), 64)
    loss = F.cross_entropy(logits, torch.tensor(VAL.labels)).item()
    best = busy.history.epochs[busy.history.best_epoch - 1]
    assert best.val_loss == pytest.approx(loss, abs=1e-5)
    np.testing.assert_allclose(busy.val_logits, logits.numpy(), atol=1e-5)


def test_the_history_has_every_epoch_and_every_step(trained: Fitted) -> None:
    history = trained.history
    assert [epoch.epoch for epoch in history.epochs] == [1, 2, 3, 4]
    assert len(history.step_losses) % 4 == 0
    last = history.step_losses[-len(history.step_losses) // 4 :]
    assert min(last) <= history.epochs[-1].train_loss <= max(last)


def test_the_best_epoch_is_kept_and_not_the_last(trained: Fitted) -> None:
    wrong = Examples(TRAIN.texts, [1 - label for label in TRAIN.labels])
    worse = train(copy.deepcopy(trained.model), examples=wrong, epochs=3, learning_rate=1e-3)
    assert worse.history.best_epoch == 1


def test_patience_ends_training_that_gets_no_better(trained: Fitted) -> None:
    wrong = Examples(TRAIN.texts, [1 - label for label in TRAIN.labels])
    worse = train(
        copy.deepcopy(trained.model), examples=wrong, epochs=9, learning_rate=1e-3, patience=2
    )
    assert [epoch.epoch for epoch in worse.history.epochs] == [1, 2, 3]


def test_the_same_seed_gives_the_same_weights(busy: Fitted) -> None:
    assert same(train(**BUSY), busy)


def test_another_seed_gives_other_weights(busy: Fitted) -> None:
    assert not same(train(**BUSY, seed=1), busy)


def test_gradient_checkpointing_changes_nothing(trained: Fitted) -> None:
    assert same(train(gradient_checkpointing=True), trained)


def test_bfloat16_learns_the_same_with_float32_weights(trained: Fitted) -> None:
    low = train(precision="bfloat16")
    assert {tensor.dtype for tensor in weights(low).values()} == {torch.float32}
    assert low.history.epochs[-1].val_accuracy == 1.0
    assert not same(low, trained)


def test_the_flatten_head_is_trained() -> None:
    model = toy.new_model(head="flatten", head_length=16)
    assert train(model, dropout=0.0).history.epochs[-1].val_accuracy > 0.9


def test_accumulated_batches_make_the_step_of_one_large_batch() -> None:
    # texts of one length, so that batches are equal but for their size
    equal = replace(TRAIN, texts=[f"{text.split()[0]} cup" for text in TRAIN.texts])
    options = {"examples": equal, "epochs": 1, "dropout": 0.0, "class_weights": "balanced"}
    whole = train(**options, batch_tokens=10_000)
    parts = train(**options, batch_tokens=40, accumulate=1000)
    assert len(whole.history.step_losses) == len(parts.history.step_losses) == 1
    assert parts.history.step_losses == pytest.approx(whole.history.step_losses, abs=1e-5)
    for name, tensor in weights(whole).items():
        # Adam makes a whole step of the smallest gradient
        torch.testing.assert_close(weights(parts)[name], tensor, atol=1e-3, rtol=0, msg=name)


def test_frozen_layers_stay_as_they_are() -> None:
    before = toy.new_model().state_dict()
    after = weights(train(freeze_layers=1, epochs=1))
    unchanged = {name for name in before if torch.equal(before[name], after[name])}
    frozen = ("transformer.wte.", "transformer.wpe.", "transformer.h.0.")
    assert unchanged == {name for name in before if name.startswith(frozen)}


def test_more_frozen_layers_than_there_are_is_an_error() -> None:
    with pytest.raises(ConfigError, match="freeze_layers 3: the model has 2 layers"):
        train(freeze_layers=3)


def test_dropout_is_what_was_asked_for() -> None:
    model = train(dropout=0.0, epochs=1).model
    found = model.config
    assert (found.embd_dropout, found.attn_dropout, found.resid_dropout) == (0, 0, 0)
    dropouts = [module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    assert set(dropouts) == {0}


def test_balanced_class_weights_lift_a_rare_label() -> None:
    rare = [row for row, label in enumerate(TRAIN.labels) if label][:2]
    kept = [row for row, label in enumerate(TRAIN.labels) if not label or row in rare]
    few = Examples([TRAIN.texts[row] for row in kept], [TRAIN.labels[row] for row in kept])
    probs = {
        weights: F.softmax(
            torch.from_numpy(
                train(examples=few, epochs=1, dropout=0.0, class_weights=weights).val_logits
            ),
            dim=1,
        )[:, 1].mean()
        for weights in ("none", "balanced")
    }
    assert probs["balanced"] > probs["none"]


def test_the_average_starts_close_to_the_weights_and_follows_them() -> None:
    model = toy.new_model()
    average = Average(model, 0.9)
    with torch.no_grad():
        model.score.weight.fill_(1.0)
    before = average.model.score.weight.clone()
    average.update(model, 1)
    share = 9 / 11
    torch.testing.assert_close(average.model.score.weight, before + share * (1 - before))
    average.update(model, 10_000)
    gap = (1 - average.model.score.weight) / (1 - before)
    torch.testing.assert_close(gap, torch.full_like(gap, (1 - share) * 0.9), atol=1e-5, rtol=1e-3)


def test_a_loss_that_is_not_a_number_names_its_step_and_the_rows_of_its_batch() -> None:
    places = [f"news.csv row {row}" for row in range(len(TRAIN.texts))]
    with pytest.raises(
        InputError, match=r"(loss|gradient) is (nan|inf) at step \d of epoch 1.* news.csv row \d+, "
    ):
        train(examples=replace(TRAIN, places=places), learning_rate=1e30, clip_norm=1e30)


def test_weights_that_are_not_numbers_are_found_at_the_first_step() -> None:
    model = toy.new_model()
    with torch.no_grad():
        model.transformer.ln_f.weight[0] = float("nan")
    with pytest.raises(InputError, match=r"the loss is nan at step 1 of epoch 1"):
        train(model)


def test_predictions_stand_in_the_order_of_the_texts(trained: Fitted) -> None:
    texts = toy.ids_of(VAL)
    alone = torch.cat([predict(trained.model, [ids], 1) for ids in texts])
    torch.testing.assert_close(predict(trained.model, texts, 64), alone)


def test_one_training_example_is_enough_to_run() -> None:
    one = Examples(TRAIN.texts[:1], TRAIN.labels[:1])
    assert len(train(examples=one, epochs=1).history.step_losses) == 1


@pytest.mark.parametrize(
    ("texts", "labels", "reason"),
    [
        (["goal"], [2], "example 0: label 2 is none of the model's 2"),
        (["goal", ""], [0, 1], "example 1 is empty"),
    ],
)
def test_examples_that_cannot_be_learnt_from_are_refused(
    texts: list[str], labels: list[int], reason: str
) -> None:
    with pytest.raises(InputError, match=reason):
        train(examples=Examples(texts, labels))


def test_a_max_length_beyond_the_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="reads at most 16"):
        train(max_length=17)


def test_a_language_model_loss_needs_the_head_that_reads_one_token() -> None:
    with pytest.raises(ConfigError, match="lm_weight needs the last_token head"):
        train(toy.new_model(head="flatten", head_length=16), lm_weight=0.5)


def test_every_epoch_is_logged(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("batchclf"), "propagate", True)
    with caplog.at_level(logging.INFO, logger="batchclf"):
        train(epochs=2)
    assert [line.getMessage()[:12] for line in caplog.records] == ["epoch 1 of 2", "epoch 2 of 2"]


def test_a_device_that_is_full_says_what_takes_less_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(Objective, "forward", full)
    with pytest.raises(MemoryError, match=r"CUDA out of memory\. Lower --batch-tokens"):
        train()
