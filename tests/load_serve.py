"""Load on `batchclf serve`, from one asyncio client; prints one JSON object.

    python tests/load_serve.py throughput --json data/bench/serve-load.json
    python tests/load_serve.py latency --json data/bench/serve-load.json
    python tests/load_serve.py mixed --seconds 600 --json data/bench/serve-load.json
    python tests/load_serve.py model --json data/bench/serve-load.json

`throughput`: answers a second of single articles, of which no two are equal (equal ones would be
computed once), next to three ways to handle one at a time, in turns:

    batched      our server, many connections
    alone        our server, one connection
    unbatched    our server with batches of one article, many connections
    plain        tests/plain_serve.py: transformers' own model in float32, many connections

`latency`: articles at random moments, half as many a second as the server answered at most.

`mixed`: articles, lists, files, broken bodies, slow clients, clients that leave, health checks.

`model`: the model without a server, one article at once and as many as there are connections: what
sharing batches can save at most, before HTTP and the client have their part of the cores.

The client runs on the same cores, so each figure has the processor time that the server took.
"""

import argparse
import asyncio
import gc
import io
import itertools
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import servers
from serve.running import Server, free_port, is_ready, running, wait_until

from batchclf.bench import _machine
from batchclf.config import ModelSettings
from batchclf.serve.classifier import ServedClassifier
from batchclf.serve.settings import Limits

REPOSITORY = Path(__file__).resolve().parents[1]
MODEL = REPOSITORY / "data" / "models" / "bbc-small"
SAMPLE = REPOSITORY / "data" / "sample" / "news-1.parquet"
JSON = "application/json"
MOST_PER_S = 6000  # requests that are made beforehand
MOST_WAIT_MS = 1000 * Limits.max_wait_s
SLOW_PIECES = 10
WHOLE = 10_000


def request_bytes(path: str, body: bytes, kind: str = JSON) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nhost: load\r\ncontent-type: {kind}\r\n"
    return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body


class Articles:
    """Texts that differ from the first word on."""

    def __init__(self) -> None:
        self._texts: list[str] = pq.read_table(SAMPLE)["text"].to_pylist()
        self._number = itertools.count(time.time_ns() % 10**9)

    def one(self, words: int) -> str:
        number = next(self._number)
        text = self._texts[number % len(self._texts)]
        return " ".join([str(number), *text.split()[:words]])

    def requests(self, words: int, count: int) -> Iterator[bytes]:
        """Made beforehand: the client should cost little while it measures."""
        bodies = (json.dumps({"text": self.one(words)}).encode() for _ in range(count))
        return iter([request_bytes("/invocations", body) for body in bodies])


@dataclass
class Tally:
    """What a phase saw."""

    ms: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)
    seconds: float = 0.0
    cpu_s: float = 0.0

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(
            self.ms + other.ms,
            self.statuses + other.statuses,
            self.seconds + other.seconds,
            self.cpu_s + other.cpu_s,
        )

    @property
    def per_s(self) -> float:
        return len(self.ms) / self.seconds

    def as_dict(self) -> dict[str, Any]:
        cuts = statistics.quantiles(self.ms, n=100)
        return {
            "per_s": round(self.per_s, 1),
            "p50_ms": round(cuts[49], 2),
            "p99_ms": round(cuts[98], 2),
            "server_cpu_ms": round(1000 * self.cpu_s / len(self.ms), 3),
            "statuses": {str(status): n for status, n in sorted(self.statuses.items())},
        }


class Connection(asyncio.Protocol):
    """Sends a request when it is told to; answers come whole to `on_answer`."""

    def __init__(self, on_answer: Callable[["Connection", int], None]) -> None:
        self._on_answer = on_answer
        self._received = b""
        self._transport: Any = None
        self.began = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def send(self, request: bytes, began: float) -> None:
        self.began = began
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, found, content = self._received.partition(b"\r\n\r\n")
        if not found:
            return
        length = re.search(rb"content-length: (\d+)", head)
        if length and len(content) >= int(length.group(1)):
            self._received = b""
            self._on_answer(self, int(head[9:12]))

    def close(self) -> None:
        self._transport.close()


