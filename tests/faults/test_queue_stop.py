"""Fault 26: a worker that is told to stop gives its messages back."""

import signal
import time
from typing import TYPE_CHECKING

import pytest
from fault_proxy import FaultProxy
from fault_rules import Fault, Forward, Hold, Match
from faults.commands import COMMIT, START_S, Run, end_of
from faults.inputs import articles, as_csv
from faults.places import S3Place
from faults.queues import (
    HELD_FOR_LONG,
    RECEIVE,
    ReceiveSpy,
    StartWork,
    Work,
    article_messages,
    shard_message,
    wait_for_visible,
)
from servers import Queue

if TYPE_CHECKING:
    import subprocess

STOP_S = 30.0  # of the contract


def stop(process: "subprocess.Popen[str]", number: signal.Signals = signal.SIGTERM) -> Run:
    """Send a signal to a living worker; it must end in time."""
    assert process.poll() is None, f"ended by itself: {end_of(process)}"
    began = time.monotonic()
    process.send_signal(number)
    run = end_of(process)
    assert time.monotonic() - began < STOP_S
    return run


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_26_told_to_stop_while_it_polls_a_worker_ends(
    s3: S3Place, proxy: FaultProxy, queue: Queue, start_work: StartWork, number: signal.Signals
) -> None:
    polls = proxy.add(Fault(RECEIVE, Forward()))
    process = start_work(s3, queue)
    proxy.wait_for(polls, START_S)
    assert stop(process, number).exit_code == 75


def test_26_told_to_stop_while_it_gathers_articles_a_worker_gives_them_back(
    s3: S3Place, proxy: FaultProxy, queue: Queue, start_work: StartWork
) -> None:
    """Of a call that is under way, the queue may yet answer with messages."""
    queue.send(*article_messages(articles(25)))
    polls = proxy.add(Fault(RECEIVE, Forward()))
    process = start_work(s3, queue, *HELD_FOR_LONG, "--gather-seconds", "600")
    proxy.wait_for(polls, START_S, times=4)
    assert stop(process).exit_code == 75
    wait_for_visible(queue, 25)
    assert s3.visible() == []


def test_26_told_to_stop_while_it_computes_a_worker_gives_its_messages_back(
    s3: S3Place, proxy: FaultProxy, queue: Queue, start_work: StartWork
) -> None:
    table = articles(20_000)
    source = s3.write("news.csv", as_csv(table))
    queue.send(shard_message(s3, source, table.num_rows))
    queue.send(*article_messages(articles(5)))
    read = proxy.add(Fault(Match(operation="GetObject", path="/in/"), Forward()))
    process = start_work(s3, queue, *HELD_FOR_LONG, "--max-batch-tokens", "64")
    proxy.wait_for(read, START_S)
    assert stop(process).exit_code == 75
    wait_for_visible(queue, 6)
    assert s3.visible() == []


def test_26_told_to_stop_while_it_uploads_a_worker_gives_its_messages_back(
    s3: S3Place, proxy: FaultProxy, queue: Queue, start_work: StartWork, work: Work
) -> None:
    """The store hangs, and takes the object in the end."""
    sent = queue.send(*article_messages(articles(5)))
    received = ReceiveSpy().watch(proxy)
    hold = Hold("before")
    held = proxy.add(Fault(COMMIT, hold, times=1))
    process = start_work(s3, queue, *HELD_FOR_LONG)
    proxy.wait_for(held, START_S)
    assert stop(process).exit_code == 75
    wait_for_visible(queue, 5)
    hold.release()
    proxy.wait_until_idle()
    assert work(s3, queue, "--max-messages", "5").exit_code == 0
    assert len(received.message_ids) == 2 * len(sent)
    assert set(s3.rows()["message_id"].to_pylist()) == set(sent)
    assert set(s3.rows()["id"].to_pylist()) == set(articles(5)["id"].to_pylist())
