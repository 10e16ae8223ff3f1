"""The model directory: load, save, fingerprint.

A Hugging Face checkpoint (`config.json`, `model.safetensors`, `tokenizer.json`,
`tokenizer_config.json`) plus `batchclf.json`:

    format_version  1
    head            "last_token" or "flatten"; head_length, the positions of a flatten head
    max_length      tokens of a text that the model reads
    normalise       "none" or "lower+collapse"
    temperature     logits are divided by it before softmax
    training        what it was trained on and how, as hashes, counts and settings
    metrics         what it reached
    versions        of the libraries that wrote it
    sha256          file name -> digest, checked by `load`

Without `batchclf.json` the directory is any GPT-2 sequence classifier, read as transformers does.
Nothing in a directory is ever run: pickles are refused and code is not looked at.
"""

import ctypes
import hashlib
import json
import math
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from batchclf import __version__
from batchclf.errors import CheckpointError, ConfigError
from batchclf.model import (
    GPT2Classifier,
    Head,
    ModelConfig,
    check_names_and_shapes,
    is_finite,
    is_ignored,
)
from batchclf.store.base import translate_os_error
from batchclf.text import Normalisation

END_OF_TEXT = "<|endoftext|>"
FORMAT_VERSION = 1

CONFIG = "config.json"
SETTINGS = "batchclf.json"
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"

