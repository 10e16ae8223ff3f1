"""Model directories of transformers and our own: what is read, refused and written."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from models import (
    CORPUS,
    LABELS,
    byte_level_tokenizer,
    edit_json,
    make_hf_checkpoint,
    our_flatten_model,
    our_model,
    pad_right,
    random_flatten_reference,
    random_hf_model,
    random_texts,
)
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2LMHeadModel,
    GPT2Tokenizer,
    pipeline,
)

from batchclf.checkpoint import Checkpoint, fingerprint, load, save
from batchclf.errors import CheckpointError, ConfigError
from batchclf.model import GPT2Classifier

TEXTS = (
    *CORPUS,
    "",
    " leading and  double   spaces\n\n\tand tabs ",
    "It's <|endoftext|> inside, 1234567890 and naïve café \u2013 東京 🎉\u200d",
    "don't'll I'VE\x00nul\u00a0nbsp",
)
Change = Callable[[Path], object]


@pytest.fixture(scope="module")
def hub_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As transformers writes it, with no `batchclf.json`."""
    return make_hf_checkpoint(tmp_path_factory.mktemp("models") / "hub")


@pytest.fixture(scope="module")
def own_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `save` writes it."""
    return write_model(tmp_path_factory.mktemp("models") / "own")


@pytest.fixture
def hub_copy(hub_model: Path, tmp_path: Path) -> Path:
    return shutil.copytree(hub_model, tmp_path / "model")


@pytest.fixture
def own_copy(own_model: Path, tmp_path: Path) -> Path:
    return shutil.copytree(own_model, tmp_path / "model")


def small_hf_model(**changes: Any) -> Any:
    small = {"vocab_size": 400, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2}
    return random_hf_model(**(small | {"pad_token_id": 0} | changes))


def write_model(directory: Path, model: GPT2Classifier | None = None, **changes: Any) -> Path:
    settings: dict[str, Any] = {
        "labels": LABELS,
        "max_length": 48,
        "normalise": "lower+collapse",
        "temperature": 1.5,
        "training": {"num_examples": 3},
        "metrics": {"accuracy": 0.5},
    }
    save(
        directory,
        our_model(small_hf_model()) if model is None else model,
        byte_level_tokenizer(),
        **(settings | changes),
    )
    return directory


def logits_of(checkpoint: Checkpoint) -> torch.Tensor:
    with torch.no_grad():
        return checkpoint.build_model()(*pad_right(random_texts([1, 7, 30], 256), 0))


def hf_logits(directory: Path) -> torch.Tensor:
    model = AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.float32)
    ids, lengths = pad_right(random_texts([1, 7, 30], 256), 0)
    mask = torch.arange(ids.shape[1]) < lengths[:, None]
    with torch.no_grad():
        return model.eval()(ids, attention_mask=mask.long()).logits


# What is read


def test_a_checkpoint_of_transformers_is_read_with_its_labels_and_defaults(hub_model: Path) -> None:
    checkpoint = load(hub_model)
    assert checkpoint.labels == LABELS
    assert checkpoint.max_length == 64
    assert (checkpoint.normalise, checkpoint.temperature) == ("none", 1.0)
    assert checkpoint.metadata == {}


def test_a_checkpoint_of_transformers_has_its_logits(hub_model: Path) -> None:
    torch.testing.assert_close(logits_of(load(hub_model)), hf_logits(hub_model), atol=1e-4, rtol=0)


def test_a_checkpoint_in_shards_is_read_as_a_whole(hub_model: Path, tmp_path: Path) -> None:
    shutil.copytree(hub_model, tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").unlink()
    AutoModelForSequenceClassification.from_pretrained(hub_model).save_pretrained(
        tmp_path, max_shard_size="50KB"
    )
    checkpoint = load(tmp_path)
    assert len(checkpoint.weight_files) > 1
    torch.testing.assert_close(logits_of(checkpoint), logits_of(load(hub_model)))


def test_two_labels_without_names_are_named_as_transformers_names_them(tmp_path: Path) -> None:
    make_hf_checkpoint(tmp_path, num_labels=2)
    edit_json(tmp_path / "config.json", id2label=None, label2id=None)
    assert load(tmp_path).labels == ("LABEL_0", "LABEL_1")


def test_labels_stand_in_the_order_of_their_ids(hub_copy: Path) -> None:
    names = dict(reversed([(str(index), f"topic {index}") for index in range(5)]))
    edit_json(hub_copy / "config.json", id2label=names)
    assert load(hub_copy).labels == tuple(f"topic {index}" for index in range(5))


@pytest.mark.parametrize(("declared", "length"), [(32, 32), (1e30, 64), (512, 64), (None, 64)])
def test_max_length_is_the_tokenizers_where_it_makes_sense(
    hub_copy: Path, declared: float | None, length: int
) -> None:
    edit_json(hub_copy / "tokenizer_config.json", model_max_length=declared)
    assert load(hub_copy).max_length == length


def test_max_length_can_be_given(own_model: Path) -> None:
    assert load(own_model, max_length=64).max_length == 64


@pytest.mark.parametrize("length", [0, 65])
def test_a_max_length_that_the_model_cannot_read_is_refused(own_model: Path, length: int) -> None:
    with pytest.raises(ConfigError, match=r"reads 1 to 64"):
        load(own_model, max_length=length)


def test_the_tokenizer_neither_truncates_nor_pads(hub_copy: Path) -> None:
    spec = json.loads((hub_copy / "tokenizer.json").read_text())
    spec["truncation"] = {
        "direction": "Right",
        "max_length": 3,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    (hub_copy / "tokenizer.json").write_text(json.dumps(spec))
    assert len(load(hub_copy).tokenizer.encode(CORPUS[0]).ids) > 3


def test_half_precision_keeps_the_head_in_float32(hub_model: Path) -> None:
    model = load(hub_model).build_model(torch.bfloat16)
    assert model.transformer.wte.weight.dtype == torch.bfloat16
    assert model.score.weight.dtype == torch.float32


def test_a_model_in_use_does_not_change_with_its_file(hub_copy: Path) -> None:
    checkpoint = load(hub_copy)
    model = checkpoint.build_model()
    before = model.transformer.wte.weight.clone()
    with (hub_copy / "model.safetensors").open("r+b") as file:
        file.seek(-4096, os.SEEK_END)
        file.write(b"\0" * 4096)
    assert torch.equal(model.transformer.wte.weight, before)


# Tokenizers


def assert_same_ids(directory: Path, theirs: Any) -> None:
    tokenizer = load(directory).tokenizer
    for text in TEXTS:
        assert tokenizer.encode(text).ids == theirs(text)["input_ids"], text


def test_tokenizer_json_gives_the_ids_of_transformers(hub_model: Path) -> None:
    assert_same_ids(hub_model, AutoTokenizer.from_pretrained(hub_model))


@pytest.mark.parametrize("add_prefix_space", [True, False, None])
def test_tokenizer_config_decides_on_the_prefix_space_as_in_transformers(
    hub_copy: Path, add_prefix_space: bool | None
) -> None:
    edit_json(
        hub_copy / "tokenizer_config.json",
        tokenizer_class="GPT2Tokenizer",
        add_prefix_space=add_prefix_space,
    )
    assert_same_ids(hub_copy, AutoTokenizer.from_pretrained(hub_copy))


def test_special_tokens_are_spelt_out_where_the_tokenizer_says_so(hub_copy: Path) -> None:
    edit_json(hub_copy / "tokenizer_config.json", split_special_tokens=True)
    assert_same_ids(hub_copy, AutoTokenizer.from_pretrained(hub_copy))


def as_vocab_and_merges(directory: Path) -> None:
    (directory / "tokenizer.json").unlink()
    (directory / "tokenizer_config.json").unlink()
    byte_level_tokenizer().model.save(str(directory))


def test_vocab_and_merges_give_the_ids_of_transformers(hub_copy: Path) -> None:
    as_vocab_and_merges(hub_copy)
    assert_same_ids(hub_copy, GPT2Tokenizer.from_pretrained(hub_copy))


def test_vocab_and_merges_with_added_tokens_give_the_ids_of_transformers(tmp_path: Path) -> None:
    make_hf_checkpoint(tmp_path, vocab=410)
    as_vocab_and_merges(tmp_path)
    first = len(json.loads((tmp_path / "vocab.json").read_text()))
    added = {"box office": first + 1, "[PAD]": first}
    (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    (tmp_path / "special_tokens_map.json").write_text(
        json.dumps({"pad_token": "[PAD]", "eos_token": {"content": "<|endoftext|>"}})
    )
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True})
    )
    theirs = GPT2Tokenizer.from_pretrained(tmp_path)
    assert_same_ids(tmp_path, theirs)
    text = "[PAD] the box office[PAD]"
    assert load(tmp_path).tokenizer.encode(text).ids == theirs(text)["input_ids"]


def test_gpt2s_own_vocabulary_gives_the_ids_of_transformers(tmp_path: Path) -> None:
    gpt2 = Path(__file__).resolve().parents[2] / "shared" / "gpt2-tokenizer"
    if not gpt2.is_dir():
        pytest.skip("no shared/gpt2-tokenizer beside the repository")
    make_hf_checkpoint(tmp_path, vocab=50257, layers=1)
    as_vocab_and_merges(tmp_path)
    for name in ("vocab.json", "merges.txt"):
        shutil.copyfile(gpt2 / name, tmp_path / name)
    assert_same_ids(tmp_path, GPT2Tokenizer.from_pretrained(tmp_path))


# What is refused


def edit_weights(directory: Path, **changes: torch.Tensor | None) -> None:
    path = directory / "model.safetensors"
    state = load_file(path) | {name.replace("__", "."): t for name, t in changes.items()}
    save_file({k: v for k, v in state.items() if v is not None}, path, metadata={"format": "pt"})


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def only_a_pickle(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def a_language_model(directory: Path) -> None:
    config = small_hf_model().config
    GPT2LMHeadModel(config).save_pretrained(directory)


def a_token_too_many(directory: Path) -> None:
    spec = json.loads((directory / "tokenizer.json").read_text())
    spec["added_tokens"].append(
        dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
        | {"id": 400, "content": "[PAD]"}
    )
    (directory / "tokenizer.json").write_text(json.dumps(spec))


def a_shard_is_gone(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"score.weight": "model-00001-of-00002.safetensors"}})
    )


def a_shard_elsewhere(directory: Path) -> None:
    a_shard_is_gone(directory)
    edit_json(directory / "model.safetensors.index.json", weight_map={"x": "../model.safetensors"})


def config_of(**changes: Any) -> Change:
    return lambda directory: edit_json(directory / "config.json", **changes)


def own_settings(**changes: Any) -> Change:
    def write(directory: Path) -> None:
        path = directory / "batchclf.json"
        path.write_text(json.dumps({"format_version": 1} | changes))

    return write


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda d: (d / "config.json").unlink(), r"config\.json is missing"),
        (lambda d: (d / "config.json").write_text("{"), r"config\.json is not valid JSON"),
        (lambda d: (d / "config.json").write_text("[]"), r"config\.json is not a JSON object"),
        (lambda d: (d / "config.json").write_bytes(b'{"a": "\xff"}'), "not UTF-8"),
        (config_of(model_type="bert"), r"config\.json: model_type is 'bert'"),
        (config_of(id2label={"0": "a", "2": "b"}), "not 0 to 1"),
        (config_of(id2label={"a": "b"}), "not whole numbers"),
        (config_of(id2label=["a"]), "id2label is not a JSON object"),
        (config_of(id2label={"0": "a", "1": "a"}), "'a' more than once"),
        (config_of(id2label={"0": "a", "1": " "}), "' ' in id2label is not a name"),
        (config_of(num_labels=3), "num_labels is 3, but id2label names 5"),
        (config_of(num_labels="x", id2label=None), "num_labels 'x'"),
        (config_of(id2label={"0": "a", "1": "b"}), r"score\.weight has the shape \[5, 32\]"),
        (config_of(n_layer=3), r"model\.safetensors: no tensor transformer\.h\.2"),
        (config_of(n_layer=1), r"unexpected tensor transformer\.h\.1"),
        (lambda d: (d / "model.safetensors").unlink(), r"holds no model\.safetensors"),
        (only_a_pickle, r"pickle alone \(pytorch_model\.bin\).*import-checkpoint"),
        (lambda d: cut_short(d / "model.safetensors"), r"model\.safetensors is cut short"),
        (lambda d: (d / "model.safetensors").write_bytes(b""), "is cut short"),
        (a_language_model, "not a classifier yet"),
        (lambda d: edit_weights(d, score__weight=torch.full((5, 32), torch.nan)), "score.*NaN"),
        (lambda d: edit_weights(d, score__weight=torch.full((5, 32), torch.inf)), "infinite"),
        (lambda d: edit_weights(d, score__weight=torch.ones(5, 32).int()), r"score\.weight is I32"),
        (lambda d: edit_weights(d, fc1__weight=torch.ones(5), score__weight=None), "flatten head"),
        (a_shard_is_gone, r"00002\.safetensors is missing"),
        (a_shard_elsewhere, r"points to '\.\./model\.safetensors'"),
        (lambda d: (d / "tokenizer.json").unlink(), "has no tokenizer"),
        (lambda d: (d / "tokenizer.json").write_text("{}"), r"tokenizer\.json is not a tokenizer"),
        (lambda d: cut_short(d / "tokenizer.json"), r"tokenizer\.json is not valid JSON"),
        (a_token_too_many, r"'\[PAD\]' with id 400"),
        (
            lambda d: edit_json(d / "tokenizer_config.json", truncation_side="left"),
            "truncation_side",
        ),
        (own_settings(format_version=2), "format_version is 2.*newer"),
        (own_settings(head="mean"), "head 'mean'"),
        (own_settings(head="flatten"), "head_length 0"),
        (own_settings(head="flatten", head_length=8), r"no tensor fc1\.weight"),
        (own_settings(normalise="upper"), "normalise 'upper'"),
        (own_settings(temperature=0), "temperature 0"),
        (own_settings(temperature="warm"), "temperature 'warm'"),
        (own_settings(max_length=65), "max_length is 65"),
        (own_settings(max_length=0), "max_length 0"),
        (own_settings(metrics=1), "metrics is not a JSON object"),
        (own_settings(sha256={"tokenizer.json": "0"}), r"tokenizer\.json is not the file"),
        (own_settings(sha256={"model.safetensors": "0"}), "copy the whole directory again"),
    ],
)
def test_a_broken_model_directory_is_refused_with_its_reason(
    hub_copy: Path, change: Change, reason: str
) -> None:
    change(hub_copy)
    with pytest.raises(CheckpointError, match=reason) as refused:
        load(hub_copy)
    assert str(hub_copy) in str(refused.value)


def test_vocab_and_merges_that_add_a_begin_token_are_refused(hub_copy: Path) -> None:
    as_vocab_and_merges(hub_copy)
    (hub_copy / "tokenizer_config.json").write_text('{"add_bos_token": true}')
    with pytest.raises(CheckpointError, match="add_bos_token"):
        load(hub_copy)


@pytest.mark.parametrize("name", ["", "./models/mine", "/no/such/model"])
def test_a_directory_that_is_not_there_is_not_looked_for_on_the_hub(name: str) -> None:
    with pytest.raises(CheckpointError, match="no model directory"):
        load(name)


def test_a_file_instead_of_a_directory_is_refused(own_model: Path) -> None:
    with pytest.raises(CheckpointError, match="is a file; give the model directory"):
        load(own_model / "model.safetensors")


@pytest.fixture
def offline_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def test_a_hub_id_that_cannot_be_had_is_refused(offline_hub: Path) -> None:
    with pytest.raises(CheckpointError, match="gpt3 is neither a directory here nor a model"):
        load("openai/gpt3")


def test_a_hub_id_is_read_from_the_cache(hub_model: Path, offline_hub: Path) -> None:
    repository = offline_hub / "models--owner--news"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(hub_model, repository / "snapshots" / ("0" * 40))
    assert load("owner/news").content_hash == load(hub_model).content_hash


# Hashes


@pytest.mark.parametrize(
    "change",
    [
        Path.exists,
        lambda d: os.utime(d / "model.safetensors", (0, 0)),
        config_of(transformers_version="9", resid_pdrop=0.3, dtype="bfloat16", use_cache=False),
        lambda d: edit_json(d / "batchclf.json", metrics={"accuracy": 0.9}, versions={}),
        lambda d: edit_json(d / "batchclf.json", training={}, sha256=None),
    ],
)
def test_the_hash_does_not_depend_on_paths_dates_and_metadata(
    own_model: Path, own_copy: Path, change: Change
) -> None:
    change(own_copy)
    assert load(own_copy).content_hash == load(own_model).content_hash


def swap_merges(directory: Path) -> None:
    path = directory / "tokenizer.json"
    spec = json.loads(path.read_text())
    spec["model"]["merges"][:2] = reversed(spec["model"]["merges"][:2])
    path.write_text(json.dumps(spec))


@pytest.mark.parametrize(
    "change",
    [
        lambda d: edit_weights(d, score__weight=torch.ones(5, 32)),
        config_of(id2label=dict(enumerate("abcde"))),
        config_of(activation_function="relu"),
        config_of(layer_norm_epsilon=1e-6),
        config_of(pad_token_id=5),
        swap_merges,
        lambda d: edit_json(
            d / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer", add_prefix_space=True
        ),
        lambda d: edit_json(d / "tokenizer_config.json", split_special_tokens=True),
        lambda d: edit_json(d / "batchclf.json", normalise="none"),
        lambda d: edit_json(d / "batchclf.json", temperature=1.0),
        lambda d: edit_json(d / "batchclf.json", max_length=47),
    ],
)
def test_the_hash_depends_on_all_that_changes_an_answer(
    own_model: Path, own_copy: Path, change: Change
) -> None:
    edit_json(own_copy / "batchclf.json", sha256=None)
    change(own_copy)
    assert load(own_copy).content_hash != load(own_model).content_hash


def test_a_fingerprint_depends_on_the_settings_and_not_on_their_order(own_model: Path) -> None:
    checkpoint = load(own_model)
    first = fingerprint(checkpoint, {"dtype": "float32", "columns": ("text",)})
    assert len(first) == 32
    assert first == fingerprint(checkpoint, {"columns": ["text"], "dtype": "float32"})
    assert first != fingerprint(checkpoint, {"columns": ["text"], "dtype": "bfloat16"})


def test_a_fingerprint_depends_on_the_model(own_model: Path, hub_model: Path) -> None:
    assert fingerprint(load(own_model), {}) != fingerprint(load(hub_model), {})


# What is written


def test_what_was_saved_is_loaded(own_model: Path) -> None:
    checkpoint = load(own_model)
    assert checkpoint.labels == LABELS
    assert (checkpoint.max_length, checkpoint.temperature) == (48, 1.5)
    assert checkpoint.normalise == "lower+collapse"
    assert checkpoint.metadata["training"] == {"num_examples": 3}
    assert checkpoint.metadata["metrics"] == {"accuracy": 0.5}
    assert set(checkpoint.metadata["versions"]) == {"batchclf", "torch", "tokenizers"}


def test_a_saved_model_has_the_same_logits_in_transformers(own_model: Path) -> None:
    torch.testing.assert_close(logits_of(load(own_model)), hf_logits(own_model), atol=1e-4, rtol=0)


def test_a_saved_tokenizer_gives_the_same_ids_in_transformers(own_model: Path) -> None:
    theirs = AutoTokenizer.from_pretrained(own_model)
    assert_same_ids(own_model, theirs)
    assert (theirs.pad_token_id, theirs.model_max_length) == (0, 48)


def test_a_saved_model_runs_in_the_pipeline_of_transformers(own_model: Path) -> None:
    classify = pipeline("text-classification", model=str(own_model), device="cpu")
    answers = classify(list(CORPUS), batch_size=3, truncation=True)
    assert {answer["label"] for answer in answers} <= set(LABELS)


def test_float16_weights_are_read_and_half_the_size(own_model: Path, tmp_path: Path) -> None:
    write_model(tmp_path / "half", weights_dtype=torch.float16)
    torch.testing.assert_close(
        logits_of(load(tmp_path / "half")), logits_of(load(own_model)), atol=0.05, rtol=0
    )
    sizes = [(d / "model.safetensors").stat().st_size for d in (tmp_path / "half", own_model)]
    assert sizes[0] < 0.55 * sizes[1]


def test_a_flatten_model_returns_as_it_was_saved(tmp_path: Path) -> None:
    reference = random_flatten_reference(
        max_seq_len=20, vocab_size=400, n_positions=64, n_embd=32, n_layer=2, n_head=2
    )
    model = our_flatten_model(reference, pad=0)
    write_model(tmp_path / "flatten", model, max_length=20)
    checkpoint = load(tmp_path / "flatten")
    assert checkpoint.config == model.config
    batch = pad_right(random_texts([1, 7, 20], 256), 0)
    with torch.no_grad():
        torch.testing.assert_close(checkpoint.build_model()(*batch), model(*batch))


def test_a_saved_tokenizer_neither_truncates_nor_pads(tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.enable_truncation(3)
    save(
        tmp_path / "model",
        our_model(small_hf_model()),
        tokenizer,
        LABELS,
        max_length=48,
        normalise="none",
        temperature=1.0,
        training={},
        metrics={},
    )
    assert json.loads((tmp_path / "model" / "tokenizer.json").read_text())["truncation"] is None
    assert tokenizer.truncation is not None


def test_a_model_is_not_overwritten_unasked(own_copy: Path) -> None:
    before = load(own_copy).content_hash
    with pytest.raises(CheckpointError, match="holds a model already"):
        write_model(own_copy, temperature=3.0)
    assert load(own_copy).content_hash == before


def test_a_model_is_overwritten_when_asked(own_copy: Path) -> None:
    write_model(own_copy, temperature=3.0, overwrite=True)
    assert load(own_copy).temperature == 3.0
    assert [path.name for path in own_copy.parent.iterdir()] == ["model"]


def test_a_folder_of_something_else_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="something other than a model"):
        write_model(tmp_path, overwrite=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    write_model(tmp_path / "a" / "b")
    (tmp_path / "empty").mkdir()
    write_model(tmp_path / "empty")
    assert load(tmp_path / "empty").content_hash == load(tmp_path / "a" / "b").content_hash


def test_what_would_not_load_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="more than once"):
        write_model(tmp_path / "model", labels=["same"] * 5)
    assert list(tmp_path.iterdir()) == []
