"""Where a model is: a directory here, one on S3, or a name on the Hugging Face hub."""

import re
from pathlib import Path

from batchclf.checkpoint.files import BUILD_FILES, JSON_FILES, TEXT_FILES, WEIGHTS_FILES
from batchclf.checkpoint.remote import fetch_model
from batchclf.errors import CheckpointError
from batchclf.store.base import is_s3

# https://huggingface.co/docs/huggingface_hub/package_reference/utilities (validate_repo_id)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def find_model(
    model: str | Path,
    *,
    weights: bool = True,
    build: bool = False,
    endpoint_url: str | None = None,
) -> Path:
    """The directory of a model on this machine; one that is elsewhere is downloaded into a cache.

    Args:
        model: a directory, an `s3://` prefix, else a hub id.
        weights: whether they are wanted too.
        build: whether what `batchclf build` made of it is wanted too, if it is there.
        endpoint_url: another server of the S3 protocol.

    Raises:
        CheckpointError: it is nowhere.
        StoreError: S3 kept failing.
    """
    if model == "":
        raise CheckpointError("no model directory is named")
    if isinstance(model, str) and is_s3(model):
        return fetch_model(model, weights=weights, build=build, endpoint_url=endpoint_url)
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

    names = [*JSON_FILES, *TEXT_FILES]
    names += [*(WEIGHTS_FILES if weights else ()), *(BUILD_FILES if build else ())]
    try:
        return Path(snapshot_download(str(model), allow_patterns=names))
    except (OSError, HFValidationError) as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(
            f"{model} is neither a directory here nor a model that can be had from the "
            f"Hugging Face hub ({reason})"
        ) from error