_HUB_FILES = ["*.json", "*.safetensors", "*.txt"]
_HUB_FILES_WITHOUT_WEIGHTS = ["*.json", "*.txt"]
# https://huggingface.co/docs/huggingface_hub/package_reference/utilities (validate_repo_id)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_TRUNK = "transformer."
_HEADS = ("lm_head.", "score.", "fc1.")  # of other purposes, which fine-tuning replaces
_PICKLES = (".bin", ".pth", ".pt", ".ckpt", ".pkl")
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h and linux/fs.h; man 2 renameat2
_FLOAT_TYPES = ("F64", "F32", "F16", "BF16")
_GPT2_TOKENIZERS = (None, "GPT2Tokenizer", "GPT2TokenizerFast")
_SPECIAL_TOKENS = tuple(
    f"{kind}_token" for kind in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
)


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A model directory that was read and found consistent; the weights stay on disk.

    Attributes:
        labels: in the order of the logits.
        tokenizer: neither truncates nor pads.
        max_length: tokens of a text that the model is given.
        normalise: what is done to a text before it is tokenised.
        temperature: logits are divided by it before softmax.
        metadata: `training`, `metrics` and `versions` of `batchclf.json`; {} without one.
        weight_files: the safetensors files, in the order of their names.
        content_hash: sha256, in hex, of all that the logits and their reading depend on: weights,
            configuration, tokenizer, labels, max_length, normalise, temperature. Paths, dates and
            metadata are no part of it.
    """

    path: Path
    config: ModelConfig
    labels: tuple[str, ...]
    tokenizer: Tokenizer
    max_length: int
    normalise: Normalisation
    temperature: float
    metadata: Mapping[str, Any]
    weight_files: tuple[Path, ...]
    content_hash: str

    def build_model(
        self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> GPT2Classifier:
        """The model with its weights, in eval mode; its head stays in float32.

        Raises:
            CheckpointError: a weight is too large for the dtype.
        """
        with torch.device("meta"):
            model = GPT2Classifier(self.config)
        model.transformer.to(dtype)
        state: dict[str, torch.Tensor] = {}
        for path in self.weight_files:
            state |= load_file(path, device=str(device))
        with _naming(self.path):
            model.load_hf_state(state)
        return model.eval()


def load(model: str | Path, max_length: int | None = None) -> Checkpoint:
    """Read a model directory, or download one from the Hugging Face hub, and check all of it.

    Args:
        model: a directory, else a hub id such as `gpt2` or `owner/name`.
        max_length: instead of the model's own.

    Raises:
        CheckpointError: it cannot be had, or is not a GPT-2 classifier that can be trusted.
        ConfigError: the model cannot read that many tokens.
    """
    directory = _find(model)
    hf_config = _read_json(directory / CONFIG)
    settings = _read_settings(directory)
    with _naming(directory / CONFIG):
        labels = _read_labels(hf_config)
        config = ModelConfig.from_hf(
            hf_config, len(labels), head=settings.head, head_length=settings.head_length
        )
    weight_files = _find_weights(directory)
    _check_weights(weight_files, config)
    tokenizer_config = _read_json(directory / TOKENIZER_CONFIG, {})
    tokenizer, tokenizer_files = _read_tokenizer(directory, tokenizer_config)
    _check_tokenizer(tokenizer, tokenizer_files[0], config)
    digests = {path.name: _sha256(path) for path in (*weight_files, *tokenizer_files)}
    _check_digests(directory, settings.sha256, digests)
    length = _choose_max_length(max_length, settings, tokenizer_config, config, directory)
    architecture = asdict(config)
    for name in ("embd_dropout", "attn_dropout", "resid_dropout"):
        del architecture[name]
    return Checkpoint(
        path=directory,
        config=config,
        labels=labels,
        tokenizer=tokenizer,
        max_length=length,
        normalise=settings.normalise,
        temperature=settings.temperature,
        metadata=settings.metadata,
        weight_files=weight_files,
        content_hash=_hash_json(
            {
                "files": digests,
                "config": architecture,
                "labels": labels,
                "tokenizer": _describe_tokenizer(tokenizer),
                "max_length": length,
                "normalise": settings.normalise,
                "temperature": settings.temperature,
            }
        ),
    )


def load_base(
    model: str | Path, num_labels: int, head: Head, head_length: int
) -> tuple[GPT2Classifier, Tokenizer]:
    """A GPT-2 to fine-tune: language model or classifier, with a new head, and its tokenizer.

    Args:
        model: a directory, else a hub id such as `gpt2`.
        num_labels: classes of the new head; an old head is dropped.
        head: what is put on top.
        head_length: positions that a flatten head reads; 0 for `last_token`.

    Raises:
        CheckpointError: it cannot be had, or is not a GPT-2.
    """
    config, tokenizer = load_base_config(model, num_labels, head, head_length)
    directory = _find(model)
    state: dict[str, torch.Tensor] = {}
    for path in _find_weights(directory):
        with _open_weights(path) as file:
            # GPT2Model names its weights without the prefix, and so does `gpt2` on the hub.
            state |= {
                name if name.startswith(_TRUNK) else _TRUNK + name: file.get_tensor(name)
                for name in file.keys()  # noqa: SIM118 - not a mapping
                if not is_ignored(name) and not name.startswith(_HEADS)
            }
    with _naming(directory):
        classifier = GPT2Classifier(config)
        classifier.init_weights()
        own = classifier.hf_state()
        classifier.load_hf_state(
            state | {name: own[name] for name in own if not name.startswith(_TRUNK)}
        )
    return classifier, tokenizer


def load_base_config(
    model: str | Path, num_labels: int, head: Head, head_length: int
) -> tuple[ModelConfig, Tokenizer]:
    """What `load_base` knows of a GPT-2 without its weights, which need not be there.

    Raises:
        CheckpointError: it cannot be had, or is not a GPT-2.
    """
    directory = _find(model, _HUB_FILES_WITHOUT_WEIGHTS)
    hf_config = _read_json(directory / CONFIG)
    tokenizer_config = _read_json(directory / TOKENIZER_CONFIG, {})
    tokenizer, tokenizer_files = _read_tokenizer(directory, tokenizer_config)
    hf_config.pop("problem_type", None)
    if hf_config.get("pad_token_id") is None:
        hf_config["pad_token_id"] = tokenizer.token_to_id(END_OF_TEXT)
    with _naming(directory):
        config = ModelConfig.from_hf(hf_config, num_labels, head=head, head_length=head_length)
        _check_tokenizer(tokenizer, tokenizer_files[0], config)
    return config, tokenizer


def fingerprint(checkpoint: Checkpoint, settings: Mapping[str, object]) -> str:
    """32 hex digits that change when the model, or a setting that its answers depend on, does.

    Args:
        checkpoint: the model.
        settings: plain values, as JSON has them.
    """
    return _hash_json({"model": checkpoint.content_hash, "settings": settings})[:32]


def save(
    directory: str | Path,
    model: GPT2Classifier,
    tokenizer: Tokenizer,
    labels: Sequence[str],
    *,
    max_length: int,
    normalise: Normalisation,
    temperature: float,
    training: Mapping[str, Any],
    metrics: Mapping[str, Any],
    weights_dtype: torch.dtype = torch.float32,
    overwrite: bool = False,
    add_report: Callable[[Path], None] | None = None,
) -> None:
    """Write a model directory that `load` reads, and with the `last_token` head transformers too.

    It appears whole or not at all: everything is written beside it, flushed, read back and renamed.

    Args:
        directory: where; its parents are made.
        model: the weights.
        tokenizer: its truncation and padding are left out.
        labels: in the order of the logits.
        max_length: tokens of a text that the model reads.
        normalise: what is done to a text before it is tokenised. transformers does not do it.
        temperature: logits are divided by it before softmax. transformers does not do it.
        training: what it was trained on and how, in plain values.
        metrics: what it reached, in plain values.
        weights_dtype: float32, or float16 or bfloat16 for half the size.
        overwrite: replace a model directory.
        add_report: writes more files into the new directory; what they say is not looked at.

    Raises:
        CheckpointError: something else stands there, or what was written is no valid model.
        OutOfSpaceError: the disk is full; what stood there still does.
    """
    directory = Path(directory)
    check_free(directory, overwrite=overwrite)
    temporary = directory.with_name(f".{directory.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.mkdir(parents=True)
        _write_weights(temporary / WEIGHTS, model, weights_dtype)
        dtype_name = str(weights_dtype).removeprefix("torch.")
        end = tokenizer.token_to_id(END_OF_TEXT)
        _write_json(temporary / CONFIG, _hf_config(model.config, labels, dtype_name, end))
        shutil.copymode(temporary / CONFIG, temporary / WEIGHTS)  # safetensors makes it private
        tokenizer = Tokenizer.from_str(tokenizer.to_str())
        tokenizer.no_truncation()
        tokenizer.no_padding()
        (temporary / TOKENIZER).write_text(tokenizer.to_str(), encoding="utf-8")
        _write_json(
            temporary / TOKENIZER_CONFIG, _hf_tokenizer_config(tokenizer, model.config, max_length)
        )
        _write_json(
            temporary / SETTINGS,
            {
                "format_version": FORMAT_VERSION,
                "head": model.config.head,
                **({"head_length": n} if (n := model.config.head_length) else {}),
                "max_length": max_length,
                "normalise": normalise,
                "temperature": temperature,
                "training": dict(training),
                "metrics": dict(metrics),
                "versions": {
                    "batchclf": __version__,
                    **{name: version(name) for name in ("torch", "tokenizers")},
                },
                "sha256": {name: _sha256(temporary / name) for name in (WEIGHTS, TOKENIZER)},
            },
        )
        if add_report is not None:
            add_report(temporary)
        for path in (*temporary.rglob("*"), temporary):
            _fsync(path)
        load(temporary)
        _publish(temporary, directory)
    except OSError as error:
        raise translate_os_error(error, f"model directory {directory}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@dataclass(frozen=True)
class _Settings:
    """What `batchclf.json` says, or its defaults."""

    head: Head
    head_length: int
    max_length: int | None
    normalise: Normalisation
    temperature: float
    sha256: Mapping[str, str]
    metadata: Mapping[str, Any]


def _find(model: str | Path, hub_files: Sequence[str] = _HUB_FILES) -> Path:
    if model == "":
        raise CheckpointError("no model directory is named")
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(
            f"{model} is a file; give the model directory. The weights of the original project "
            "become one with `batchclf import-checkpoint`"
        )
    if not _HUB_ID.fullmatch(str(model)):
        raise CheckpointError(f"no model directory {model}")
    from huggingface_hub import snapshot_download  # slow, and rarely needed
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(str(model), allow_patterns=list(hub_files)))
    except (OSError, HFValidationError) as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(
            f"{model} is neither a directory here nor a model that can be had from the "
            f"Hugging Face hub ({reason})"
        ) from error


def _read_json(path: Path, default: dict[str, Any] | None = None) -> dict[str, Any]:
    """A JSON object; `default` where there is no such file."""
    if not path.is_file():
        if default is not None:
            return default
        raise CheckpointError(
            f"{path} is missing; a model directory holds {CONFIG}, {WEIGHTS} and {TOKENIZER}"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not UTF-8 ({error}); copy it again") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); copy it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a JSON object; copy it again")
    return content


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Put the file in front of what is wrong in it."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None


def _read_settings(directory: Path) -> _Settings:
    path = directory / SETTINGS
    content = _read_json(path, {"format_version": FORMAT_VERSION})
    with _naming(path):
        if content.get("format_version") != FORMAT_VERSION:
            raise CheckpointError(
                f"format_version is {content.get('format_version')!r}, this batchclf reads "
                f"{FORMAT_VERSION}; use the version of batchclf that wrote it, or a newer one"
            )
        head = content.get("head", "last_token")
        if head not in get_args(Head):
            raise CheckpointError(f"head {head!r} is none of {', '.join(get_args(Head))}")
        normalise = content.get("normalise", "none")
        if normalise not in get_args(Normalisation):
            raise CheckpointError(
                f"normalise {normalise!r} is none of {', '.join(get_args(Normalisation))}"
            )
        temperature = content.get("temperature", 1.0)
        if type(temperature) not in {int, float} or not 0 < temperature < math.inf:
            raise CheckpointError(f"temperature {temperature!r} is not a number above 0")
        for name in ("max_length", "head_length"):
            value = content.get(name)
            if value is not None and (type(value) is not int or value < 1):
                raise CheckpointError(f"{name} {value!r} is not a whole number above 0")
        for name in ("sha256", "training", "metrics", "versions"):
            if not isinstance(content.get(name, {}), dict):
                raise CheckpointError(f"{name} is not a JSON object")
    return _Settings(
        head=head,
        head_length=content.get("head_length") or 0,
        max_length=content.get("max_length"),
        normalise=normalise,
        temperature=float(temperature),
        sha256=content.get("sha256", {}),
        metadata={k: v for k in ("training", "metrics", "versions") if (v := content.get(k))},
    )


def _read_labels(hf_config: Mapping[str, Any]) -> tuple[str, ...]:
    """The labels in the order of the logits; LABEL_0, ... where none are named, as transformers."""
    num_labels = hf_config.get("num_labels")
    if num_labels is not None and (type(num_labels) is not int or num_labels < 1):
        raise CheckpointError(f"num_labels {num_labels!r} is not a whole number above 0")
    id2label = hf_config.get("id2label")
    if id2label is None:
        return tuple(f"LABEL_{index}" for index in range(num_labels or 2))
    if not isinstance(id2label, dict):
        raise CheckpointError("id2label is not a JSON object")
    try:
        by_id = {int(key): label for key, label in id2label.items()}
    except ValueError:
        raise CheckpointError("the keys of id2label are not whole numbers") from None
    if sorted(by_id) != list(range(len(id2label))):
        raise CheckpointError(f"the keys of id2label are not 0 to {len(id2label) - 1}")
    if num_labels is not None and num_labels != len(by_id):
        raise CheckpointError(f"num_labels is {num_labels}, but id2label names {len(by_id)} labels")
    labels = [by_id[index] for index in range(len(by_id))]
    for label in labels:
        if not isinstance(label, str) or not label.strip():
            raise CheckpointError(f"the label {label!r} in id2label is not a name")
        if labels.count(label) > 1:
            raise CheckpointError(f"id2label names the label {label!r} more than once")
    return tuple(labels)


def _find_weights(directory: Path) -> tuple[Path, ...]:
    if (directory / WEIGHTS).is_file():
        return (directory / WEIGHTS,)
    index = directory / WEIGHTS_INDEX
    if not index.is_file():
        pickles = [path.name for path in directory.iterdir() if path.suffix in _PICKLES]
        if pickles:
            raise CheckpointError(
                f"{directory} holds its weights as a pickle alone ({min(pickles)}), which can run "
                f"code when it is read; write {WEIGHTS} with transformers' save_pretrained, or use "
                "`batchclf import-checkpoint` for the weights of the original project"
            )
        raise CheckpointError(f"{directory} holds no {WEIGHTS}")
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map; copy it again")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{index} points to {name!r}, which is no safetensors file here")
        if not (directory / name).is_file():
            raise CheckpointError(f"{directory / name} is missing, but {WEIGHTS_INDEX} names it")
    return tuple(directory / name for name in names)


def _check_weights(paths: Sequence[Path], config: ModelConfig) -> None:
    """Names, shapes and types from the headers first, then every value."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in paths:
        with _open_weights(path) as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                if is_ignored(name):
                    continue
                tensor = file.get_slice(name)
                if tensor.get_dtype() not in _FLOAT_TYPES:
                    raise CheckpointError(
                        f"{path}: tensor {name} is {tensor.get_dtype()}; only "
                        f"{', '.join(_FLOAT_TYPES)} are read, use the original checkpoint"
                    )
                shapes[name] = tuple(tensor.get_shape())
    source = paths[0] if len(paths) == 1 else paths[0].parent
    with _naming(source):
        if config.head == "last_token" and "score.weight" not in shapes:
            if "fc1.weight" in shapes:
                raise CheckpointError(f"a flatten head (fc1.weight) needs its {SETTINGS}")
            raise CheckpointError(
                "no tensor score.weight: this is a language model, not a classifier yet; "
                "fine-tune it with `batchclf train --base-model`"
            )
        check_names_and_shapes(config, shapes)
    for path in paths:
        with _open_weights(path) as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                if not is_ignored(name) and not is_finite(file.get_tensor(name)):
                    raise CheckpointError(
                        f"{path}: tensor {name} holds NaN or infinite values; "
                        "the training that wrote it failed"
                    )


