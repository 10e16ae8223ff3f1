"""The parts of training, each alone."""

from typing import Any

import models
import numpy as np
import pytest
import torch
import toy_training as toy
from hypothesis import given, strategies as st
from torch.nn import functional as F  # noqa: N812 - the field's name for it
from transformers import GPT2LMHeadModel

from batchclf.checkpoint import END_OF_TEXT
from batchclf.errors import ConfigError, InputError
from batchclf.labelled import Labelled
from batchclf.train import Examples, TrainSettings
from batchclf.train.objective import Objective, PaddedBatch, label_weights, pad
from batchclf.train.optimisation import learning_rate_share, parameter_groups
from batchclf.train.sampling import augment, plan_epoch, shuffled_batches
from batchclf.train.splits import choose_labels, compare, to_examples


def test_a_tokenizer_spells_any_text_back() -> None:
    text = "Größe 東京 🎉\x00 goal match"
    assert toy.TOKENIZER.decode(toy.TOKENIZER.encode(text).ids) == text


def test_a_tokenizer_knows_the_end_of_text_as_its_first_token() -> None:
    assert toy.TOKENIZER.encode(END_OF_TEXT).ids == [0]
    assert toy.TOKENIZER.get_vocab_size() <= 300


@pytest.mark.parametrize(
    ("schedule", "shares"),
    [("cosine", [0, 0.5, 1, 0.525, 0.05]), ("linear", [0, 0.5, 1, 0.525, 0.05])],
)
def test_the_learning_rate_warms_up_and_falls(schedule: Any, shares: list[float]) -> None:
    found = [learning_rate_share(progress, 0.1, schedule) for progress in (0, 0.05, 0.1, 0.55, 1)]
    assert found == pytest.approx(shares)


def test_a_cosine_stays_above_a_line_before_the_middle() -> None:
    assert learning_rate_share(0.3, 0.1, "cosine") > learning_rate_share(0.3, 0.1, "linear")


def test_without_a_warm_up_the_learning_rate_starts_at_its_top() -> None:
    assert learning_rate_share(0, 0, "cosine") == 1


def test_embeddings_norms_and_biases_do_not_decay() -> None:
    model = toy.new_model()
    decayed, others = parameter_groups(model, 0.1)
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
    seen = augment([text] * 200, settings, 300, np.random.default_rng(0))
    assert {len(ids) for ids in seen} <= set(range(4, 17))
    assert all(np.array_equal(ids, np.arange(ids[0], ids[0] + len(ids))) for ids in seen)
    assert max(ids[-1] for ids in seen) == 99


def test_crops_of_the_shortest_texts_are_never_empty() -> None:
    settings = TrainSettings(max_length=2, crop_share=0.9)
    seen = augment([np.zeros(1, np.int32)] * 50, settings, 300, np.random.default_rng(0))
    assert {len(ids) for ids in seen} == {1}


def test_noise_replaces_its_share_of_the_tokens() -> None:
    settings = TrainSettings(max_length=1000, noise_share=0.2)
    text = np.full(1000, 7, dtype=np.int32)
    seen = np.concatenate(augment([text] * 20, settings, 300, np.random.default_rng(0)))
    assert (seen != 7).mean() == pytest.approx(0.2, abs=0.02)


@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=60),
    batch_tokens=st.integers(1, 100),
    grain=st.sampled_from([1, 8]),
)
def test_every_example_is_in_one_batch_of_an_epoch(
    lengths: list[int], batch_tokens: int, grain: int
) -> None:
    texts = [np.zeros(length, np.int32) for length in lengths]
    batches = shuffled_batches(texts, batch_tokens, grain, np.random.default_rng(0))
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
    assert all(
        len(batch) == 1 or max(lengths[row] for row in batch) * len(batch) <= batch_tokens
        for batch in batches
    )


def test_a_step_takes_the_batches_that_are_accumulated() -> None:
    texts = [np.zeros(4, np.int32)] * 10
    settings = TrainSettings(max_length=16, batch_tokens=8, accumulate=2)
    plan = plan_epoch(texts, settings, 300, 1, np.random.default_rng(0))
    assert [len(batches) for batches in plan.steps] == [2, 2, 1]


def padded(texts: list[list[int]], labels: list[int], *, is_counted: bool = True) -> PaddedBatch:
    arrays = [np.array(text, np.int32) for text in texts]
    ids, lengths = pad(arrays, toy.new_model(), torch.device("cpu"))
    return PaddedBatch(ids, lengths, torch.tensor(labels), is_counted)


def objective(model: Any, **changes: Any) -> Objective:
    settings = TrainSettings(max_length=16, **changes)
    return Objective(model, settings, None, torch.float32).eval()


def test_the_language_model_loss_is_that_of_transformers() -> None:
    hf = models.random_hf_model(
        vocab_size=300, n_positions=16, n_embd=16, n_layer=2, n_head=2, pad_token_id=0
    )
    ours = models.our_model(hf)
    language_model = GPT2LMHeadModel(hf.config).eval()
    language_model.transformer.load_state_dict(hf.transformer.state_dict())
    texts = [[5, 6, 7, 8], [9, 10], [11]]
    batch = padded(texts, [0, 1, 2])
    expected = sum(
        F.cross_entropy(
            language_model(torch.tensor([text])).logits[0, :-1],
            torch.tensor(text[1:]),
            reduction="sum",
        ).item()
        for text in texts
        if len(text) > 1
    )
    num_next = sum(len(text) - 1 for text in texts)
    labels_only, _ = objective(ours)(batch, 1.0, num_next)
    both, _ = objective(ours, lm_weight=0.5)(batch, 1.0, num_next)
    assert (both - labels_only).item() == pytest.approx(0.5 * expected / num_next, rel=1e-5)