async def connections(
    port: int, count: int, on_answer: Callable[[Connection, int], None]
) -> list[Connection]:
    loop = asyncio.get_running_loop()
    opened = []
    for _ in range(count):
        _, connection = await loop.create_connection(
            lambda: Connection(on_answer), "127.0.0.1", port
        )
        opened.append(connection)
    return opened


async def closed_loop(port: int, requests: Iterator[bytes], count: int, seconds: float) -> Tally:
    """Each connection sends its next article when it has the answer to the last."""
    tally = Tally()
    done = asyncio.Event()
    open_requests = count
    began = time.perf_counter()
    end = began + seconds

    def on_answer(connection: Connection, status: int) -> None:
        nonlocal open_requests
        now = time.perf_counter()
        tally.statuses[status] += 1
        tally.ms.append(1000 * (now - connection.began))
        request = next(requests, None) if now < end else None
        if request is not None:
            connection.send(request, now)
            return
        open_requests -= 1
        if not open_requests:
            done.set()

    opened = await connections(port, count, on_answer)
    for connection in opened:
        connection.send(next(requests), time.perf_counter())
    await done.wait()
    tally.seconds = time.perf_counter() - began
    for connection in opened:
        connection.close()
    return tally


async def open_loop(
    port: int, requests: Iterator[bytes], rate: float, count: int, seconds: float
) -> Tally:
    """Articles arrive at random moments, whether or not those before were answered.

    The time of one counts from its moment, also where all connections were taken.
    """
    tally = Tally()
    chance = random.Random(0)
    waiting: deque[float] = deque()
    all_free = asyncio.Event()

    def on_answer(connection: Connection, status: int) -> None:
        now = time.perf_counter()
        tally.statuses[status] += 1
        tally.ms.append(1000 * (now - connection.began))
        if waiting:
            connection.send(next(requests), waiting.popleft())
        else:
            free.append(connection)
            if len(free) == count:
                all_free.set()

    opened = await connections(port, count, on_answer)
    free = list(opened)
    began = moment = time.perf_counter()
    while moment < began + seconds:
        moment += chance.expovariate(rate)
        await asyncio.sleep(max(0.0, moment - time.perf_counter()))
        all_free.clear()
        if free:
            free.pop().send(next(requests), moment)
        else:
            waiting.append(moment)
    if len(free) < count:
        await all_free.wait()
    tally.seconds = time.perf_counter() - began
    for connection in opened:
        connection.close()
    return tally


@dataclass(frozen=True)
class Target:
    """A server under load, and what it has cost."""

    port: int
    process: psutil.Process

    def measure(self, phase: Awaitable[Tally]) -> Tally:
        before = self.cpu_s
        gc.collect()
        gc.disable()
        tally = asyncio.run(_as_coroutine(phase))
        gc.enable()
        tally.cpu_s = self.cpu_s - before
        return tally

    @property
    def cpu_s(self) -> float:
        times = self.process.cpu_times()
        return times.user + times.system

    @property
    def resident_mib(self) -> float:
        return self.process.memory_info().rss / 2**20


async def _as_coroutine(phase: Awaitable[Tally]) -> Tally:
    return await phase


@contextmanager
def ours(options: argparse.Namespace, *more: str) -> Iterator[tuple[Target, Server]]:
    with tempfile.TemporaryDirectory() as folder:
        env = {"OMP_NUM_THREADS": str(options.threads)}
        with running(Path(folder) / "log", "--model", options.model, *more, env=env) as server:
            yield Target(server.port, child_of(server.process.pid)), server


@contextmanager
def plain(options: argparse.Namespace) -> Iterator[Target]:
    port = free_port()
    command = [sys.executable, str(Path(__file__).with_name("plain_serve.py"))]
    process = subprocess.Popen(
        [*command, "--model", str(options.model), "--port", str(port)],
        env=servers.clean_environment({"OMP_NUM_THREADS": str(options.threads)}),
    )
    try:
        server = Server(process, Path(os.devnull), port)
        wait_until(lambda: is_ready(server), "the plain server", 60)
        yield Target(port, psutil.Process(process.pid))
    finally:
        process.kill()
        process.wait()