@contextmanager
def _open_weights(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} is cut short or not a safetensors file ({error}); copy it again"
        ) from error


def _read_tokenizer(
    directory: Path, tokenizer_config: Mapping[str, Any]
) -> tuple[Tokenizer, tuple[Path, ...]]:
    """The tokenizer as transformers would have it, and the files that it was read from."""
    path = directory / TOKENIZER
    vocab, merges = directory / "vocab.json", directory / "merges.txt"
    if path.is_file():
        _read_json(path)
        tokenizer = _parse(path, lambda: Tokenizer.from_file(str(path)))
        files: tuple[Path, ...] = (path,)
    elif vocab.is_file() and merges.is_file():
        _read_json(vocab)
        tokenizer = _parse(merges, lambda: Tokenizer(models.BPE.from_file(str(vocab), str(merges))))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        _add_tokens(tokenizer, directory, tokenizer_config)
        files = (vocab, merges)
    else:
        raise CheckpointError(
            f"{directory} has no tokenizer: neither {TOKENIZER} nor vocab.json and merges.txt; "
            "save the model's tokenizer into it with transformers' save_pretrained"
        )
    if tokenizer_config.get("truncation_side", "right") != "right":
        raise CheckpointError(
            f"{directory / TOKENIZER_CONFIG}: truncation_side is not 'right'; "
            "texts are always cut at the end"
        )
    # transformers takes this from tokenizer_config.json, whatever tokenizer.json says.
    if (
        tokenizer_config
        and tokenizer_config.get("tokenizer_class") in _GPT2_TOKENIZERS
        and isinstance(tokenizer.pre_tokenizer, pre_tokenizers.ByteLevel)
    ):
        tokenizer.pre_tokenizer.add_prefix_space = bool(tokenizer_config.get("add_prefix_space"))
    tokenizer.encode_special_tokens = bool(tokenizer_config.get("split_special_tokens"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer, files


def _parse(path: Path, read: Any) -> Tokenizer:
    try:
        return cast("Tokenizer", read())
    except Exception as error:  # tokenizers raises no narrower class
        raise CheckpointError(f"{path} is not a tokenizer ({error}); copy it again") from error


def _add_tokens(tokenizer: Tokenizer, directory: Path, tokenizer_config: Mapping[str, Any]) -> None:
    """What vocab.json and merges.txt leave out, in transformers' order: by id, then by name."""
    if tokenizer_config.get("add_bos_token") or tokenizer_config.get("add_eos_token"):
        raise CheckpointError(
            f"{directory / TOKENIZER_CONFIG}: add_bos_token and add_eos_token need a {TOKENIZER}; "
            "save the tokenizer again with transformers' save_pretrained"
        )
    settings = {
        **dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT),
        **tokenizer_config,
        **_read_json(directory / "special_tokens_map.json", {}),
    }
    named = [_content(token) for name in _SPECIAL_TOKENS if (token := settings.get(name))]
    named += [_content(token) for token in settings.get("additional_special_tokens") or []]
    added = _read_json(directory / "added_tokens.json", {})
    for token in sorted(added, key=added.__getitem__):
        is_special = token in named
        tokenizer.add_tokens([AddedToken(token, normalized=not is_special, special=is_special)])
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in named])


