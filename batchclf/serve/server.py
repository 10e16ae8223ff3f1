"""The server's life: bind, load, warm up, answer, drain, leave."""

import asyncio
import gc
import logging
import os
import resource
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import uvicorn

from batchclf.errors import EXIT_OK, EXIT_TRY_AGAIN, ConfigError
from batchclf.log import fields
from batchclf.serve.app import Service
from batchclf.serve.batcher import Batcher
from batchclf.serve.classifier import Pace, ServedClassifier
from batchclf.serve.connections import Entrance, limited_protocol
from batchclf.serve.door import Door
from batchclf.serve.metrics import Metrics
from batchclf.serve.settings import Limits, ServeSettings

log = logging.getLogger(__name__)

# SageMaker, ECS and docker send SIGKILL 30 s (docker: 10 s) after SIGTERM.
_GRACE_S = 20
# Load balancers keep idle connections for a minute, and the server should be the more patient one:
# https://docs.aws.amazon.com/elasticloadbalancing/latest/application/edit-load-balancer-attributes.html
_KEEP_ALIVE_S = 75
_BACKLOG = 4096
_SPARE_FILES = 64  # open files other than connections
_MOST_INLINE_S = 0.025  # /ping and other requests wait for so long


class _Server(uvicorn.Server):
    """uvicorn, less its handling of signals."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def serve(settings: ServeSettings) -> int:
    """Answer requests until SIGTERM or SIGINT, then finish what was accepted.

    Returns:
        The exit code: 0 when every accepted request was answered, 75 when time ran out.

    Raises:
        ConfigError: the address cannot be bound, or the model not be loaded here.
        CheckpointError: the model is not what it says.
    """
    return asyncio.run(_serve(settings))


async def _serve(settings: ServeSettings) -> int:
    listener = _bind(settings.host, settings.port)
    metrics = Metrics()
    service = Service(settings, metrics)
    door = Door(service, metrics, settings.limits.client_timeout_s, service.route_of)
    server = _make_server(door, settings.limits, metrics)
    loop = asyncio.get_running_loop()

    def stop() -> None:
        if service.draining:
            os._exit(EXIT_TRY_AGAIN)
        log.info("stopping: finishing %d open requests", door.num_open)
        service.draining = door.draining = True
        server.should_exit = True

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    answering = asyncio.create_task(server.serve(sockets=[listener]))
    working = asyncio.create_task(_work(service, listener))
    try:
        await asyncio.wait((answering, working), return_when=asyncio.FIRST_COMPLETED)
        if not answering.done():  # the model cannot be loaded, or it broke
            service.draining = door.draining = server.should_exit = True
            await answering
            await working
    finally:
        working.cancel()
        with suppress(asyncio.CancelledError):
            await working
    await answering
    if door.num_cut_off:
        log.error("stopped with %d requests unanswered: time ran out", door.num_cut_off)
        return EXIT_TRY_AGAIN
    log.info("stopped; every accepted request was answered")
    return EXIT_OK


async def _work(service: Service, listener: socket.socket) -> None:
    """Load the model, warm it up, and compute until cancelled."""
    settings = service.settings
    classifier, pace = await asyncio.to_thread(_load, settings)
    is_cpu = classifier.compute.device.type == "cpu"
    classifier.settle_here()
    batcher = Batcher(
        classifier.predict,
        classifier.estimate_tokens,
        batch_tokens=classifier.tokens_at_once,
        # To wait for longer than what a shared batch saves would be a loss.
        max_wait_s=min(settings.limits.max_wait_s, pace.smallest_s),
        max_queue_rows=settings.limits.max_queue_rows,
        on_batch=service.metrics.count_batch,
        # While a GPU computes, the processor is free for other requests.
        inline_tokens=pace.tokens_within(_MOST_INLINE_S) if is_cpu else 0,
    )
    service.ready(classifier, batcher)
    host, port = listener.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    log.info(
        "ready on %s with %s on %s in %s%s",
        url,
        classifier.name,
        classifier.compute.device,
        classifier.compute.dtype_name,
        "" if settings.token else ", without a token",
        extra=fields(
            url=url,
            model=classifier.name,
            device=str(classifier.compute.device),
            dtype=classifier.compute.dtype_name,
            labels=len(classifier.labels),
        ),
    )
    await batcher.run()


def _load(settings: ServeSettings) -> tuple[ServedClassifier, Pace]:
    classifier = ServedClassifier(settings.model, settings.min_score, settings.endpoint_url)
    pace = classifier.warm_up()
    # What is loaded stays: to look through it for garbage takes longer than many an answer.
    gc.collect()
    gc.freeze()
    return classifier, pace


def _make_server(door: Door, limits: Limits, metrics: Metrics) -> _Server:
    for name in ("uvicorn.error", "uvicorn.asgi"):  # its words go where ours go
        logger = logging.getLogger(name)
        logger.handlers[:] = logging.getLogger("batchclf").handlers
        logger.setLevel(logging.WARNING)
        logger.propagate = False
    most, most_refused = _affordable(limits.max_connections)
    entrance = Entrance(most, most_refused, limits.client_timeout_s, metrics)
    server = _Server(
        uvicorn.Config(
            door,
            http=limited_protocol(entrance),
            loop="asyncio",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            backlog=_BACKLOG,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=_GRACE_S,
        )
    )
    connections = server.server_state.connections
    metrics.watch("batchclf_connections", "Connections that are served", lambda: len(connections))
    return server


def _affordable(max_connections: int) -> tuple[int, int]:
    """How many connections open files allow: served, and told to come back."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if hard == resource.RLIM_INFINITY:
        return max_connections, max_connections
    files = max(2, hard - _SPARE_FILES)
    served = min(max_connections, files // 2)
    if served < max_connections:
        log.warning(
            "%d files may be open, so at most %d connections are served (ulimit -n)", hard, served
        )
    return served, files - served


def _bind(host: str, port: int) -> socket.socket:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(
            f"cannot listen on {host} port {port}: {reason}; choose another --host or --port"
        ) from error
    return listener
