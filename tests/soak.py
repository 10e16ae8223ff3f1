"""Soak: workers that are killed, told to stop and lied to by the wire, until a queue is empty.

    python tests/soak.py --articles 20000 --shards 200 --workers 3 --server moto --json soak.json

Every few seconds a worker gets SIGKILL or SIGTERM and another takes its place, and 2% of all calls
of S3 and SQS meet a 503, a reset connection, a lost reply or a delay. In the end every row of every
shard must be there once, every article at least once and once by `message_id`, with the labels that
an undisturbed `classify` gives; the dead-letter queue must hold the poison and nothing else, and
the bucket nothing that nobody reads. Exit status 1 says that something was not so.
"""

import argparse
import io
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import servers
from fault_proxy import FaultProxy
from fault_rules import Delay, Fault, LoseReply, Match, Reset, Status
from faults.inputs import articles, as_csv, as_parquet
from faults.places import LocalPlace, S3Place, labels_of
from faults.queues import JUNK, ReceiveSpy, article_messages
from servers import Endpoint, Queue

REPOSITORY = Path(__file__).resolve().parents[1]
ROWS_PER_SHARD = 20
SHARDS_PER_FILE = 10
ARTICLE_SEED = 1 << 20  # no file of shards has it
POLL_S = 0.5
FEED_S = 0.1
EMPTY_POLLS = 4  # in a row until the queue counts as empty
STOP_S = 30.0  # the contract's, from SIGTERM to the end
COMMAND_S = 300.0
# Of a worker; anything else is a failure. SIGTERM itself ends one that is not yet further than the
# start of Python.
ENDS = {75, -signal.SIGKILL, -signal.SIGTERM}
# For each message that moto hands out it counts all that it holds, several times over
# (is_message_valid_based_on_retention_period in moto/sqs/models.py).
HELD: dict[str, Any] = {
    "moto": {"gather_rows": 25, "most_held": 100},
    "ministack": {"gather_rows": 200, "most_held": 4000},
}
SETTINGS = ("--dtype", "float32", "--log-format", "json")


@dataclass(frozen=True)
class Plan:
    """How long and how rough.

    Attributes:
        kill_every_s: seconds between two signals, on average.
        most_kills: signals in all.
        max_receive_count: of the queue; every worker that dies costs what it held one receipt.
        fault_rate: share of the calls that meet a fault on the wire.
        gather_rows: articles in one set.
        most_held: messages in the queue, received or not, before no more articles are sent.
        deadline_s: for the queue to become empty.
    """

    server: str
    num_articles: int
    num_shards: int
    num_workers: int
    kill_every_s: float = 6.0
    most_kills: int = 1_000_000
    max_receive_count: int = 8
    fault_rate: float = 0.02
    gather_rows: int = 200
    most_held: int = 4000
    visibility_s: int = 10
    deadline_s: float = 3600.0
    seed: int = 0


@dataclass
class Result:
    """What a soak saw; it went well if `problems` is empty."""

    plan: Plan
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0
    signals: Counter[str] = field(default_factory=Counter)
    ends: Counter[str] = field(default_factory=Counter)
    faults: dict[str, int] = field(default_factory=dict)
    calls: int = 0
    slowest_stop_s: float = 0.0
    counts: dict[str, int] = field(default_factory=dict)

    def check(self, right: bool, problem: str) -> None:
        if not right:
            self.problems.append(problem)

    def as_dict(self) -> dict[str, Any]:
        messages = self.plan.num_articles + self.plan.num_shards
        speed = round(messages / max(self.seconds, 1e-9), 1)
        return vars(self) | {"plan": asdict(self.plan), "messages_per_s": speed}