def _content(token: Any) -> str:
    return str(token["content"] if isinstance(token, dict) else token)


def _check_tokenizer(tokenizer: Tokenizer, path: Path, config: ModelConfig) -> None:
    last_id = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if last_id < 0:
        raise CheckpointError(f"{path} holds no tokens; save the model's tokenizer again")
    if last_id >= config.vocab_size:
        raise CheckpointError(
            f"{path} has the token {tokenizer.id_to_token(last_id)!r} with id {last_id}, but the "
            f"model knows ids below {config.vocab_size}; use the tokenizer that it was trained with"
        )


def _describe_tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    """What changes tokens and does not stand in the files alone."""
    pre_tokenizer = tokenizer.pre_tokenizer
    return {
        "add_prefix_space": isinstance(pre_tokenizer, pre_tokenizers.ByteLevel)
        and pre_tokenizer.add_prefix_space,
        "split_special_tokens": tokenizer.encode_special_tokens,
        "added": {
            token.content: index for index, token in tokenizer.get_added_tokens_decoder().items()
        },
    }


def _check_digests(directory: Path, expected: Mapping[str, str], found: Mapping[str, str]) -> None:
    for name, digest in found.items():
        if expected.get(name, digest) != digest:
            raise CheckpointError(
                f"{directory / name} is not the file that {SETTINGS} was written for "
                "(sha256 differs); copy the whole directory again"
            )


