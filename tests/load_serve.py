"""Load on a running `batchclf serve`, from one asyncio client; prints one JSON object.

    batchclf serve --model data/models/bbc-small --port 8080
    python tests/load_serve.py --url http://127.0.0.1:8080 --seconds 10 --mixed-seconds 600

Four phases, each with articles of which no two are equal (equal ones would be computed once):

    alone       one connection, one article at a time
    saturated   many connections, each one article at a time
    half        articles at random moments, half as many a second as `saturated` answered
    mixed       articles, lists, CSV, Parquet and broken bodies from many connections
"""

import argparse
import asyncio
import io
import itertools
import json
import random
import re
import statistics
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.parquet as pq

SAMPLE = Path(__file__).resolve().parents[1] / "data" / "sample" / "news-1.parquet"
JSON = "application/json"
CONNECT_DEADLINE_S = 30.0


@dataclass
class Tally:
    """What a phase saw: milliseconds of good answers, statuses of all."""

    ms: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)
    seconds: float = 0.0

    def as_dict(self) -> dict[str, object]:
        cuts = statistics.quantiles(self.ms, n=100) if len(self.ms) > 1 else [0.0] * 99
        return {
            "requests_per_s": round(sum(self.statuses.values()) / max(self.seconds, 1e-9), 1),
            "p50_ms": round(cuts[49], 2),
            "p99_ms": round(cuts[98], 2),
            "most_ms": round(max(self.ms, default=0.0), 2),
            "statuses": {str(status): n for status, n in sorted(self.statuses.items())},
        }


class Connection:
    """One HTTP/1.1 connection that is kept open, and opened again where the server closes it."""

    def __init__(self, host: str | None, port: int | None) -> None:
        self._host, self._port = host, port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def request(
        self, method: str, path: str, body: bytes = b"", kind: str = JSON
    ) -> tuple[int, bytes]:
        if self._streams is None:
            opening = asyncio.open_connection(self._host, self._port, limit=1 << 26)
            self._streams = await asyncio.wait_for(opening, CONNECT_DEADLINE_S)
        reader, writer = self._streams
        head = (
            f"{method} {path} HTTP/1.1\r\nhost: load\r\ncontent-type: {kind}\r\n"
            f"content-length: {len(body)}\r\n\r\n"
        )
        writer.write(head.encode() + body)
        answer = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
        length = re.search(r"content-length: (\d+)", answer)
        content = await reader.readexactly(int(length.group(1)) if length else 0)
        if "connection: close" in answer:
            self.close()
        return int(answer.split(" ", 2)[1]), content

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
        self._streams = None