def test_batches_are_padded_to_whole_blocks_but_never_beyond_the_model() -> None:
    model = toy.new_model(max_positions=13)
    texts = [np.ones(length, np.int32) for length in (5, 10)]
    shapes = [pad([text], model, torch.device("cpu"), grain=8)[0].shape[1] for text in texts]
    assert shapes == [8, 13]


def test_texts_of_one_token_have_no_language_model_loss() -> None:
    model = toy.new_model()
    batch = padded([[5], [6]], [0, 1])
    with_lm, _ = objective(model, lm_weight=0.5)(batch, 1.0, 0)
    without, _ = objective(model)(batch, 1.0, 0)
    torch.testing.assert_close(with_lm, without)


def test_rows_that_do_not_count_add_nothing() -> None:
    model = toy.new_model()
    batch = padded([[5, 6], [6, 7]], [0, 1], is_counted=False)
    loss, hits = objective(model, lm_weight=0.5)(batch, 0.0, 2)
    loss.backward()
    assert (loss.item(), hits.item()) == (0, 0)
    assert all(not parameter.grad.any() for parameter in model.parameters())


def test_balanced_weights_make_every_label_count_the_same() -> None:
    labels = [0, 0, 0, 1]
    weights = label_weights(labels, 3, "balanced")
    assert weights is not None
    assert weights[labels].sum().item() == pytest.approx(len(labels))
    assert (weights[0] * 3).item() == pytest.approx(weights[1].item())


def test_texts_and_labels_must_be_as_many() -> None:
    with pytest.raises(InputError, match="1 texts, but 2 labels"):
        Examples(["goal"], [0, 1])


def test_no_examples_are_refused() -> None:
    with pytest.raises(InputError, match="no examples"):
        Examples([], [])


def test_rows_of_one_file_are_named_together() -> None:
    places = ["a.csv row 3", "a.csv row 4", "b.csv row 0"]
    assert (
        Examples(["x"] * 3, [0] * 3, places).name_rows([0, 1, 2]) == "a.csv row 3, 4; b.csv row 0"
    )


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"patience": 0}, "patience must be at least 1"),
        ({"learning_rate": 0}, "learning_rate must be above 0"),
        ({"learning_rate": float("nan")}, "learning_rate must be above 0"),
        ({"lm_weight": -1}, "lm_weight must be 0 or more"),
        ({"noise_share": 1}, "noise_share must be from 0"),
        ({"dropout": 1.5}, "dropout must be from 0"),
        ({"schedule": "step"}, "schedule must be one of cosine, linear"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        TrainSettings(**{"max_length": 16, **changes})


def labelled(*rows: tuple[str, str]) -> Labelled:
    texts, labels = [row[0] for row in rows], [row[1] for row in rows]
    return Labelled(texts, labels, [f"x.csv row {row}" for row in range(len(rows))], 0)


def test_labels_are_sorted_unless_their_order_is_given() -> None:
    train = labelled(("a", "tech"), ("b", "tech"), ("c", "sport"), ("d", "sport"))
    assert choose_labels(train, ()) == ("sport", "tech")
    assert choose_labels(train, ("tech", "sport")) == ("tech", "sport")


def test_labels_that_differ_by_case_alone_are_both_named_with_their_rows() -> None:
    with pytest.raises(
        InputError,
        match=r"'Sport' and 'sport' differ .* alone, 'Sport' at x\.csv row 1, 'sport' at",
    ):
        choose_labels(labelled(("a", "sport"), ("b", "Sport"), ("c", "tech")), ())


def test_a_label_without_a_name_is_refused() -> None:
    with pytest.raises(ConfigError, match="--labels has an empty name: 'sport,'"):
        choose_labels(labelled(("a", "sport")), ("sport", ""))


def test_a_label_wanted_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="names a label twice"):
        choose_labels(labelled(("a", "sport")), ("sport", "sport"))


def test_an_unknown_label_that_differs_by_case_says_so() -> None:
    with pytest.raises(InputError, match=r"x\.csv row 0: unknown label 'Sport'.*'sport' differs"):
        to_examples(labelled(("a", "Sport")), ("sport", "tech"))


def test_repeats_are_counted_between_all_splits_and_dropped_from_training_alone() -> None:
    splits = compare(
        {
            "train": labelled(("A  b", "x"), ("c", "x"), ("d", "y")),
            "val": labelled(("a b", "x"), ("e", "y")),
            "test": labelled(("D", "y"), ("e", "y")),
        },
        drop_leaked=True,
    )
    assert splits.repeats == {"train_val": 1, "train_test": 1, "val_test": 1}
    assert (splits.train.texts, splits.num_dropped) == (["c"], 2)
    assert len(splits.by_name["test"]) == 2


def test_nothing_left_to_train_on_is_an_error() -> None:
    both = labelled(("a", "x"), ("b", "y"))
    with pytest.raises(InputError, match="all training articles stand in the other data"):
        compare({"train": both, "val": both}, drop_leaked=True)