def child_of(number: int) -> psutil.Process:
    """The server itself, where a process stands before it that ends it with its parent."""
    process = psutil.Process(number)
    return max([process, *process.children(recursive=True)], key=lambda p: p.memory_info().rss)


def throughput(options: argparse.Namespace) -> dict[str, Any]:
    articles = Articles()
    result: dict[str, Any] = {}
    with ExitStack() as stack:
        batched, _ = stack.enter_context(ours(options))
        unbatched, _ = stack.enter_context(ours(options, "--max-batch-tokens", "1"))
        peer = stack.enter_context(plain(options))
        ways = {
            "batched": (batched, options.connections),
            "alone": (batched, 1),
            "unbatched": (unbatched, options.connections),
            "plain": (peer, options.connections),
        }
        for words in options.words:
            runs: dict[str, list[Tally]] = {way: [] for way in ways}
            for turn in range(options.repeats + 1):
                for way, (target, count) in ways.items():
                    requests = articles.requests(words, int(MOST_PER_S * options.seconds))
                    tally = target.measure(
                        closed_loop(target.port, requests, count, options.seconds)
                    )
                    if turn:  # the first one warms up
                        runs[way].append(tally)
            result[name_of(words)] = compare(runs)
    return result


def compare(runs: dict[str, list[Tally]]) -> dict[str, Any]:
    found: dict[str, Any] = {way: sum(turns[1:], turns[0]).as_dict() for way, turns in runs.items()}
    for way, turns in runs.items():
        found[way]["runs_per_s"] = [round(turn.per_s, 1) for turn in turns]
    for way in ("alone", "unbatched", "plain"):
        ratios = [
            one.per_s / other.per_s for one, other in zip(runs["batched"], runs[way], strict=True)
        ]
        found[f"times_{way}"] = round(statistics.median(ratios), 2)
    return found


def latency(options: argparse.Namespace) -> dict[str, Any]:
    """`saturated` is what a closed loop reaches; half of it is offered at random moments."""
    articles = Articles()
    result: dict[str, Any] = {}
    with ours(options) as (target, server):
        for words in options.words:
            count = options.connections

            def closed(number: int, seconds: float, words: int = words) -> Tally:
                requests = articles.requests(words, int(MOST_PER_S * seconds))
                return target.measure(closed_loop(target.port, requests, number, seconds))

            closed(count, options.seconds)  # warm
            turns = []
            for _ in range(options.repeats):
                alone = closed(1, options.seconds)
                saturated = closed(count, options.seconds)
                rate = saturated.per_s / 2
                offered = articles.requests(words, int(4 * rate * options.seconds))
                buckets = request_buckets(server)
                half = target.measure(
                    open_loop(target.port, offered, rate, count, 2 * options.seconds)
                )
                single_ms = statistics.median(alone.ms)
                turns.append(
                    {
                        "alone_ms": round(single_ms, 2),
                        "saturated_per_s": round(saturated.per_s, 1),
                        "half": half.as_dict(),
                        "server_p99_at_most_ms": p99_bucket(buckets, request_buckets(server)),
                        "goal_ms": round(MOST_WAIT_MS + 3 * single_ms, 2),
                        "load_average": round(os.getloadavg()[0], 1),
                    }
                )
            result[name_of(words)] = turns
    return result


def model(options: argparse.Namespace) -> dict[str, Any]:
    articles = Articles()
    classifier = ServedClassifier(ModelSettings(options.model), 0.0)
    classifier.warm_up()

    def per_s(words: int, count: int) -> float:
        rows = 0
        passed = 0.0
        while passed < options.seconds:
            texts = [articles.one(words) for _ in range(count)]
            began = time.perf_counter()
            classifier.predict(texts)
            passed += time.perf_counter() - began
            rows += count
        return rows / passed

    result: dict[str, Any] = {}
    for words in options.words:
        counts = (1, options.connections)
        runs = [[per_s(words, count) for count in counts] for _ in range(options.repeats + 1)][1:]
        result[name_of(words)] = {
            "one_per_s": round(statistics.median(one for one, _ in runs), 1),
            "many_per_s": round(statistics.median(many for _, many in runs), 1),
            "times_one": round(statistics.median(many / one for one, many in runs), 2),
        }
    return result