def _choose_max_length(
    wanted: int | None,
    settings: _Settings,
    tokenizer_config: Mapping[str, Any],
    config: ModelConfig,
    directory: Path,
) -> int:
    longest = config.longest
    if wanted is not None:
        if not 1 <= wanted <= longest:
            raise ConfigError(
                f"a maximum length of {wanted} tokens: the model {directory} reads 1 to {longest}"
            )
        return wanted
    if settings.max_length is not None:
        if settings.max_length > longest:
            raise CheckpointError(
                f"{directory / SETTINGS}: max_length is {settings.max_length}, "
                f"but the model reads at most {longest} tokens"
            )
        return settings.max_length
    # transformers writes 1e30 where it knows no limit.
    declared = tokenizer_config.get("model_max_length")
    if config.head == "last_token" and type(declared) is int and 1 <= declared <= longest:
        return declared
    return longest


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hash_json(content: Mapping[str, Any]) -> str:
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def check_free(directory: Path, *, overwrite: bool) -> None:
    """Whether `save` may write there.

    Raises:
        CheckpointError: something stands there that may not be replaced.
    """
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return
    if not (directory / CONFIG).is_file() or not (directory / WEIGHTS).is_file():
        raise CheckpointError(f"{directory} holds something other than a model; choose another")
    if not overwrite:
        raise CheckpointError(f"{directory} holds a model already; choose another directory")


