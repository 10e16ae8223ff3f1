"""Training on a toy task: which of two sets of words a text is made of."""

import copy
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F  # noqa: N812 - the field's name for it

from batchclf.checkpoint import END_OF_TEXT
from batchclf.errors import ConfigError, InputError
from batchclf.model import GPT2Classifier, ModelConfig
from batchclf.train import (
    Examples,
    Trained,
    TrainSettings,
    _augment,
    _parameter_groups,
    _schedule,
    _shuffled_batches,
    fit,
    fit_temperature,
    predict,
    train_tokenizer,
)

WORDS = ("goal match cup striker league", "budget vote minister party bill")


def toy_examples(count: int, seed: int) -> Examples:
    rng = random.Random(seed)
    labels = [rng.randrange(2) for _ in range(count)]
    texts = [" ".join(rng.choices(WORDS[label].split(), k=rng.randint(1, 12))) for label in labels]
    return Examples(texts, labels)


TRAIN, VAL = toy_examples(64, seed=0), toy_examples(32, seed=1)
TOKENIZER = train_tokenizer(TRAIN.texts, 300)
SETTINGS: dict[str, Any] = {
    "max_length": 16,
    "epochs": 4,
    "batch_tokens": 128,
    "learning_rate": 3e-3,
    "crop_share": 0.5,
    "noise_share": 0.1,
}


def new_model(seed: int = 0) -> GPT2Classifier:
    torch.manual_seed(seed)
    model = GPT2Classifier(
        ModelConfig(
            vocab_size=TOKENIZER.get_vocab_size(),
            max_positions=16,
            hidden_size=16,
            num_layers=2,
            num_heads=2,
            inner_size=32,
            num_labels=2,
            pad_token_id=0,
        )
    )
    model.init_weights()
    return model


def train(**changes: Any) -> Trained:
    return fit(new_model(), TOKENIZER, TRAIN, VAL, TrainSettings(**(SETTINGS | changes)))


def ids_of(examples: Examples) -> list[Any]:
    return [np.array(TOKENIZER.encode(text).ids[:16], np.int32) for text in examples.texts]


@pytest.fixture(scope="module")
def trained() -> Trained:
    return train()


def test_a_simple_task_is_learnt(trained: Trained) -> None:
    assert trained.metrics["val_accuracy"] == 1.0
    assert trained.metrics["val_macro_f1"] == 1.0


def test_metrics_are_those_of_the_model_that_is_kept(trained: Trained) -> None:
    logits = predict(trained.model, ids_of(VAL), 64) / trained.temperature
    loss = F.cross_entropy(logits, torch.tensor(VAL.labels)).item()
    assert trained.metrics["val_loss"] == pytest.approx(loss, abs=1e-5)


def test_the_best_epoch_is_kept_and_not_the_last() -> None:
    good = train(epochs=4, learning_rate=3e-3)
    worse = fit(
        copy.deepcopy(good.model),
        TOKENIZER,
        Examples(TRAIN.texts, [1 - label for label in TRAIN.labels]),
        VAL,
        TrainSettings(**(SETTINGS | {"epochs": 3, "learning_rate": 1e-3})),
    )
    assert worse.metrics["best_epoch"] == 1


def test_the_same_seed_gives_the_same_weights(trained: Trained) -> None:
    again = train()
    for name, tensor in again.model.state_dict().items():
        assert torch.equal(tensor, trained.model.state_dict()[name]), name


def test_another_seed_gives_other_weights(trained: Trained) -> None:
    other = train(seed=1).model.state_dict()
    assert any(not torch.equal(other[k], v) for k, v in trained.model.state_dict().items())


def test_a_model_that_diverges_is_an_error() -> None:
    with pytest.raises(InputError, match="lower learning rate"):
        train(learning_rate=1e30, clip_norm=1e30)