def request_buckets(server: Server) -> dict[float, float]:
    """Seconds -> answers to /invocations that took no longer."""
    text = server.ask("GET", "/metrics").body.decode()
    pattern = r'^batchclf_request_seconds_bucket\{le="(\S+)",route="/invocations"\} (\S+)$'
    return {float(le): float(count) for le, count in re.findall(pattern, text, re.MULTILINE)}


def p99_bucket(before: dict[float, float], after: dict[float, float]) -> float:
    """The bound of the server's own histogram, in ms, under which 99% of its answers took."""
    counts = {le: count - before.get(le, 0.0) for le, count in after.items()}
    total = counts[float("inf")]
    return 1000 * min(le for le, count in counts.items() if count >= 0.99 * total)


@dataclass
class Mixed:
    """All kinds of clients at once, and what was not as it should be."""

    port: int
    end: float
    articles: Articles
    answered: Counter[str] = field(default_factory=Counter)
    wrong: Counter[str] = field(default_factory=Counter)
    ms: list[float] = field(default_factory=list)

    def requests(self, chance: random.Random) -> Iterator[tuple[str, bytes, str, int]]:
        """Kinds, bodies, their types, and the status that each should have."""
        while True:
            texts = [self.articles.one(WHOLE) for _ in range(chance.randint(2, 20))]
            file = io.BytesIO()
            pq.write_table(pa.table({"text": texts}), file)
            rows = [{"text": text} for text in texts]
            lines = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
            csv = "text\n" + "".join(f'"{text.replace(chr(34), chr(34) * 2)}"\n' for text in texts)
            for words in (10, 40, WHOLE, WHOLE):
                body = json.dumps({"text": self.articles.one(words)}).encode()
                yield "article", body, JSON, 200
            yield "list", json.dumps(rows).encode(), JSON, 200
            yield "instances", json.dumps({"instances": rows}).encode(), JSON, 200
            yield "lines", lines, "application/jsonlines", 200
            yield "csv", csv.encode(), "text/csv", 200
            yield "parquet", file.getvalue(), "application/vnd.apache.parquet", 200
            yield "empty text", b'{"text": ""}', JSON, 422
            yield "not json", b'{"text": ', JSON, 400
            yield "not parquet", b"PAR1 no PAR1", "application/vnd.apache.parquet", 400
            yield "unknown type", b"<text/>", "text/xml", 415

    async def usual(self, number: int, pause_s: float) -> None:
        """One connection that is kept, one request after the other."""
        chance = random.Random(number)
        requests = self.requests(chance)
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=1 << 26)
        while time.monotonic() < self.end:
            kind, body, media, wanted = next(requests)
            began = time.perf_counter()
            writer.write(request_bytes("/invocations", body, media))
            self.note(kind, await read_answer(reader), wanted)
            self.ms.append(1000 * (time.perf_counter() - began))
            await asyncio.sleep(chance.expovariate(1 / pause_s))
        writer.close()

    async def slow(self) -> None:
        """Sends its body in pieces, a second long in all."""
        while time.monotonic() < self.end:
            body = json.dumps({"text": self.articles.one(WHOLE)}).encode()
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
            request = request_bytes("/invocations", body)
            step = -(-len(request) // SLOW_PIECES)
            for start in range(0, len(request), step):
                writer.write(request[start : start + step])
                await asyncio.sleep(1 / SLOW_PIECES)
            self.note("slow", await read_answer(reader), 200)
            writer.close()

    async def leaving(self, number: int) -> None:
        """Goes away in its body, or before its answer."""
        chance = random.Random(number)
        while time.monotonic() < self.end:
            texts = [self.articles.one(WHOLE) for _ in range(50)]
            request = request_bytes("/invocations", json.dumps(texts).encode())
            _, writer = await asyncio.open_connection("127.0.0.1", self.port)
            writer.write(request if chance.random() < 0.5 else request[:-10])
            await writer.drain()
            await asyncio.sleep(chance.random() / 20)
            writer.transport.abort()
            self.answered["left"] += 1
            await asyncio.sleep(chance.random())

    async def ping(self) -> None:
        while time.monotonic() < self.end:
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
            writer.write(b"GET /ping HTTP/1.1\r\nhost: load\r\n\r\n")
            self.note("ping", await read_answer(reader), 200)
            writer.close()
            await asyncio.sleep(0.5)

    def note(self, kind: str, status: int, wanted: int) -> None:
        self.answered[kind] += 1
        if status != wanted:
            self.wrong[f"{kind}: {status} instead of {wanted}"] += 1


async def read_answer(reader: asyncio.StreamReader) -> int:
    head = await reader.readuntil(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head)
    await reader.readexactly(int(length.group(1)) if length else 0)
    return int(head[9:12])


def mixed(options: argparse.Namespace) -> dict[str, Any]:
    resident: list[float] = []
    with ours(options) as (target, server):
        load = Mixed(target.port, time.monotonic() + options.seconds, Articles())

        async def watch() -> None:
            while time.monotonic() < load.end:
                await asyncio.sleep(options.seconds / 20)
                resident.append(round(target.resident_mib, 1))

        async def run() -> None:
            usual = (load.usual(n, options.pause_ms / 1000) for n in range(options.connections))
            others = (*(load.slow() for _ in range(4)), *(load.leaving(n) for n in range(2)))
            await asyncio.gather(*usual, *others, load.ping(), watch())

        before = target.cpu_s
        asyncio.run(run())
        cpu_s = target.cpu_s - before
        left = server.metric('batchclf_requests_total{route="/invocations",status="499"}')
        waiting = server.metric("batchclf_waiting_rows"), server.metric("batchclf_body_bytes")
        files = server.metric("process_open_fds")
        code = server.stop()
    cuts = statistics.quantiles(load.ms, n=100)
    minute = resident[min(len(resident) - 1, max(0, round(20 * 60 / options.seconds) - 1))]
    return {
        "seconds": options.seconds,
        "connections": options.connections,
        "answered": dict(sorted(load.answered.items())),
        "wrong": dict(load.wrong),
        "left_before_their_answer": int(left),
        "p50_ms": round(cuts[49], 2),
        "p99_ms": round(cuts[98], 2),
        "server_cpu_s": round(cpu_s, 1),
        "resident_mib": resident,
        "resident_mib_after_a_minute": minute,
        "resident_mib_at_the_end": resident[-1],
        "waiting_rows_and_body_bytes_at_the_end": waiting,
        "open_files_at_the_end": int(files),
        "exit_code": code,
    }


def name_of(words: int) -> str:
    return "whole" if words == WHOLE else f"{words}_words"


def number_of_words(value: str) -> int:
    return WHOLE if value == "whole" else int(value)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("phase", choices=("throughput", "latency", "mixed", "model"))
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--connections", type=int, help="[default: 64; of mixed 12]")
    parser.add_argument("--seconds", type=float, help="of a phase [default: 2; of mixed 60]")
    parser.add_argument("--repeats", type=int, default=3, help="the median counts")
    parser.add_argument(
        "--words",
        type=number_of_words,
        nargs="+",
        default=[10, 40, WHOLE],
        help="of each article, at most; or: whole",
    )
    parser.add_argument("--pause-ms", type=float, default=50.0, help="of a client of `mixed`")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each server")
    parser.add_argument("--json", type=Path, help="a file to put the result into, beside others")
    options = parser.parse_args(arguments)
    is_mixed = options.phase == "mixed"
    options.connections = options.connections or (12 if is_mixed else 64)
    options.seconds = options.seconds or (60.0 if is_mixed else 2.0)
    phases = {"throughput": throughput, "latency": latency, "mixed": mixed, "model": model}
    found = {
        "connections": options.connections,
        "threads": options.threads,
        "load_average_before": round(os.getloadavg()[0], 1),
        **phases[options.phase](options),
        "machine": _machine(),
    }
    print(json.dumps({options.phase: found}))
    if options.json:
        old = json.loads(options.json.read_text()) if options.json.exists() else {}
        options.json.write_text(json.dumps(old | {options.phase: found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
