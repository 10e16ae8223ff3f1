"""Articles/s of training a GPT-2 of 124M random weights: `batchclf train` against the original.

    python tests/speed_train.py --steps 8 --peer-steps 32

Ours: the loop of `batchclf train` with its default settings and at most 128 tokens, one epoch and
its validation of one article. The original's, of https://github.com/haocai1992/GPT2-News-Classifier:
transformers' GPT2Model with the flatten head, batches of 2, float32, every text padded to 128
tokens, plain Adam. They take turns; texts are tokenised beforehand. The last line of standard
output is one JSON object.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from models import SimpleGPT2SequenceClassifier, pad_left
from torch import nn
from transformers import GPT2Config, GPT2Model

from batchclf.bench import _machine, _made_up
from batchclf.compute import choose_compute
from batchclf.model import GPT2Classifier
from batchclf.model_config import ModelConfig
from batchclf.train import Examples, TrainSettings, fit, train_tokenizer

MAX_LENGTH = 128
NUM_LABELS = 5
PEER_BATCH = 2
PEER_LEARNING_RATE = 1e-5
END_OF_TEXT_ID = 50256  # of the published GPT-2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=8, help="of ours, 32 articles each")
    parser.add_argument("--peer-steps", type=int, default=32, help="of the original's, 2 each")
    parser.add_argument("--repeats", type=int, default=1, help="the median counts")
    parser.add_argument("--layers", type=int, default=12, help="fewer to try the script out")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()

    settings = TrainSettings(max_length=MAX_LENGTH, epochs=1)
    device = choose_compute(options.device).device
    texts = _made_up(options.steps * settings.batch_tokens // MAX_LENGTH)
    tokenizer = train_tokenizer(texts, 8192)
    labels = [row % NUM_LABELS for row in range(len(texts))]
    train = Examples(texts, labels)

    ours, peers = [], []
    for _ in range(options.repeats):
        model = our_model(options.layers).to(device)
        fitted = fit(model, tokenizer, train, Examples(texts[:1], labels[:1]), settings)
        ours.append(len(texts) / fitted.history.epochs[0].seconds)
        rows = options.peer_steps * PEER_BATCH
        ids = [tokenizer.encode(texts[row % len(texts)]).ids[:MAX_LENGTH] for row in range(rows)]
        peers.append(original(ids, [row % NUM_LABELS for row in range(rows)], options, device))
    articles_per_s, peer_per_s = statistics.median(ours), statistics.median(peers)
    found: dict[str, Any] = {
        "what": "training, GPT-2 124M, articles/s",
        "max_length": MAX_LENGTH,
        "layers": options.layers,
        "batchclf": {
            "articles_per_s": round(articles_per_s, 3),
            "runs": [round(run, 3) for run in ours],
            "batch_tokens": settings.batch_tokens,
            "precision": choose_compute(str(device), settings.precision).dtype_name,
        },
        "original": {
            "articles_per_s": round(peer_per_s, 3),
            "runs": [round(run, 3) for run in peers],
            "batch": PEER_BATCH,
            "precision": "float32",
        },
        "ratio": round(articles_per_s / peer_per_s, 2),
        "machine": _machine(),
    }
    print(json.dumps(found))


def our_model(num_layers: int) -> GPT2Classifier:
    config = GPT2Config(n_layer=num_layers, pad_token_id=END_OF_TEXT_ID).to_dict()
    model = GPT2Classifier(ModelConfig.from_hf(config, NUM_LABELS))
    model.init_weights()
    return model


def original(
    texts: Sequence[Sequence[int]],
    labels: Sequence[int],
    options: argparse.Namespace,
    device: torch.device,
) -> float:
    """Articles/s of the original's training loop."""
    gpt2 = GPT2Model(GPT2Config(n_layer=options.layers))
    model = SimpleGPT2SequenceClassifier(gpt2, MAX_LENGTH, NUM_LABELS).to(device).train()
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=PEER_LEARNING_RATE)
    ids, mask = pad_left([torch.tensor(text) for text in texts], MAX_LENGTH, END_OF_TEXT_ID)
    began = time.perf_counter()
    for start in range(0, len(texts), PEER_BATCH):
        batch = slice(start, start + PEER_BATCH)
        output = model(ids[batch].to(device), mask[batch].to(device))
        targets = torch.tensor(labels[batch]).to(device)
        loss = criterion(output, targets)
        loss.item()
        (output.argmax(dim=1) == targets).sum().item()
        model.zero_grad()
        loss.backward()
        optimizer.step()
    return len(texts) / (time.perf_counter() - began)


if __name__ == "__main__":
    main()