class Target:
    """The server under load."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._host, self._port = parts.hostname, parts.port

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[Connection]:
        opened = Connection(self._host, self._port)
        try:
            yield opened
        finally:
            opened.close()

    async def metric(self, name: str) -> float:
        async with self.connection() as connection:
            _, content = await connection.request("GET", "/metrics")
        found = re.search(rf"^{name} (\S+)$", content.decode(), re.MULTILINE)
        return float(found.group(1)) if found else 0.0


def unequal_articles(words: int) -> Iterator[bytes]:
    """Bodies with one article each, cut to so many words, that differ from the first word on."""
    texts = pq.read_table(SAMPLE)["text"].to_pylist()
    for number in itertools.count():
        text = " ".join(texts[number % len(texts)].split()[:words])
        yield json.dumps({"text": f"{number} {text}"}).encode()


async def closed_loop(
    target: Target, bodies: Iterator[bytes], num_connections: int, seconds: float
) -> Tally:
    """Each connection sends its next article when it has the answer to the last."""
    tally = Tally()
    end = time.perf_counter() + seconds

    async def client() -> None:
        async with target.connection() as connection:
            while time.perf_counter() < end:
                await timed(tally, connection, next(bodies))

    await run_clients(tally, client, num_connections)
    return tally


async def timed(tally: Tally, connection: Connection, body: bytes) -> None:
    began = time.perf_counter()
    status, _ = await connection.request("POST", "/invocations", body)
    tally.statuses[status] += 1
    if status == 200:
        tally.ms.append(1000 * (time.perf_counter() - began))


async def run_clients(tally: Tally, client: Callable[[], Awaitable[None]], count: int) -> None:
    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(count)))
    tally.seconds = time.perf_counter() - began


async def open_loop(
    target: Target, bodies: Iterator[bytes], rate: float, seconds: float, num_connections: int
) -> Tally:
    """Articles arrive at random moments, whether or not those before were answered.

    The time of one counts from its moment, also where all connections were taken.
    """
    tally = Tally()
    arrivals: asyncio.Queue[float | None] = asyncio.Queue()
    chance = random.Random(0)

    async def arrive() -> None:
        began = moment = time.perf_counter()
        while moment < began + seconds:
            moment += chance.expovariate(rate)
            await asyncio.sleep(max(0.0, moment - time.perf_counter()))
            arrivals.put_nowait(moment)
        for _ in range(num_connections):
            arrivals.put_nowait(None)

    async def client() -> None:
        async with target.connection() as connection:
            while (moment := await arrivals.get()) is not None:
                status, _ = await connection.request("POST", "/invocations", next(bodies))
                tally.statuses[status] += 1
                tally.ms.append(1000 * (time.perf_counter() - moment))

    arriving = asyncio.create_task(arrive())
    await run_clients(tally, client, num_connections)
    await arriving
    return tally


def mixed_requests(bodies: Iterator[bytes]) -> Iterator[tuple[bytes, str, int]]:
    """Bodies, their types, and the status that each should have."""
    chance = random.Random(1)
    while True:
        texts = [json.loads(next(bodies))["text"] for _ in range(chance.randint(2, 20))]
        file = io.BytesIO()
        pq.write_table(pa.table({"text": texts}), file)
        lines = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)
        csv = "text\n" + "".join(f'"{text.replace(chr(34), chr(34) * 2)}"\n' for text in texts)
        yield from (
            *((next(bodies), JSON, 200) for _ in range(10)),
            (json.dumps([{"text": text} for text in texts]).encode(), JSON, 200),
            (json.dumps({"instances": [{"text": text} for text in texts]}).encode(), JSON, 200),
            (lines, "application/jsonlines", 200),
            (csv.encode(), "text/csv", 200),
            (file.getvalue(), "application/vnd.apache.parquet", 200),
            (b'{"text": ""}', JSON, 422),
            (b'{"text": ', JSON, 400),
            (b"<text/>", "text/xml", 415),
        )


async def mixed(target: Target, bodies: Iterator[bytes], count: int, seconds: float) -> dict:
    """All kinds of requests; counts answers that are not what they should be, and memory."""
    tally = Tally()
    wrong: Counter[str] = Counter()
    requests = mixed_requests(bodies)
    end = time.perf_counter() + seconds
    resident: list[int] = []

    async def client() -> None:
        async with target.connection() as connection:
            while time.perf_counter() < end:
                body, kind, wanted = next(requests)
                began = time.perf_counter()
                status, _ = await connection.request("POST", "/invocations", body, kind)
                tally.statuses[status] += 1
                tally.ms.append(1000 * (time.perf_counter() - began))
                if status != wanted:
                    wrong[f"{kind}: {status} instead of {wanted}"] += 1

    async def watch() -> None:
        while time.perf_counter() < end:
            resident.append(int(await target.metric("process_resident_memory_bytes")) >> 20)
            await asyncio.sleep(seconds / 20)

    watching = asyncio.create_task(watch())
    await run_clients(tally, client, count)
    await watching
    return tally.as_dict() | {"wrong": dict(wrong), "resident_mib": resident}


async def run(options: argparse.Namespace) -> dict[str, object]:
    target = Target(options.url)
    bodies = unequal_articles(options.words)
    await closed_loop(target, bodies, options.connections, options.seconds / 5)  # warm
    alone = await closed_loop(target, bodies, 1, options.seconds)
    before = await target.metric("batchclf_batch_rows_count")
    saturated = await closed_loop(target, bodies, options.connections, options.seconds)
    batches = await target.metric("batchclf_batch_rows_count") - before
    rates = [sum(t.statuses.values()) / t.seconds for t in (alone, saturated)]
    half = await open_loop(target, bodies, rates[1] / 2, options.seconds, options.connections)
    result: dict[str, object] = {
        "words": options.words,
        "connections": options.connections,
        "seconds": options.seconds,
        "alone": alone.as_dict(),
        "saturated": saturated.as_dict()
        | {"rows_per_batch": round(sum(saturated.statuses.values()) / max(batches, 1), 1)},
        "half": half.as_dict(),
        "speedup": round(rates[1] / rates[0], 2),
    }
    if options.mixed_seconds:
        result["mixed"] = await mixed(target, bodies, options.connections, options.mixed_seconds)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", required=True)
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each of three phases")
    parser.add_argument("--mixed-seconds", type=float, default=0.0)
    parser.add_argument("--words", type=int, default=10_000, help="of each article, at most")
    print(json.dumps(asyncio.run(run(parser.parse_args()))))


if __name__ == "__main__":
    main()
