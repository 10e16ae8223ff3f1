"""Throughput: what one worker moves from a queue, next to what the server itself can give.

    python tests/queue_throughput.py --server moto --articles 20000 --json moto.json

Four measurements, each from a queue with the same articles in it:

- `bare`: a loop of boto3 that receives and deletes in batches of ten, on as many threads as give
  most. A worker that comes near it is held up by the server.
- `tiny`: a worker whose model is so small that it costs next to nothing; and how many messages it
  and the server move in a second of their own processor time, less what it takes to start.
- `small`: a worker with data/models/bbc-small, next to `classify` of the same articles from a file.
  What the queue adds is told in three ways: as the share of the worker's processor time, less what
  it takes to start, that its threads for the queue spend (`cpu_share`); as the share of its time
  that the file does not cost, with the server on one core and worker and `classify` each alone on
  another (`pinned`); and likewise where all share all cores (`queue_share`), where the server takes
  its part.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import servers
from fault_proxy import FaultProxy
from fault_rules import Fault, Forward, Match
from faults.inputs import articles, as_jsonl
from faults.places import LocalPlace
from faults.queues import article_messages
from servers import Endpoint, Queue
from soak import REPOSITORY, batchclf, started_server

BARE_THREADS = (1, 2, 4, 8)
SEND_THREADS = 4
PARTS = 12  # short texts that make a long one
GATHER_S = 2.0
NUM_LATENCIES = 5
START_S = 120.0
POLL_S = 0.02
SMALL_MODEL = REPOSITORY / "data" / "models" / "bbc-small"
# Threads that do what a file would not need: receive and parse, extend, delete, gather.
QUEUE_THREADS = ("receive", "heartbeat", "extend", "settle", "fetch")
SETTINGS = ("--dtype", "float32", "--log-format", "json")


def long_articles(count: int) -> pa.Table:
    """About as long as news: 150 words."""
    texts = articles(count * PARTS, seed=1)["text"].to_pylist()
    return pa.table(
        {
            "id": [str(number) for number in range(count)],
            "text": [" ".join(texts[row * PARTS : (row + 1) * PARTS]) for row in range(count)],
        }
    )


def send_all(queue: Queue, bodies: list[str]) -> list[str]:
    """Message ids in the order of the bodies."""
    step = servers.SQS_BATCH * 10
    parts = [bodies[first : first + step] for first in range(0, len(bodies), step)]
    queue.backlog()  # boto3 makes its client on one thread
    with ThreadPoolExecutor(SEND_THREADS) as pool:
        return [name for part in pool.map(lambda part: queue.send(*part), parts) for name in part]


def bare_loop(queue: Queue, count: int, num_threads: int) -> float:
    """Messages a second."""
    left = count
    lock = threading.Lock()
    sqs = queue.endpoint.sqs_client(max_pool_connections=num_threads)

    def drain() -> None:
        nonlocal left
        while left > 0:
            found = sqs.receive_message(
                QueueUrl=queue.url, MaxNumberOfMessages=servers.SQS_BATCH, WaitTimeSeconds=1
            ).get("Messages", [])
            if not found:
                continue
            sqs.delete_message_batch(
                QueueUrl=queue.url,
                Entries=[
                    {"Id": str(number), "ReceiptHandle": message["ReceiptHandle"]}
                    for number, message in enumerate(found)
                ],
            )
            with lock:
                left -= len(found)

    threads = [threading.Thread(target=drain) for _ in range(num_threads)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return count / (time.perf_counter() - began)


def cpu_s() -> tuple[float, float]:
    """Seconds of processor time: of the server, and of all programs that have ended."""
    (server,) = psutil.Process().children()
    times, ended = server.cpu_times(), resource.getrusage(resource.RUSAGE_CHILDREN)
    return times.user + times.system, ended.ru_utime + ended.ru_stime


@contextmanager
def pinned(core: int) -> Iterator[None]:
    """What is started here runs on that core alone."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def pin_server(core: int) -> None:
    """All its threads; those that it starts later follow."""
    (server,) = psutil.Process().children()
    for thread in server.threads():
        os.sched_setaffinity(thread.id, {core})


def with_worker(endpoint: Endpoint, queue: Queue, model: Path, *args: str) -> dict[str, Any]:
    """What a worker says at its end, and the processor time that it and the server took."""
    before = cpu_s()
    with servers.fresh_bucket(endpoint) as bucket, tempfile.TemporaryDirectory() as folder:
        account = Path(folder) / "threads.json"
        ended = subprocess.run(
            servers.tethered(
                [
                    *(sys.executable, REPOSITORY / "tests" / "cpu_by_thread.py", account),
                    *("work", "--queue", queue.url, "--model", model),
                    *("--output", f"s3://{bucket}/out", *SETTINGS, *args),
                ]
            ),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env=servers.clean_environment({**endpoint.env, "OMP_NUM_THREADS": "1"}),
            check=False,
        )
        if ended.returncode:
            raise SystemExit(f"work: {ended.stderr}")
        by_thread: dict[str, float] = json.loads(account.read_text())
    server_s, worker_s = (round(b - a, 2) for a, b in zip(before, cpu_s(), strict=True))
    said: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    queue_s = round(sum(by_thread.get(name, 0.0) for name in QUEUE_THREADS), 3)
    return said | {"cpu_s": {"server": server_s, "worker": worker_s, "queue": queue_s}}


