"""Builders of small random checkpoints, made by the libraries that users have them from."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2Model,
    PreTrainedTokenizerFast,
)

from batchclf.checkpoint import END_OF_TEXT
from batchclf.model import GPT2Classifier
from batchclf.model_config import ModelConfig
from batchclf.train import train_tokenizer

LABELS = ("business", "entertainment", "politics", "sport", "tech")
CORPUS = (
    "Shares in the bank rose sharply after it said that profits had doubled in the first quarter.",
    "The film took twelve million pounds at the box office, and its star won an award in Cannes.",
    "The prime minister told parliament that the vote on the new tax would be held on Thursday.",
    "She scored twice in the second half as the champions won the cup final after extra time.",
    "The phone's maker says its new software stops spam, viruses and other attacks on networks.",
)


def byte_level_tokenizer(vocab_size: int = 400) -> Any:
    """A BPE tokenizer trained on the spot, with at most `vocab_size` tokens."""
    return train_tokenizer(CORPUS, vocab_size)


def label_names(num_labels: int) -> list[str]:
    if num_labels == len(LABELS):
        return list(LABELS)
    return [f"label {index}" for index in range(num_labels)]


def random_hf_model(*, num_labels: int = 5, seed: int = 0, **config: Any) -> Any:
    """A `GPT2ForSequenceClassification` whose logits are far from zero, in eval mode."""
    names = label_names(num_labels)
    torch.manual_seed(seed)
    model = GPT2ForSequenceClassification(
        GPT2Config(
            id2label=dict(enumerate(names)),
            label2id={name: index for index, name in enumerate(names)},
            **config,
        )
    )
    spread_weights(model)
    return model.eval()


@torch.no_grad()
def spread_weights(model: nn.Module) -> None:
    """Random initial weights make a model that hardly sees its input; make them larger."""
    wide = max(parameter.shape[-1] for parameter in model.parameters()) > 512
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.add_(torch.randn_like(parameter) * 0.1)
        elif name == "score.weight":
            parameter.mul_(10)
        elif not wide:
            parameter.mul_(5)


def our_model(hf_model: Any) -> GPT2Classifier:
    """The same classifier as ours, float32, in eval mode."""
    config = ModelConfig.from_hf(hf_model.config.to_dict(), hf_model.config.num_labels)
    model = GPT2Classifier(config)
    model.load_hf_state(hf_model.state_dict())
    return model.eval()


def make_hf_checkpoint(
    directory: Path,
    *,
    num_labels: int = 5,
    hidden: int = 32,
    layers: int = 2,
    heads: int = 2,
    vocab: int = 400,
    max_positions: int = 64,
    seed: int = 0,
    **config: Any,
) -> Path:
    """Write a checkpoint and a tokenizer with transformers' own `save_pretrained`; returns it."""
    tokenizer = byte_level_tokenizer(vocab)
    end = tokenizer.token_to_id(END_OF_TEXT)
    settings = {
        "vocab_size": vocab,
        "n_positions": max_positions,
        "n_embd": hidden,
        "n_layer": layers,
        "n_head": heads,
        "pad_token_id": end,
        "bos_token_id": end,
        "eos_token_id": end,
    }
    random_hf_model(num_labels=num_labels, seed=seed, **(settings | config)).save_pretrained(
        directory
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=END_OF_TEXT,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        model_max_length=max_positions,
    ).save_pretrained(directory)
    return directory


def edit_json(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file; None removes one."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def random_texts(lengths: Sequence[int], vocab_size: int, seed: int = 0) -> list[Tensor]:
    """Token ids of texts with the given lengths, [T] each."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, vocab_size, (length,), generator=generator) for length in lengths]


def pad_right(texts: Sequence[Tensor], pad: int) -> tuple[Tensor, Tensor]:
    """Texts as one batch: ids [B, T] and lengths [B]."""
    ids = nn.utils.rnn.pad_sequence(list(texts), batch_first=True, padding_value=pad)
    return ids, torch.tensor([len(text) for text in texts])


class SimpleGPT2SequenceClassifier(nn.Module):
    """The original project's model, as its weights were trained: the reference for `flatten`.

    Source: https://github.com/haocai1992/GPT2-News-Classifier
    """

    def __init__(self, gpt2model: nn.Module, max_seq_len: int, num_classes: int) -> None:
        super().__init__()
        self.gpt2model = gpt2model
        self.fc1 = nn.Linear(gpt2model.config.hidden_size * max_seq_len, num_classes)

    def forward(self, input_id: Tensor, mask: Tensor) -> Tensor:
        hidden, *_ = self.gpt2model(input_ids=input_id, attention_mask=mask, return_dict=False)
        return self.fc1(hidden.view(hidden.shape[0], -1))


def random_flatten_reference(
    *, max_seq_len: int = 128, num_labels: int = 5, seed: int = 0, **config: Any
) -> SimpleGPT2SequenceClassifier:
    """The original model with random weights and logits far from zero, in eval mode."""
    torch.manual_seed(seed)
    gpt2 = GPT2Model(GPT2Config(attn_implementation="sdpa", **config))
    reference = SimpleGPT2SequenceClassifier(gpt2, max_seq_len, num_labels)
    spread_weights(gpt2)
    nn.init.normal_(reference.fc1.weight, std=0.02)
    return reference.eval()


def our_flatten_model(reference: SimpleGPT2SequenceClassifier, pad: int) -> GPT2Classifier:
    """The same classifier as ours, float32, in eval mode."""
    hf_config = reference.gpt2model.config.to_dict() | {"pad_token_id": pad}
    num_labels = reference.fc1.out_features
    head_length = reference.fc1.in_features // hf_config["n_embd"]
    model = GPT2Classifier(
        ModelConfig.from_hf(hf_config, num_labels, head="flatten", head_length=head_length)
    )
    model.load_hf_state(
        {
            name.replace("gpt2model.", "transformer.", 1): tensor
            for name, tensor in reference.state_dict().items()
        }
    )
    return model.eval()


def pad_left(texts: Sequence[Tensor], length: int, pad: int) -> tuple[Tensor, Tensor]:
    """Texts as the original feeds them: ids and attention mask, both [B, length]."""
    ids = torch.full((len(texts), length), pad)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(texts):
        ids[row, length - len(text) :] = text
        mask[row, length - len(text) :] = 1
    return ids, mask