def _write_weights(path: Path, model: GPT2Classifier, dtype: torch.dtype) -> None:
    state = {
        name: tensor.to(device="cpu", dtype=dtype).contiguous()
        for name, tensor in model.hf_state().items()
    }
    write_tensors(path, state, {"format": "pt"})


def write_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]
) -> None:
    """Write a safetensors file.

    Raises:
        OSError: it cannot be written; safetensors itself hides the number of the error in a text.
    """
    try:
        save_file(dict(tensors), path, metadata=dict(metadata))
    except SafetensorError as error:
        found = re.search(r"\(os error (\d+)\)", str(error))
        if found is None:
            raise
        number = int(found[1])
        raise OSError(number, os.strerror(number), str(path)) from error


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _hf_config(
    config: ModelConfig, labels: Sequence[str], dtype_name: str, end: int | None
) -> dict[str, Any]:
    architecture = {
        "last_token": "GPT2ForSequenceClassification",
        "flatten": "SimpleGPT2SequenceClassifier",
    }[config.head]
    return {
        "architectures": [architecture],
        **config.to_hf(),
        "bos_token_id": end,
        "eos_token_id": end,
        "id2label": {str(index): label for index, label in enumerate(labels)},
        "label2id": {label: index for index, label in enumerate(labels)},
        "problem_type": "single_label_classification",
        "dtype": dtype_name,
    }


def _hf_tokenizer_config(
    tokenizer: Tokenizer, config: ModelConfig, max_length: int
) -> dict[str, Any]:
    # The class that reads tokenizer.json as it is; GPT2Tokenizer keeps vocabulary and merges alone.
    content: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
    }
    if tokenizer.token_to_id(END_OF_TEXT) is not None:
        content |= dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
    if config.pad_token_id is not None:
        content["pad_token"] = tokenizer.id_to_token(config.pad_token_id)
    return content


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(one: Path, other: Path) -> bool:
    """Let two names change places in one step; False where that cannot be done."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    names = (_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other))
    return bool(renameat2(*names, _RENAME_EXCHANGE) == 0)


def _publish(temporary: Path, directory: Path) -> None:
    """Rename into place, or change places with a model that stands there.

    Where the file system cannot do that, the old one goes aside first, and away last.
    """
    if directory.exists() and _exchange(temporary, directory):
        _fsync(directory.parent)
        return
    aside = temporary.with_suffix(".old")
    if directory.exists():
        directory.rename(aside)
    try:
        temporary.rename(directory)
    except OSError:
        if aside.exists():
            aside.rename(directory)
        raise
    _fsync(directory.parent)
    shutil.rmtree(aside, ignore_errors=True)
