"""What `batchclf build` leaves in a model directory: a quantized graph and how well it agrees.

    openvino/int8/build.json, graph.xml, graph.bin

`build.json` names the weights that it was made of, so that a build never serves another model, and
the digests of its files, so that a damaged one is not used.
"""

import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batchclf.checkpoint.files import (
    BUILD_FOLDER,
    BUILD_GRAPH,
    BUILD_GRAPH_WEIGHTS,
    BUILD_NOTE,
    hash_json,
    naming,
    read_json,
    sha256,
    write_json,
)
from batchclf.checkpoint.loading import Checkpoint
from batchclf.checkpoint.saving import publish_directory
from batchclf.errors import CheckpointError
from batchclf.store.base import translate_os_error

BUILD_FORMAT = 1


@dataclass(frozen=True)
class Build:
    """A quantized graph that belongs to a checkpoint.

    Attributes:
        graph: what OpenVINO reads.
        content_hash: of the graph, in hex.
        note: all of `build.json`; `agreement` says how close it comes to float32.
    """

    graph: Path
    content_hash: str
    note: Mapping[str, Any]


def find_build(checkpoint: Checkpoint) -> Build | None:
    """The build in a model directory, if there is one.

    Raises:
        CheckpointError: it is damaged, or of other weights.
    """
    folder = checkpoint.path / BUILD_FOLDER
    if not (folder / BUILD_NOTE).is_file():
        return None
    note = read_json(folder / BUILD_NOTE)
    with naming(folder / BUILD_NOTE):
        again = "build it again with `batchclf build`"
        if note.get("format_version") != BUILD_FORMAT:
            raise CheckpointError(f"is of another version of batchclf; {again}")
        if note.get("weights_hash") != checkpoint.weights_hash:
            raise CheckpointError(f"was built of other weights than those in the folder; {again}")
        expected = note.get("sha256")
        found = {
            name: sha256(folder / name)
            for name in (BUILD_GRAPH, BUILD_GRAPH_WEIGHTS)
            if (folder / name).is_file()
        }
        if expected != found or len(found) < 2:  # noqa: PLR2004 - both files
            raise CheckpointError(f"its files are not those that it was written with; {again}")
    return Build(folder / BUILD_GRAPH, hash_json(found), note)


def write_build(checkpoint: Checkpoint, graph: Path, note: Mapping[str, Any]) -> None:
    """Put a build into a model directory, whole or not at all, in place of an older one.

    Args:
        checkpoint: what it was made of.
        graph: as OpenVINO saved it, with its weights beside it in a `.bin`.
        note: what to remember of it, in plain values.

    Raises:
        StoreError, ConfigError: the directory cannot be written.
    """
    folder = checkpoint.path / BUILD_FOLDER
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.mkdir(parents=True)
        shutil.copy(graph, temporary / BUILD_GRAPH)
        shutil.copy(graph.with_suffix(".bin"), temporary / BUILD_GRAPH_WEIGHTS)
        write_json(
            temporary / BUILD_NOTE,
            {
                "format_version": BUILD_FORMAT,
                "weights_hash": checkpoint.weights_hash,
                "sha256": {
                    name: sha256(temporary / name) for name in (BUILD_GRAPH, BUILD_GRAPH_WEIGHTS)
                },
                **note,
            },
        )
        publish_directory(temporary, folder)
    except OSError as error:
        raise translate_os_error(error, f"the build in {checkpoint.path}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
