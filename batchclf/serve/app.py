"""The routes: SageMaker's contract, metrics and the page."""

import asyncio
import hmac
import json
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from urllib.parse import parse_qsl

import numpy as np
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from batchclf import __version__
from batchclf.config import Keep, ReadSettings
from batchclf.errors import ConfigError
from batchclf.predictions import Predictions
from batchclf.serve.answers import write_answer
from batchclf.serve.batcher import Batcher
from batchclf.serve.bodies import Bodies
from batchclf.serve.classifier import Classifier
from batchclf.serve.media import KNOWN, MediaType, choose_media_type, parse_media_type
from batchclf.serve.metrics import CONTENT_TYPE_LATEST, Metrics
from batchclf.serve.pages import Page, read_pages
from batchclf.serve.refusal import Refusal
from batchclf.serve.rows import Rows, read_rows
from batchclf.serve.settings import MIB, ServeSettings

# Up to here, reading a body and writing an answer take less than handing them to a thread would.
_INLINE_BYTES = 32 << 10
_INLINE_ROWS = 32

# https://docs.aws.amazon.com/sagemaker/latest/dg/your-algorithms-batch-code.html
_CUSTOM_ATTRIBUTES = "x-amzn-sagemaker-custom-attributes"
_TRANSFORM_CONCURRENCY = 8
_TRANSFORM_MIB = 6  # times the concurrency at most 100, or SageMaker refuses the job

# The original project refused shorter texts.
SHORT_TEXT_CHARS = 300

_PARAMETERS = ("text_column", "keep_columns", "delimiter", "details")


