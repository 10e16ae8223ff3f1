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

`openvino/int8/` holds what `batchclf build` made of the weights: see `builds`.

Without `batchclf.json` the directory is any GPT-2 sequence classifier, read as transformers does.
Nothing in a directory is ever run: pickles are refused and code is not looked at.
"""

from batchclf.checkpoint.bases import load_base, load_base_config
from batchclf.checkpoint.builds import Build, find_build, write_build
from batchclf.checkpoint.files import END_OF_TEXT
from batchclf.checkpoint.loading import Checkpoint, fingerprint, load
from batchclf.checkpoint.saving import check_free, save
from batchclf.checkpoint.weights import write_tensors

__all__ = [
    "END_OF_TEXT",
    "Build",
    "Checkpoint",
    "check_free",
    "find_build",
    "fingerprint",
    "load",
    "load_base",
    "load_base_config",
    "save",
    "write_build",
    "write_tensors",
]
