"""The tokenizer of a model directory, as transformers would have it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from batchclf.checkpoint.files import (
    ADDED_TOKENS,
    END_OF_TEXT,
    MERGES,
    SPECIAL_TOKENS,
    TOKENIZER,
    TOKENIZER_CONFIG,
    VOCABULARY,
    read_json,
)
from batchclf.errors import CheckpointError
from batchclf.model_config import ModelConfig

_GPT2_TOKENIZERS = (None, "GPT2Tokenizer", "GPT2TokenizerFast")
_SPECIAL_TOKENS = tuple(
    f"{kind}_token" for kind in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
)


def read_tokenizer(
    directory: Path, tokenizer_config: Mapping[str, Any]
) -> tuple[Tokenizer, tuple[Path, ...]]:
    """The tokenizer as transformers would have it, and the files that it was read from."""
    path = directory / TOKENIZER
    vocab, merges = directory / VOCABULARY, directory / MERGES
    if path.is_file():
        read_json(path)
        tokenizer = _parse(path, lambda: Tokenizer.from_file(str(path)))
        files: tuple[Path, ...] = (path,)
    elif vocab.is_file() and merges.is_file():
        read_json(vocab)
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
        **read_json(directory / SPECIAL_TOKENS, {}),
    }
    named = [_content(token) for name in _SPECIAL_TOKENS if (token := settings.get(name))]
    named += [_content(token) for token in settings.get("additional_special_tokens") or []]
    added = read_json(directory / ADDED_TOKENS, {})
    for token in sorted(added, key=added.__getitem__):
        is_special = token in named
        tokenizer.add_tokens([AddedToken(token, normalized=not is_special, special=is_special)])
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in named])


def _content(token: Any) -> str:
    return str(token["content"] if isinstance(token, dict) else token)


def check_tokenizer(tokenizer: Tokenizer, path: Path, config: ModelConfig) -> None:
    """Raise CheckpointError unless every token has its place in the embedding."""
    last_id = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if last_id < 0:
        raise CheckpointError(f"{path} holds no tokens; save the model's tokenizer again")
    if last_id >= config.vocab_size:
        raise CheckpointError(
            f"{path} has the token {tokenizer.id_to_token(last_id)!r} with id {last_id}, but the "
            f"model knows ids below {config.vocab_size}; use the tokenizer that it was trained with"
        )


def describe_tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
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