class Workers:
    """Keeps so many workers running, each started again when it ends, until `stop`."""

    def __init__(
        self, command: list[str | Path], env: dict[str, str], folder: Path, result: Result
    ) -> None:
        self._command = command
        self._env = servers.clean_environment(env)
        self._folder = folder
        self._result = result
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._running: dict[int, subprocess.Popen[bytes]] = {}
        self._threads = [
            threading.Thread(target=self._keep_running, args=(number,), name=f"worker-{number}")
            for number in range(result.plan.num_workers)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def send(self, number: signal.Signals, chance: random.Random) -> None:
        """Send a signal to one of them; after SIGTERM it has to end in time."""
        with self._lock:
            running = [p for p in self._running.values() if p.poll() is None]
            if not running:
                return
            process = chance.choice(running)
            process.send_signal(number)
            self._result.signals[number.name] += 1
        if number == signal.SIGTERM:
            self._await_stop(process)

    def stop(self) -> None:
        """SIGTERM to all, and their ends."""
        self._stopping.set()
        with self._lock:
            running = list(self._running.values())
            for process in running:
                process.terminate()
        for process in running:
            self._await_stop(process)
        for thread in self._threads:
            thread.join()

    def _await_stop(self, process: subprocess.Popen[bytes]) -> None:
        began = time.monotonic()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._result.problems.append(f"a worker was still there {STOP_S} s after SIGTERM")
            process.kill()
        took_s = round(time.monotonic() - began, 1)
        self._result.slowest_stop_s = max(self._result.slowest_stop_s, took_s)

    def _keep_running(self, number: int) -> None:
        """One thread starts and awaits each of its processes, which die with it."""
        with (self._folder / f"worker-{number}.log").open("ab") as log:
            while not self._stopping.is_set():
                process = subprocess.Popen(
                    servers.tethered(self._command),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=self._env,
                )
                with self._lock:
                    self._running[number] = process
                    if self._stopping.is_set():
                        process.terminate()
                code = process.wait()
                with self._lock:
                    self._result.ends[str(code)] += 1
                    self._result.check(code in ENDS, f"a worker ended with {code}: {log.name}")


@contextmanager
def started_server(name: str, folder: Path) -> Iterator[Endpoint]:
    """`moto` or `ministack`, with a folder of its own in `folder`."""
    own = folder / "server"
    own.mkdir()
    venv = Path(os.environ.get("MINISTACK_VENV", REPOSITORY / ".venv-ministack"))
    started = servers.moto(own) if name == "moto" else servers.ministack(own, venv)
    with started as endpoint:
        yield endpoint


def soak(plan: Plan, folder: Path) -> Result:
    """Run one; `folder` keeps the logs."""
    from models import make_hf_checkpoint

    result = Result(plan)
    model = make_hf_checkpoint(folder / "model", layers=1)
    with ExitStack() as stack:
        endpoint = stack.enter_context(started_server(plan.server, folder))
        proxy = stack.enter_context(FaultProxy(endpoint.endpoint_url, seed=plan.seed))
        bucket = stack.enter_context(servers.fresh_bucket(endpoint))
        queue = stack.enter_context(
            servers.fresh_queue(endpoint, max_receive_count=plan.max_receive_count)
        )
        place = S3Place(endpoint, bucket, Endpoint(proxy.endpoint_url))
        tables = [
            articles(min(SHARDS_PER_FILE, plan.num_shards - first) * ROWS_PER_SHARD, seed=first + 1)
            for first in range(0, plan.num_shards, SHARDS_PER_FILE)
        ]
        for number, table in enumerate(tables):
            place.write(f"news/{number:04d}.csv", as_csv(table))
        enqueue(place, queue, endpoint)
        loose = articles(plan.num_articles, seed=ARTICLE_SEED)
        poison = sorted([*JUNK, *damaged(place)])
        queue.send(*poison)

        faults = arm(proxy, plan.fault_rate)
        handed_out = ReceiveSpy().watch(proxy)  # of replies that no fault met
        command: list[str | Path] = [
            *(servers.script("batchclf"), "work", "--queue", queue.url, "--model", model),
            *("--output", place.output, "--allow-source", f"s3://{bucket}/in"),
            *("--visibility-timeout", str(plan.visibility_s), "--retry-delay", "1"),
            *("--gather-rows", str(plan.gather_rows), "--gather-seconds", "1"),
            *("--rows-per-shard", str(ROWS_PER_SHARD)),  # as enqueue, for verify
            *SETTINGS,
        ]
        workers = Workers(command, {**place.env, "OMP_NUM_THREADS": "1"}, folder, result)
        began = time.monotonic()
        workers.start()
        try:
            with ThreadPoolExecutor(1) as pool:
                feeding = pool.submit(feed, queue, article_messages(loose), plan)
                disturb(workers, queue, feeding, result)
                sent = feeding.result()
        finally:
            workers.stop()
        result.seconds = round(time.monotonic() - began, 1)
        result.calls = len(proxy.log())
        result.faults = {name: proxy.hits(fault) for name, fault in faults.items()}
        proxy.clear()

        expected = undisturbed(folder, model, [*tables, loose])
        compare(
            place,
            expected,
            tables,
            dict(zip(sent, loose["id"].to_pylist()[: len(sent)], strict=True)),
            set(handed_out.message_ids),
            result,
        )
        dead = queue.dead_letters()
        result.counts["dead_letters"] = len(dead)
        result.check(
            dead == poison,
            f"dead letters that are no poison: {sorted(Counter(dead) - Counter(poison))[:3]}; "
            f"poison that is none: {sorted(Counter(poison) - Counter(dead))[:3]}",
        )
        no_orphans(place, result)
        proof = batchclf("verify", place.output, f"s3://{bucket}/in/news/", env=endpoint.env)
        result.check(proof.returncode == 0, f"verify: {proof.stdout[-2000:]}{proof.stderr[-2000:]}")
    return result


def enqueue(place: S3Place, queue: Queue, endpoint: Endpoint) -> None:
    source = f"s3://{place.bucket}/in/news/"
    rows = ("--rows-per-shard", str(ROWS_PER_SHARD))
    ended = batchclf("enqueue", source, "--queue", queue.url, *rows, env=endpoint.env)
    if ended.returncode:
        raise SystemExit(f"enqueue: {ended.stderr}")


def batchclf(*args: str | Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        servers.tethered([servers.script("batchclf"), *args]),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=servers.clean_environment({**env, "OMP_NUM_THREADS": "1"}),
        timeout=COMMAND_S,
        check=False,
    )


def feed(queue: Queue, bodies: list[str], plan: Plan) -> list[str]:
    """Send as the workers are done; returns the message ids in the order of the bodies."""
    sent: list[str] = []
    deadline = time.monotonic() + plan.deadline_s
    while len(sent) < len(bodies) and time.monotonic() < deadline:
        room = plan.most_held - queue.backlog().total
        if room > 0:
            sent += queue.send(*bodies[len(sent) : len(sent) + room])
        else:
            time.sleep(FEED_S)
    return sent


def damaged(place: S3Place) -> list[str]:
    """Messages of objects that are gone, replaced, torn, or without the text column."""
    parquet = as_parquet(articles(50))
    uris = [
        place.write("poison/gone.csv", b"text\n"),
        place.write("poison/torn.parquet", parquet[: len(parquet) // 2]),
        place.write("poison/body.csv", b"id,body\n1,no text\n"),
        place.write("poison/replaced.csv", b"id,text\n1,new\n"),
    ]
    heads = [
        place.server.s3.head_object(Bucket=place.bucket, Key=uri.split("/", 3)[3]) for uri in uris
    ]
    place.remove("poison/gone.csv")
    etags = [*(head["ETag"] for head in heads[:3]), '"d41d8cd98f00b204e9800998ecf8427e"']
    return [
        json.dumps({"batchclf": 1, "source": uri, "etag": etag, "rows": [0, 1]})
        for uri, etag in zip(uris, etags, strict=True)
    ]


def arm(proxy: FaultProxy, rate: float) -> dict[str, Fault]:
    actions = {
        "503": Status(503),
        "reset": Reset(),
        "lost reply": LoseReply(),
        "delay": Delay(1.0),
    }
    share = rate / len(actions)
    return {
        name: proxy.add(Fault(Match(), action, probability=share))
        for name, action in actions.items()
    }


def disturb(workers: Workers, queue: Queue, feeding: "Future[list[str]]", result: Result) -> None:
    """Send signals until all messages were sent and the queue is empty."""
    plan = result.plan
    chance = random.Random(plan.seed)
    deadline = time.monotonic() + plan.deadline_s
    next_kill = time.monotonic() + plan.kill_every_s
    empty = 0
    while empty < EMPTY_POLLS:
        backlog = queue.backlog()
        if time.monotonic() > deadline:
            result.problems.append(f"after {plan.deadline_s} s the queue still holds {backlog}")
            return
        empty = empty + 1 if feeding.done() and not backlog.total else 0
        if time.monotonic() > next_kill and result.signals.total() < plan.most_kills:
            workers.send(chance.choice([signal.SIGKILL, signal.SIGTERM]), chance)
            next_kill = time.monotonic() + chance.uniform(0.5, 1.5) * plan.kill_every_s
        time.sleep(POLL_S)


def undisturbed(folder: Path, model: Path, tables: list[pa.Table]) -> dict[str, str | None]:
    """By id, the labels that `classify` gives where nothing goes wrong."""
    place = LocalPlace(folder / "undisturbed")
    source = place.write("all.parquet", as_parquet(pa.concat_tables(tables)))
    ended = batchclf(
        "classify", source, "--model", model, "--output", place.output, *SETTINGS, env={}
    )
    if ended.returncode:
        raise SystemExit(f"classify: {ended.stderr}")
    return labels_of(place)


def compare(
    place: S3Place,
    expected: dict[str, str | None],
    tables: list[pa.Table],
    sent: dict[str, str],
    handed_out: set[str],
    result: Result,
) -> None:
    """Hold the rows of the output against what was sent: `sent` is the id by message id.

    Of an article that is missing, `handed_out` tells whether a worker lost it or the server did.
    """
    shard_rows: Counter[str] = Counter()
    by_message: dict[str, set[str]] = {}
    wrong_labels = article_rows = 0
    for name in place.visible():
        rows = pq.read_table(io.BytesIO(place.read_output(name)))
        ids = rows["id"].to_pylist()
        wrong_labels += sum(
            expected.get(i, "?") != label
            for i, label in zip(ids, rows["label"].to_pylist(), strict=True)
        )
        if "message_id" not in rows.column_names:
            shard_rows.update(ids)
            continue
        article_rows += len(ids)
        for message_id, i in zip(rows["message_id"].to_pylist(), ids, strict=True):
            by_message.setdefault(message_id, set()).add(i)
    wanted = Counter(i for table in tables for i in table["id"].to_pylist())
    result.check(
        shard_rows == wanted, f"rows of shards: {(shard_rows - wanted) or (wanted - shard_rows)}"
    )
    found = {message_id: ids for message_id, ids in by_message.items() if len(ids) == 1}
    result.check(
        {message_id: next(iter(ids)) for message_id, ids in found.items()} == sent,
        f"articles: {len(sent)} sent, {len(found)} labelled, by message id; of the others "
        f"{len(handed_out & (sent.keys() - found.keys()))} were seen to be handed out",
    )
    result.check(wrong_labels == 0, f"{wrong_labels} rows have another label than undisturbed")
    result.counts |= {
        "outputs": len(place.visible()),
        "shard_rows": shard_rows.total(),
        "article_rows": article_rows,
        "articles": len(by_message),
        "repeats": article_rows - len(by_message),
    }


def no_orphans(place: S3Place, result: Result) -> None:
    uploads = place.server.s3.list_multipart_uploads(Bucket=place.bucket).get("Uploads", [])
    result.check(not uploads, f"multipart uploads that never ended: {uploads[:3]}")
    hidden = set(place.names()) - set(place.visible())
    probes = {name for name in hidden if name.rpartition("/")[2].startswith("_probe-")}
    others = {name for name in hidden - probes if "/_runs/" not in name}
    result.check(not others, f"objects that nobody reads: {sorted(others)[:3]}")
    result.counts["probes_left"] = len(probes)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--articles", type=int, default=20_000)
    parser.add_argument("--shards", type=int, default=200)
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--server", choices=["moto", "ministack"], default="moto")
    parser.add_argument("--kill-every", type=float, default=6.0, metavar="SECONDS")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE")
    asked = parser.parse_args()
    plan = Plan(
        asked.server,
        asked.articles,
        asked.shards,
        asked.workers,
        kill_every_s=asked.kill_every,
        seed=asked.seed,
        **HELD[asked.server],
    )
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    result = soak(plan, folder)
    text = json.dumps(result.as_dict(), indent=1)
    print(text)
    if asked.json:
        asked.json.write_text(f"{text}\n")
    if result.problems:
        print(f"logs: {folder}", file=sys.stderr)
    return 1 if result.problems else 0


if __name__ == "__main__":
    sys.exit(main())