def latencies(endpoint: Endpoint, queue: Queue) -> list[float]:
    """Seconds until an article sent to an idle worker is labelled and its message deleted."""
    found: list[float] = []
    with servers.fresh_bucket(endpoint) as bucket, FaultProxy(endpoint.endpoint_url) as proxy:
        polls = proxy.add(Fault(Match(operation="ReceiveMessage"), Forward()))
        worker = subprocess.Popen(
            servers.tethered(
                [
                    *(servers.script("batchclf"), "work", "--queue", queue.url),
                    *("--model", SMALL_MODEL, "--output", f"s3://{bucket}/out"),
                    *("--gather-seconds", str(GATHER_S), *SETTINGS),
                ]
            ),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=servers.clean_environment(
                {**Endpoint(proxy.endpoint_url).env, "OMP_NUM_THREADS": "1"}
            ),
        )
        try:
            for body in article_messages(articles(NUM_LATENCIES)):
                proxy.wait_for(polls, START_S, times=proxy.hits(polls) + 1)
                began = time.perf_counter()
                queue.send(body)
                while queue.backlog().total:
                    time.sleep(POLL_S)
                found.append(round(time.perf_counter() - began, 2))
        finally:
            worker.terminate()
            worker.wait()
    return found


def with_file(table: pa.Table, folder: Path, model: Path) -> dict[str, Any]:
    """What `classify` says of the same articles."""
    place = LocalPlace(folder)
    source = place.write("articles.jsonl", as_jsonl(table))
    ended = batchclf(
        "classify", source, "--model", model, "--output", place.output, *SETTINGS, env={}
    )
    if ended.returncode:
        raise SystemExit(f"classify: {ended.stderr}")
    return dict(json.loads(ended.stdout))


def measure(server: str, num_articles: int, num_small: int, folder: Path) -> dict[str, Any]:
    from models import make_hf_checkpoint

    tiny = make_hf_checkpoint(folder / "tiny", hidden=16, layers=1)
    bodies = article_messages(articles(num_articles))
    small = long_articles(num_small)
    found: dict[str, Any] = {
        "server": server,
        "num_articles": num_articles,
        "cores": os.cpu_count(),
    }
    with ExitStack() as stack:
        endpoint = stack.enter_context(started_server(server, folder))
        bare = {}
        for num_threads in BARE_THREADS:
            with servers.fresh_queue(endpoint) as queue:
                send_all(queue, bodies)
                bare[num_threads] = round(bare_loop(queue, num_articles, num_threads), 1)
        with servers.fresh_queue(endpoint) as queue:
            idle = with_worker(endpoint, queue, tiny, "--idle-exit", "0")
            send_all(queue, bodies)
            worker = with_worker(endpoint, queue, tiny, "--max-messages", str(num_articles))
        found["bare"] = {"messages_per_s_by_threads": bare, "best": max(bare.values())}
        spent = {who: worker["cpu_s"][who] - idle["cpu_s"][who] for who in worker["cpu_s"]}
        found["tiny"] = summary(worker) | {
            "share_of_bare": round(worker["articles_per_s"] / max(bare.values()), 3),
            "messages_per_cpu_s": {w: round(num_articles / s, 1) for w, s in spent.items()},
        }
        with servers.fresh_queue(endpoint) as queue:
            idle_s = with_worker(endpoint, queue, SMALL_MODEL, "--idle-exit", "0")["cpu_s"]
            found["latency"] = {"gather_s": GATHER_S, "seconds": latencies(endpoint, queue)}
        worker = from_queue(endpoint, small)
        file = with_file(small, folder / "file", SMALL_MODEL)
        spent_s = worker["cpu_s"]["worker"] - idle_s["worker"]
        found["small"] = {
            "num_articles": num_small,
            "worker": summary(worker),
            "classify": summary(file),
            "cpu_share": round(worker["cpu_s"]["queue"] / spent_s, 3),
            "queue_share": queue_share(worker, file),
        }
        cores = sorted(os.sched_getaffinity(0))
        if len(cores) > 1:
            pin_server(cores[0])
            with pinned(cores[1]):
                worker = from_queue(endpoint, small)
                file = with_file(small, folder / "pinned", SMALL_MODEL)
            found["small"]["pinned"] = {
                "worker": summary(worker),
                "classify": summary(file),
                "queue_share": queue_share(worker, file),
            }
    return found


def from_queue(endpoint: Endpoint, table: pa.Table) -> dict[str, Any]:
    """What a worker with the small model says that takes all articles from a queue."""
    with servers.fresh_queue(endpoint) as queue:
        send_all(queue, article_messages(table))
        return with_worker(endpoint, queue, SMALL_MODEL, "--max-messages", str(table.num_rows))


def queue_share(worker: dict[str, Any], file: dict[str, Any]) -> float:
    """Share of the worker's time that `classify` did not need."""
    return round(1 - worker["articles_per_s"] / file["articles_per_s"], 3)


def summary(said: dict[str, Any]) -> dict[str, Any]:
    return {key: said[key] for key in ("articles_per_s", "seconds", "busy", "cpu_s") if key in said}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--server", choices=["moto", "ministack"], default="moto")
    parser.add_argument("--articles", type=int, default=20_000, help="through the tiny model")
    parser.add_argument("--small", type=int, default=10_000, help="through the small model")
    parser.add_argument("--json", type=Path, metavar="FILE")
    asked = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="throughput-"))
    text = json.dumps(measure(asked.server, asked.articles, asked.small, folder), indent=1)
    print(text)
    if asked.json:
        asked.json.write_text(f"{text}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
