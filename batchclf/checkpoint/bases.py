"""A GPT-2 to begin a training with."""

from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Tokenizer

from batchclf.checkpoint.files import CONFIG, END_OF_TEXT, TOKENIZER_CONFIG, naming, read_json
from batchclf.checkpoint.location import find_model
from batchclf.checkpoint.tokenizer import check_tokenizer, read_tokenizer
from batchclf.checkpoint.weights import find_weights, open_weights
from batchclf.model import GPT2Classifier, is_ignored
from batchclf.model_config import Head, ModelConfig

if TYPE_CHECKING:
    import torch

_TRUNK = "transformer."
_HEADS = ("lm_head.", "score.", "fc1.")  # of other purposes, which fine-tuning replaces


def load_base(
    model: str | Path,
    num_labels: int,
    head: Head,
    head_length: int,
    endpoint_url: str | None = None,
) -> tuple[GPT2Classifier, Tokenizer]:
    """A GPT-2 to fine-tune: language model or classifier, with a new head, and its tokenizer.

    Args:
        model: a directory, an `s3://` prefix, else a hub id such as `gpt2`.
        num_labels: classes of the new head; an old head is dropped.
        head: what is put on top.
        head_length: positions that a flatten head reads; 0 for `last_token`.
        endpoint_url: another server of the S3 protocol.

    Raises:
        CheckpointError: it cannot be had, or is not a GPT-2.
    """
    config, tokenizer = load_base_config(model, num_labels, head, head_length, endpoint_url)
    directory = find_model(model, endpoint_url=endpoint_url)
    state: dict[str, torch.Tensor] = {}
    for path in find_weights(directory):
        with open_weights(path) as file:
            # GPT2Model names its weights without the prefix, and so does `gpt2` on the hub.
            state |= {
                name if name.startswith(_TRUNK) else _TRUNK + name: file.get_tensor(name)
                for name in file.keys()  # noqa: SIM118 - not a mapping
                if not is_ignored(name) and not name.startswith(_HEADS)
            }
    with naming(directory):
        classifier = GPT2Classifier(config)
        classifier.init_weights()
        own = classifier.hf_state()
        classifier.load_hf_state(
            state | {name: own[name] for name in own if not name.startswith(_TRUNK)}
        )
    return classifier, tokenizer


def load_base_config(
    model: str | Path,
    num_labels: int,
    head: Head,
    head_length: int,
    endpoint_url: str | None = None,
) -> tuple[ModelConfig, Tokenizer]:
    """What `load_base` knows of a GPT-2 without its weights, which need not be there.

    Raises:
        CheckpointError: it cannot be had, or is not a GPT-2.
    """
    directory = find_model(model, weights=False, endpoint_url=endpoint_url)
    hf_config = read_json(directory / CONFIG)
    tokenizer_config = read_json(directory / TOKENIZER_CONFIG, {})
    tokenizer, tokenizer_files = read_tokenizer(directory, tokenizer_config)
    hf_config.pop("problem_type", None)
    if hf_config.get("pad_token_id") is None:
        hf_config["pad_token_id"] = tokenizer.token_to_id(END_OF_TEXT)
    with naming(directory):
        config = ModelConfig.from_hf(hf_config, num_labels, head=head, head_length=head_length)
        check_tokenizer(tokenizer, tokenizer_files[0], config)
    return config, tokenizer