class Service:
    """What the routes share. It becomes ready when `ready` hands it the warm model."""

    def __init__(self, settings: ServeSettings, metrics: Metrics) -> None:
        self.settings = settings
        self.metrics = metrics
        self.draining = False
        self.bodies = Bodies(settings.limits)
        self._pages = read_pages()
        self._model: tuple[Classifier, Batcher] | None = None
        metrics.watch("batchclf_body_bytes", "Bodies in memory", lambda: self.bodies.num_bytes)
        metrics.watch("batchclf_waiting_rows", "Rows that wait for the model", self._waiting_rows)
        metrics.watch("batchclf_ready", "Whether /ping is healthy", lambda: float(self.is_ready))

    @property
    def is_ready(self) -> bool:
        """Whether requests are answered: the model is warm, and we are not stopping."""
        return self._model is not None and not self.draining

    def ready(self, classifier: Classifier, batcher: Batcher) -> None:
        """Begin to answer, with a model that was warmed up."""
        self._model = classifier, batcher

    def build_app(self) -> Starlette:
        """The routes, and JSON for whatever goes wrong."""
        return Starlette(
            routes=[
                Route("/ping", self.ping, methods=["GET"]),
                Route("/invocations", self.invocations, methods=["POST"]),
                Route("/execution-parameters", self.execution_parameters, methods=["GET"]),
                Route("/metrics", self.show_metrics, methods=["GET"]),
                Route("/model", self.model, methods=["GET"]),
                *(Route(path, self.page, methods=["GET"]) for path in self._pages),
            ],
            exception_handlers={
                Refusal: _answer_refusal,
                HTTPException: _answer_http_exception,
                ClientDisconnect: _answer_nobody,
            },
        )

    def route_of(self, path: str) -> str:
        """A path as it may be logged and counted: one of ours, or `other`."""
        known = ("/ping", "/invocations", "/execution-parameters", "/metrics", "/model")
        return path if path in known or path in self._pages else "other"

    async def ping(self, request: Request) -> Response:  # noqa: ARG002 - starlette's form
        """Healthy once the model answered a warm-up, until we are asked to stop."""
        if not self.is_ready:
            raise self._unready()
        return Response(b"{}\n", media_type="application/json")

    async def execution_parameters(self, request: Request) -> Response:  # noqa: ARG002
        """What Batch Transform should send where its job does not say."""
        most = self.settings.limits.max_body_bytes // MIB
        return _json_response(
            {
                "MaxConcurrentTransforms": _TRANSFORM_CONCURRENCY,
                "BatchStrategy": "MULTI_RECORD",
                "MaxPayloadInMB": max(1, min(_TRANSFORM_MIB, most)),
            }
        )

    async def show_metrics(self, request: Request) -> Response:
        """All counters, for Prometheus."""
        self._check_token(request)
        return Response(self.metrics.render(), headers={"content-type": CONTENT_TYPE_LATEST})

    async def model(self, request: Request) -> Response:
        """What the page says about the model and its limits."""
        self._check_token(request)
        classifier, _ = self._get_model()
        return _json_response(
            {
                "name": classifier.name,
                "labels": classifier.labels,
                "max_length": classifier.max_length,
                "text_columns": self.settings.read.text_columns,
                "short_text_chars": SHORT_TEXT_CHARS,
                "max_body_bytes": self.settings.limits.max_body_bytes,
                "max_rows": self.settings.limits.max_rows,
                "device": str(classifier.compute.device),
                "dtype": classifier.compute.dtype_name,
                "version": __version__,
            }
        )

    async def page(self, request: Request) -> Response:
        """A file of the demo page."""
        page: Page = self._pages[request.scope["path"]]
        if request.headers.get("if-none-match") == page.etag:
            return Response(status_code=304, headers=page.headers)
        return Response(page.content, headers=page.headers)

    async def invocations(self, request: Request) -> Response:
        """Label the rows of a body."""
        self._check_token(request)
        classifier, batcher = self._get_model()
        media = _media_of_body(request)
        wanted = _media_of_answer(request, media)
        read, details = _parameters(request, self.settings.read)
        async with self.bodies.read(request) as body:
            rows = await self._read(body, media, read)
            began = time.perf_counter()
            predictions = await self._predict(request, batcher, rows, len(classifier.labels))
            seconds = time.perf_counter() - began
            read_chars = None
            if details:
                read_chars = await asyncio.to_thread(_read_chars, classifier, rows, predictions)
            write = (rows, predictions, classifier.labels, wanted, read_chars)
            if len(rows.texts) <= _INLINE_ROWS:
                content = write_answer(*write)
            else:
                content = await asyncio.to_thread(write_answer, *write)
        self.metrics.count_rows(predictions)
        request.scope["state"]["noted"] = {
            "rows": len(predictions),
            "failed": int((predictions.label < 0).sum()),
            "tokens": int(predictions.num_tokens.sum()),
        }
        return Response(
            content,
            headers={
                "content-type": _content_type(wanted),
                "server-timing": f"model;dur={seconds * 1000:.2f}",
            },
        )

    async def _read(self, body: bytes, media: MediaType, read: ReadSettings) -> Rows:
        if len(body) <= _INLINE_BYTES:
            return read_rows(body, media, read, self.settings.limits)
        return await asyncio.to_thread(read_rows, body, media, read, self.settings.limits)

    async def _predict(
        self, request: Request, batcher: Batcher, rows: Rows, num_labels: int
    ) -> Predictions:
        if not rows.texts:
            return _no_predictions(num_labels)
        asked = asyncio.ensure_future(batcher.classify(rows.texts))
        gone = asyncio.ensure_future(request.receive())  # after the body, only a goodbye can come
        try:
            await asyncio.wait((asked, gone), return_when=asyncio.FIRST_COMPLETED)
            if not asked.done():
                raise ClientDisconnect
            predictions = await asked
        finally:
            gone.cancel()
            asked.cancel()
        return replace(predictions, errors={**predictions.errors, **rows.errors})

    def _get_model(self) -> tuple[Classifier, Batcher]:
        if self._model is None:
            raise self._unready()
        return self._model

    def _unready(self) -> Refusal:
        if self._model is None:
            return Refusal(503, "starting", "the model is being loaded", retry_after_s=1)
        return Refusal(503, "stopping", "the server is stopping", retry_after_s=1)

    def _waiting_rows(self) -> float:
        return float(self._model[1].num_waiting_rows) if self._model else 0.0

    def _check_token(self, request: Request) -> None:
        token = self.settings.token
        if token is None:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        # Compared in a time that does not depend on where they differ.
        same = hmac.compare_digest(given.strip().encode(), token.encode())
        if scheme.lower() != "bearer" or not same:
            raise Refusal(401, "unauthorized", "send the token as Authorization: Bearer TOKEN")