def test_predictions_stand_in_the_order_of_the_texts(trained: Trained) -> None:
    texts = ids_of(VAL)
    alone = torch.cat([predict(trained.model, [ids], 1) for ids in texts])
    torch.testing.assert_close(predict(trained.model, texts, 64), alone)


def test_a_tokenizer_spells_any_text_back() -> None:
    text = "Größe 東京 🎉\x00 goal match"
    assert TOKENIZER.decode(TOKENIZER.encode(text).ids) == text


def test_a_tokenizer_knows_the_end_of_text_as_its_first_token() -> None:
    assert TOKENIZER.encode(END_OF_TEXT).ids == [0]
    assert TOKENIZER.get_vocab_size() <= 300


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_a_temperature_undoes_a_scale_of_the_logits(temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(20_000, 4, generator=generator) * 2
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator).squeeze(1)
    assert fit_temperature(logits * temperature, labels) == pytest.approx(temperature, rel=0.05)


def test_the_learning_rate_warms_up_and_falls() -> None:
    shares = [_schedule(progress, 0.1) for progress in (0, 0.05, 0.1, 0.55, 1)]
    assert shares == pytest.approx([0, 0.5, 1, 0.525, 0.05])


def test_without_a_warm_up_the_learning_rate_starts_at_its_top() -> None:
    assert _schedule(0, 0) == 1


def test_embeddings_norms_and_biases_do_not_decay() -> None:
    model = new_model()
    decayed, others = _parameter_groups(model, 0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {names[id(parameter)].rsplit(".", 2)[-2] for parameter in decayed["params"]} == {
        "c_attn",
        "c_proj",
        "c_fc",
        "score",
    }
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0)
    assert len(decayed["params"]) + len(others["params"]) == len(names)


def test_crops_are_pieces_of_the_text_that_the_model_can_read() -> None:
    settings = TrainSettings(max_length=16, crop_share=0.9)
    text = np.arange(100, dtype=np.int32)
    seen = _augment([text] * 200, settings, 300, np.random.default_rng(0))
    assert {len(ids) for ids in seen} <= set(range(4, 17))
    assert all(np.array_equal(ids, np.arange(ids[0], ids[0] + len(ids))) for ids in seen)
    assert max(ids[-1] for ids in seen) == 99


def test_noise_replaces_its_share_of_the_tokens() -> None:
    settings = TrainSettings(max_length=1000, noise_share=0.2)
    text = np.full(1000, 7, dtype=np.int32)
    seen = np.concatenate(_augment([text] * 20, settings, 300, np.random.default_rng(0)))
    assert (seen != 7).mean() == pytest.approx(0.2, abs=0.02)


def test_every_example_is_in_one_batch_of_an_epoch() -> None:
    texts = [np.zeros(1 + row % 7, np.int32) for row in range(50)]
    batches = _shuffled_batches(texts, 20, np.random.default_rng(0))
    assert sorted(np.concatenate(batches).tolist()) == list(range(50))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"max_length": 17}, "reads at most 16"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"learning_rate": 0}, "learning_rate must be above 0"),
        ({"noise_share": 1}, "noise_share must be from 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        train(**changes)


@pytest.mark.parametrize(
    ("texts", "labels", "reason"),
    [
        (["goal"], [2], "label 2 is none of the model's 2"),
        (["goal", ""], [0, 1], "example 1 is empty"),
    ],
)
def test_examples_that_cannot_be_learnt_from_are_refused(
    texts: list[str], labels: list[int], reason: str
) -> None:
    settings = TrainSettings(max_length=16)
    with pytest.raises(InputError, match=reason):
        fit(new_model(), TOKENIZER, Examples(texts, labels), VAL, settings)


def test_texts_and_labels_must_be_as_many() -> None:
    with pytest.raises(InputError, match="1 texts, but 2 labels"):
        Examples(["goal"], [0, 1])


def test_no_examples_are_refused() -> None:
    with pytest.raises(InputError, match="no examples"):
        Examples([], [])
