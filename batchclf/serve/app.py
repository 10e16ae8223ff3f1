"""The routes: SageMaker's contract, metrics and the page.

Few routes without patterns: a dictionary finds them in less time than a router does.
"""

import asyncio
import hmac
import json
import math
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl

import numpy as np
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from batchclf import __version__
from batchclf.config import Keep, ReadSettings
from batchclf.errors import ConfigError
from batchclf.predictions import Predictions
from batchclf.serve.answers import write_answer
from batchclf.serve.batcher import Batcher
from batchclf.serve.bodies import Bodies
from batchclf.serve.classifier import ServedClassifier
from batchclf.serve.media import KNOWN, MediaType, choose_media_type, parse_media_type
from batchclf.serve.metrics import CONTENT_TYPE_LATEST, Metrics
from batchclf.serve.pages import Page, read_pages
from batchclf.serve.refusal import CLIENT_GONE, Refusal
from batchclf.serve.rows import Rows, read_rows
from batchclf.serve.settings import MIB, ServeSettings

if TYPE_CHECKING:
    from batchclf.serve.connections import LimitedProtocol

# Up to here, reading a body and writing an answer take less than handing them to a thread would.
_INLINE_BYTES = 32 << 10
_INLINE_ROWS = 32

# https://docs.aws.amazon.com/sagemaker/latest/dg/your-algorithms-batch-code.html
_CUSTOM_ATTRIBUTES = b"x-amzn-sagemaker-custom-attributes"
_TRANSFORM_CONCURRENCY = 8
_TRANSFORM_MIB = 6  # times the concurrency at most 100, or SageMaker refuses the job

# The original project refused shorter texts.
SHORT_TEXT_CHARS = 300

_Handler = Callable[[Request], Awaitable[Response]]

_PARAMETERS = ("text_column", "keep_columns", "delimiter", "details")


class Service:
    """What the routes share. It becomes ready when `ready` hands it the warm model."""

    def __init__(self, settings: ServeSettings, metrics: Metrics) -> None:
        self.settings = settings
        self.metrics = metrics
        self.draining = False
        self.bodies = Bodies(settings.limits)
        self._pages = read_pages()
        readable = {
            "/ping": self.ping,
            "/execution-parameters": self.execution_parameters,
            "/metrics": self.show_metrics,
            "/model": self.model,
            **dict.fromkeys(self._pages, self.page),
        }
        self._routes: dict[str, dict[str, _Handler]] = {
            "/invocations": {"POST": self.invocations},
            **{path: {"GET": read, "HEAD": read} for path, read in readable.items()},
        }
        self._model: tuple[ServedClassifier, Batcher] | None = None
        metrics.watch("batchclf_body_bytes", "Bodies in memory", lambda: self.bodies.num_bytes)
        metrics.watch("batchclf_waiting_rows", "Rows that wait for the model", self._waiting_rows)
        metrics.watch("batchclf_ready", "Whether /ping is healthy", lambda: float(self.is_ready))

    @property
    def is_ready(self) -> bool:
        """Whether requests are answered: the model is warm, and we are not stopping."""
        return self._model is not None and not self.draining

    def ready(self, classifier: ServedClassifier, batcher: Batcher) -> None:
        """Begin to answer, with a model that was warmed up."""
        self._model = classifier, batcher

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; whatever is wrong with it is told in JSON."""
        request = Request(scope, receive)
        try:
            response = await self._find(scope)(request)
        except Refusal as refusal:
            response = _refuse(refusal)
        except ClientDisconnect:
            response = Response(status_code=CLIENT_GONE)
        await response(scope, receive, send)

    def _find(self, scope: Scope) -> _Handler:
        methods = self._routes.get(scope["path"])
        if methods is None:
            raise Refusal(404, "not_found", "there is nothing here; POST to /invocations")
        if scope["method"] not in methods:
            allowed = ", ".join(methods)
            raise Refusal(405, "wrong_method", f"this path takes {allowed}", allow=allowed)
        return methods[scope["method"]]

    def route_of(self, path: str) -> str:
        """A path as it may be logged and counted: one of ours, or `other`."""
        return path if path in self._routes else "other"

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
        headers: dict[bytes, bytes] = dict(request.scope["headers"])
        media = _media_of_body(headers)
        wanted = _media_of_answer(headers, media)
        read, details = _parameters(request.scope["query_string"], headers, self.settings.read)
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
        request.scope["state"]["noted"] = {
            "rows": len(predictions),
            "failed": len(predictions.errors),
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
        asked = batcher.classify(rows.texts)

        def give_up() -> None:
            if not asked.done():
                asked.set_exception(ClientDisconnect())

        connection: LimitedProtocol = request.scope["state"]["connection"]
        with connection.watched(give_up):
            predictions = await asked
        if not rows.errors:
            return predictions
        return replace(predictions, errors={**predictions.errors, **rows.errors})

    def _get_model(self) -> tuple[ServedClassifier, Batcher]:
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


def _media_of_body(headers: Mapping[bytes, bytes]) -> MediaType:
    if headers.get(b"content-encoding", b"identity").lower() != b"identity":
        raise Refusal(415, "unknown_encoding", "send the body without a content encoding")
    media = parse_media_type(headers.get(b"content-type", b"").decode("latin-1"))
    if media is None:
        raise Refusal(415, "unknown_type", f"set Content-Type to one of {', '.join(KNOWN)}")
    return media


def _media_of_answer(headers: Mapping[bytes, bytes], media: MediaType) -> MediaType:
    wanted = choose_media_type(headers.get(b"accept", b"").decode("latin-1"), media)
    if wanted is None:
        raise Refusal(406, "not_acceptable", f"set Accept to one of {', '.join(KNOWN)}")
    return wanted


def _parameters(
    query: bytes, headers: Mapping[bytes, bytes], read: ReadSettings
) -> tuple[ReadSettings, bool]:
    """What the query, or SageMaker's custom attributes, ask for, and whether in detail."""
    custom = headers.get(_CUSTOM_ATTRIBUTES)
    if not (query or custom):
        return read, False
    asked = parse_qsl(query.decode("latin-1"), keep_blank_values=True)
    if any(name not in _PARAMETERS for name, _ in asked):
        known = ", ".join(_PARAMETERS)
        raise Refusal(400, "unknown_parameter", f"the query may have {known} and nothing else")
    attributes = parse_qsl((custom or b"").decode("latin-1"), keep_blank_values=True)
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
    classifier: ServedClassifier, rows: Rows, predictions: Predictions
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


def _refuse(refusal: Refusal) -> Response:
    response = _json_response(refusal.as_dict(), refusal.status)
    if refusal.retry_after_s is not None:
        response.headers["retry-after"] = str(math.ceil(refusal.retry_after_s))
    if refusal.allow is not None:
        response.headers["allow"] = refusal.allow
    if refusal.status == 401:  # noqa: PLR2004 - RFC 9110 wants to hear how
        response.headers["www-authenticate"] = "Bearer"
    return response
