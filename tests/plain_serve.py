"""A plain endpoint to compare `batchclf serve` with: one request after the other, no batches.

    python tests/plain_serve.py --model data/models/bbc-small --port 8081

What a `model_fn` and a `predict_fn` for a PyTorch container come to: transformers' own model and
tokenizer in float32, one forward pass a request. The HTTP stack is the one of `batchclf serve`:
uvicorn with httptools, and starlette.
"""

import argparse
import json
from pathlib import Path

import torch
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from transformers import AutoModelForSequenceClassification, AutoTokenizer


def make_app(folder: Path) -> Starlette:
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    max_length = model.config.n_positions

    @torch.inference_mode()
    def predict(text: str) -> dict[str, float]:
        text = " ".join(text.lower().split())
        tokens = tokenizer(text, truncation=True, max_length=max_length, return_tensors="pt")
        probs = model(**tokens).logits.softmax(dim=1)[0].tolist()
        labelled = {model.config.id2label[index]: prob for index, prob in enumerate(probs)}
        return dict(sorted(labelled.items(), key=lambda pair: -pair[1]))

    async def invocations(request: Request) -> JSONResponse:
        return JSONResponse(predict(json.loads(await request.body())["text"]))

    async def ping(request: Request) -> JSONResponse:
        return JSONResponse({})

    return Starlette(
        routes=[
            Route("/invocations", invocations, methods=["POST"]),
            Route("/ping", ping, methods=["GET"]),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--port", type=int, required=True)
    options = parser.parse_args()
    uvicorn.run(
        make_app(options.model),
        host="127.0.0.1",
        port=options.port,
        http="httptools",
        log_level="warning",
        access_log=False,
    )


if __name__ == "__main__":
    main()
