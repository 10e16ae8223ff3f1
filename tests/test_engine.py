import threading
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings, strategies as st

import batchclf.engine
import batchclf.streams
from batchclf.compute import Compute, choose_compute
from batchclf.engine import Engine
from batchclf.errors import ConfigError
from batchclf.model import GPT2Classifier
from batchclf.model_config import ModelConfig

CPU = Compute(torch.device("cpu"), torch.float32)
HALF = Compute(torch.device("cpu"), torch.bfloat16)
PAD = 0


def random_model() -> GPT2Classifier:
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=50,
        max_positions=32,
        hidden_size=16,
        num_layers=2,
        num_heads=2,
        inner_size=32,
        num_labels=3,
        pad_token_id=PAD,
    )
    model = GPT2Classifier(config)
    model.init_weights(std=0.3)
    return model.eval()


MODEL = random_model()


@pytest.fixture
def model() -> GPT2Classifier:
    return MODEL


class SmallMemory(GPT2Classifier):
    """A model on a device that has room for so many tokens."""

    def __init__(self, model: GPT2Classifier, most_tokens: int) -> None:
        super().__init__(model.config)
        self.load_state_dict(model.state_dict())
        self.most_tokens = most_tokens
        self.num_tokens: list[int] = []

    def forward(self, ids_BT: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:  # noqa: N803
        if ids_BT.numel() > self.most_tokens:
            raise torch.OutOfMemoryError
        self.num_tokens.append(ids_BT.numel())
        logits: torch.Tensor = super().forward(ids_BT, lengths_B)
        return logits


def joined(texts: Sequence[Sequence[int]]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    ids = np.array([token for text in texts for token in text], dtype=np.int32)
    return ids, np.concatenate(([0], np.cumsum([len(text) for text in texts]))).astype(np.int64)


def ignore(num_rows: int, num_tokens: int) -> None:
    pass


def alone(model: GPT2Classifier, texts: Sequence[Sequence[int]]) -> npt.NDArray[np.float32]:
    with torch.inference_mode():
        logits = [model(torch.tensor([text]), torch.tensor([len(text)]))[0] for text in texts]
    return torch.stack(logits).numpy()


texts_lists = st.lists(
    st.lists(st.integers(1, 49), min_size=1, max_size=32), min_size=1, max_size=20
)


@given(texts_lists, st.integers(1, 200), st.integers(2, 4))
@settings(max_examples=30)
def test_batches_side_by_side_give_the_same_logits(
    texts: list[list[int]], budget: int, num_streams: int
) -> None:
    found = Engine(MODEL, CPU, budget, num_streams).predict(*joined(texts), ignore)
    np.testing.assert_allclose(found.logits_NC, alone(MODEL, texts), atol=1e-5)


@given(texts_lists, st.integers(1, 200), st.integers(2, 4))
@settings(max_examples=30, deadline=None)
def test_work_that_is_cut_up_gives_the_same_logits(
    texts: list[list[int]], budget: int, num_streams: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batchclf.streams, "_STREAM_FLOPS", 1)
        found = Engine(MODEL, CPU, budget, num_streams).predict(*joined(texts), ignore)
    np.testing.assert_allclose(found.logits_NC, alone(MODEL, texts), atol=1e-5)


@given(texts_lists, st.integers(1, 200))
@settings(max_examples=50, deadline=None)
def test_logits_stand_in_the_order_of_the_examples_whatever_the_budget(
    texts: list[list[int]], budget: int
) -> None:
    found = Engine(MODEL, CPU, budget).predict(*joined(texts), ignore)
    np.testing.assert_allclose(found.logits_NC, alone(MODEL, texts), atol=1e-5)
    assert not found.failed_N.any()


def test_no_examples_give_no_logits(model: GPT2Classifier) -> None:
    found = Engine(model, CPU).predict(*joined([]), ignore)
    assert found.logits_NC.shape == (0, 3)


def test_repeats_are_computed_once(model: GPT2Classifier) -> None:
    small = SmallMemory(model, 1000)
    found = Engine(small, CPU, 100).predict(*joined([[1, 2, 3], [4], [1, 2, 3]]), ignore)
    assert (found.num_distinct, sum(small.num_tokens)) == (2, found.num_padded_tokens)
    np.testing.assert_array_equal(found.logits_NC[0], found.logits_NC[2])


def test_batches_tell_all_their_rows_and_tokens_repeats_included(model: GPT2Classifier) -> None:
    told: list[tuple[int, int]] = []
    texts = [[1, 2, 3], [4], [1, 2, 3]]
    Engine(model, CPU).predict(*joined(texts), lambda *counts: told.append(counts))
    assert np.sum(told, axis=0).tolist() == [3, 7]


def test_pads_at_the_end_of_a_text_are_dropped(model: GPT2Classifier) -> None:
    found = Engine(model, CPU).predict(*joined([[5, 6, PAD, PAD], [5, 6], [PAD, PAD]]), ignore)
    np.testing.assert_array_equal(found.logits_NC[0], found.logits_NC[1])
    np.testing.assert_allclose(found.logits_NC[2], alone(model, [[PAD]])[0], atol=1e-5)


def test_a_batch_that_does_not_fit_is_halved_with_the_same_logits(model: GPT2Classifier) -> None:
    texts = [[row + 1] * 8 for row in range(16)]
    small = SmallMemory(model, 40)
    engine = Engine(small, CPU, 128)
    found = engine.predict(*joined(texts), ignore)
    np.testing.assert_allclose(found.logits_NC, alone(model, texts), atol=1e-5)
    assert not found.failed_N.any()


def test_the_budget_that_fits_is_remembered(model: GPT2Classifier) -> None:
    engine = Engine(SmallMemory(model, 40), CPU, 128)
    engine.predict(*joined([[row + 1] * 8 for row in range(16)]), ignore)
    assert engine.max_batch_tokens <= 64


def test_a_row_that_does_not_fit_alone_is_marked_and_the_others_are_labelled(
    model: GPT2Classifier,
) -> None:
    texts = [[1] * 30, [2] * 4, [3] * 4]
    found = Engine(SmallMemory(model, 16), CPU, 64).predict(*joined(texts), ignore)
    assert found.failed_N.tolist() == [True, False, False]
    np.testing.assert_allclose(found.logits_NC[1:], alone(model, texts[1:]), atol=1e-5)


def test_a_callback_may_stop_the_work(model: GPT2Classifier) -> None:
    def stop(num_rows: int, num_tokens: int) -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        Engine(model, CPU).predict(*joined([[1]]), stop)


def test_bfloat16_agrees_on_the_labels_of_a_longest_text(model: GPT2Classifier) -> None:
    compute = choose_compute("cpu", "bfloat16")
    half = GPT2Classifier(model.config)
    half.load_state_dict(model.state_dict())
    texts = [list(range(1, 33)), [7, 8, 9]]
    found = Engine(half.to(torch.bfloat16), compute).predict(*joined(texts), ignore)
    np.testing.assert_allclose(found.logits_NC, alone(model, texts), atol=0.2)


@pytest.mark.parametrize("device", ["tpu", "cpu:x", "mps", ""])
def test_an_unknown_device_is_refused(device: str) -> None:
    with pytest.raises(ConfigError, match="use auto, cpu, cuda"):
        choose_compute(device)


def test_a_cuda_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="torch sees"):
        choose_compute(f"cuda:{torch.cuda.device_count()}")


def test_the_dtype_that_was_asked_for_is_taken() -> None:
    assert choose_compute("cpu", "float32").dtype_name == "float32"


@pytest.fixture
def costly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every token is worth all cores, and another batch costs next to nothing."""
    monkeypatch.setattr(batchclf.streams, "_CORE_FLOPS", 1)
    monkeypatch.setattr(batchclf.streams, "_STREAM_FLOPS", 1)
    monkeypatch.setattr(batchclf.engine, "_BATCH_FLOPS", 1)


@pytest.fixture
def shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every token is worth a stream."""
    monkeypatch.setattr(batchclf.streams, "_STREAM_FLOPS", 1)


@pytest.fixture(params=[1, 2, 3])
def torch_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def sizes_of_batches(engine: Engine, texts: Sequence[list[int]]) -> list[int]:
    sizes: list[int] = []
    engine.predict(*joined(texts), lambda _, num_tokens: sizes.append(num_tokens))
    return sizes


@pytest.mark.usefixtures("costly")
def test_what_is_more_than_a_batch_and_less_than_all_streams_compute_is_spread_over_them(
    model: GPT2Classifier,
) -> None:
    texts = [[number, *[5] * 9] for number in range(1, 13)]  # 120 tokens
    assert sizes_of_batches(Engine(model, CPU, 100, num_streams=2), texts) == [60, 60]


def test_work_that_is_not_worth_two_cores_is_not_spread(model: GPT2Classifier) -> None:
    texts = [[number, *[5] * 9] for number in range(1, 13)]
    assert sizes_of_batches(Engine(model, CPU, 100, num_streams=2), texts) == [100, 20]


@pytest.mark.usefixtures("shared_out")
def test_a_batch_that_is_worth_it_is_cut_up_among_the_streams(model: GPT2Classifier) -> None:
    texts = [[number, *[5] * 9] for number in range(1, 9)]
    assert sizes_of_batches(Engine(model, CPU, 1000, num_streams=2), texts) == [40, 40]


@pytest.mark.usefixtures("costly")
@pytest.mark.parametrize("compute", [CPU, HALF], ids=["float32", "bfloat16"])
def test_a_batch_that_is_worth_all_cores_is_not_cut_up(
    model: GPT2Classifier, compute: Compute
) -> None:
    texts = [[number, *[5] * (number % 3 + 19)] for number in range(1, 21)]
    engine = Engine(model, compute, 1000, num_streams=2)
    assert sizes_of_batches(engine, texts) == [sum(map(len, texts))]


@pytest.mark.usefixtures("costly")
def test_a_batch_that_is_worth_all_cores_is_cut_up_where_it_would_be_padding(
    model: GPT2Classifier,
) -> None:
    texts = [[1] * 30, *([number, 7] for number in range(2, 12))]
    assert sizes_of_batches(Engine(model, CPU, 1000, num_streams=2), texts) == [30, 20]


@pytest.mark.usefixtures("shared_out")
def test_the_largest_part_is_computed_first(model: GPT2Classifier) -> None:
    texts = [[1] * 30, *([number, 7, 7, 7, 7] for number in range(2, 10))]
    assert sizes_of_batches(Engine(model, CPU, 40, num_streams=2), texts) == [35, 30, 5]


@pytest.mark.usefixtures("costly")
@pytest.mark.parametrize(
    "texts", [[[1, *[7] * 20]], [[1] * 30, [2] * 28, [4] * 27]], ids=["one", "three"]
)
def test_a_lone_batch_on_all_cores_has_the_logits_of_many(
    model: GPT2Classifier, texts: list[list[int]], torch_threads: int
) -> None:
    found = Engine(model, CPU).predict(*joined(texts), ignore)
    np.testing.assert_allclose(found.logits_NC, alone(model, texts), atol=1e-5)
    assert torch.get_num_threads() == torch_threads  # whoever asks keeps what it has


def test_a_lone_batch_in_a_thread_that_is_settled_is_computed_there(model: GPT2Classifier) -> None:
    class Watched(SmallMemory):
        def forward(self, ids_BT: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:  # noqa: N803
            threads.append(threading.current_thread())
            return super().forward(ids_BT, lengths_B)

    threads: list[threading.Thread] = []

    def predict() -> None:
        engine.settle_here()
        engine.predict(*joined([[1, 2, 3]]), ignore)

    engine = Engine(Watched(model, 1000), CPU)
    caller = threading.Thread(target=predict)
    caller.start()
    caller.join()
    assert threads == [caller]


def test_a_lone_batch_that_does_not_fit_is_halved_in_the_callers_thread(
    model: GPT2Classifier,
) -> None:
    engine = Engine(SmallMemory(model, 30), CPU)
    before = torch.get_num_threads()
    engine.settle_here()
    texts = [[number, *[5] * 9] for number in range(1, 9)]
    found = engine.predict(*joined(texts), ignore)
    torch.set_num_threads(before)
    np.testing.assert_allclose(found.logits_NC, alone(model, texts), atol=1e-5)
