"""The files of a model directory: their names, JSON, digests."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from batchclf.errors import CheckpointError

END_OF_TEXT = "<|endoftext|>"
FORMAT_VERSION = 1

CONFIG = "config.json"
SETTINGS = "batchclf.json"
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
VOCABULARY = "vocab.json"
MERGES = "merges.txt"
SPECIAL_TOKENS = "special_tokens_map.json"
ADDED_TOKENS = "added_tokens.json"

# All that is ever read, and so all that is downloaded.
JSON_FILES = (
    CONFIG,
    SETTINGS,
    WEIGHTS_INDEX,
    TOKENIZER,
    TOKENIZER_CONFIG,
    VOCABULARY,
    SPECIAL_TOKENS,
    ADDED_TOKENS,
)
TEXT_FILES = (MERGES,)
WEIGHTS_FILES = ("*.safetensors",)
# What `batchclf build` keeps: see `builds`.
BUILD_FOLDER = "openvino/int8"
BUILD_NOTE, BUILD_GRAPH, BUILD_GRAPH_WEIGHTS = "build.json", "graph.xml", "graph.bin"
BUILD_FILES = tuple(
    f"{BUILD_FOLDER}/{name}" for name in (BUILD_NOTE, BUILD_GRAPH, BUILD_GRAPH_WEIGHTS)
)
PICKLES = (".bin", ".pth", ".pt", ".ckpt", ".pkl")


def read_json(path: Path, default: dict[str, Any] | None = None) -> dict[str, Any]:
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
def naming(path: Path) -> Iterator[None]:
    """Put the file in front of what is wrong in it."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """As `read_json` reads it."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def sha256(path: Path) -> str:
    """Of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_json(content: Mapping[str, Any]) -> str:
    """SHA-256, in hex, of plain values, whatever the order of their keys."""
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()