def _media_of_body(request: Request) -> MediaType:
    encoding = request.headers.get("content-encoding", "identity")
    if encoding.lower() != "identity":
        raise Refusal(415, "unknown_encoding", "send the body without a content encoding")
    media = parse_media_type(request.headers.get("content-type", ""))
    if media is None:
        raise Refusal(415, "unknown_type", f"set Content-Type to one of {', '.join(KNOWN)}")
    return media


def _media_of_answer(request: Request, media: MediaType) -> MediaType:
    wanted = choose_media_type(request.headers.get("accept"), media)
    if wanted is None:
        raise Refusal(406, "not_acceptable", f"set Accept to one of {', '.join(KNOWN)}")
    return wanted


def _parameters(request: Request, read: ReadSettings) -> tuple[ReadSettings, bool]:
    """What the query, or SageMaker's custom attributes, ask for, and whether in detail."""
    # Not request.url, which raises on a strange Host header.
    asked = parse_qsl(request.scope["query_string"].decode("latin-1"), keep_blank_values=True)
    if any(name not in _PARAMETERS for name, _ in asked):
        known = ", ".join(_PARAMETERS)
        raise Refusal(400, "unknown_parameter", f"the query may have {known} and nothing else")
    attributes = parse_qsl(request.headers.get(_CUSTOM_ATTRIBUTES, ""), keep_blank_values=True)
    asked += [(name, value) for name, value in attributes if name in _PARAMETERS]
    if not asked:
        return read, False
    values = dict(asked)
    text_columns = tuple(value for name, value in asked if name == "text_column")
    try:
        settings = replace(
            read,
            text_columns=text_columns or read.text_columns,
            keep=_keep(values["keep_columns"]) if "keep_columns" in values else read.keep,
            delimiter=values.get("delimiter", read.delimiter),
        )
    except ConfigError as error:
        raise Refusal(400, "wrong_parameter", str(error)) from error
    return settings, values.get("details", "false").lower() in ("true", "1")


def _keep(value: str) -> Keep:
    if value == "all":
        return "all"
    if value == "none":
        return "none"
    return tuple(dict.fromkeys(value.split(",")))


def _read_chars(
    classifier: Classifier, rows: Rows, predictions: Predictions
) -> Sequence[int | None]:
    """How far the model read into each text; None where there is none."""
    return [
        None
        if text is None
        else classifier.extent.read_chars(text)
        if predictions.truncated[row]
        else len(text)
        for row, text in enumerate(rows.texts)
    ]


def _no_predictions(num_labels: int) -> Predictions:
    return Predictions(
        np.empty(0, np.int64),
        np.empty((0, num_labels), np.float32),
        np.empty(0, np.bool_),
        np.empty(0, np.int32),
        np.empty(0, np.bool_),
        {},
    )


def _content_type(media: MediaType) -> str:
    if media.name.startswith("text/"):
        return f"{media.name}; charset=utf-8; header={'present' if media.has_header else 'absent'}"
    return media.name


def _json_response(content: object, status: int = 200) -> Response:
    body = json.dumps(content, ensure_ascii=False).encode() + b"\n"
    return Response(body, status, media_type="application/json")


async def _answer_refusal(request: Request, error: Exception) -> Response:  # noqa: ARG001
    if not isinstance(error, Refusal):
        raise error
    response = _json_response(error.as_dict(), error.status)
    if error.retry_after_s is not None:
        response.headers["retry-after"] = str(math.ceil(error.retry_after_s))
    if error.status == 401:  # noqa: PLR2004 - RFC 9110 wants to hear how
        response.headers["www-authenticate"] = "Bearer"
    return response


async def _answer_http_exception(request: Request, error: Exception) -> Response:  # noqa: ARG001
    if not isinstance(error, HTTPException):
        raise error
    code = {404: "not_found", 405: "wrong_method"}.get(error.status_code, "http_error")
    refusal = Refusal(error.status_code, code, error.detail)
    response = _json_response(refusal.as_dict(), error.status_code)
    response.headers.update(error.headers or {})
    return response


async def _answer_nobody(request: Request, error: Exception) -> Response:  # noqa: ARG001
    """The client has left; this is for our own log."""
    return Response(status_code=499)
