import json
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from prometheus_client.parser import text_string_to_metric_families

from batchclf.errors import ConfigError
from batchclf.metrics import Metrics

COUNTS = ("received", "labelled", "deleted", "released", "abandoned", "refused")
GAUGES = ("oldest_message_age_s", "heartbeat_lag_s", "articles_per_s", "held")
UNITS = re.compile(r"(Seconds|Count|Count/Second)")


def lines_of(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [
        json.loads(line, parse_constant=pytest.fail)
        for line in capsys.readouterr().out.splitlines()
    ]


def scrape(metrics: Metrics) -> dict[str, float]:
    with urlopen(f"http://127.0.0.1:{metrics.port}/metrics", timeout=10) as reply:
        text = reply.read().decode()
    return {
        sample.name: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.labels == {"queue": "news"}
    }


def check_embedded_metric_format(document: dict[str, Any]) -> None:
    """Hold a line against the specification.

    https://docs.aws.amazon.com/AmazonCloudWatch/latest/monitoring/CloudWatch_Embedded_Metric_Format_Specification.html
    """
    metadata = document["_aws"]
    assert set(metadata) == {"Timestamp", "CloudWatchMetrics"}
    assert type(metadata["Timestamp"]) is int
    assert abs(metadata["Timestamp"] / 1000 - time.time()) < 600  # milliseconds, and now
    for directive in metadata["CloudWatchMetrics"]:
        assert set(directive) == {"Namespace", "Dimensions", "Metrics"}
        assert re.fullmatch(r"[\w.\-/#:]{1,255}", directive["Namespace"], re.ASCII)
        assert directive["Dimensions"]
        for dimensions in directive["Dimensions"]:
            assert 1 <= len(dimensions) <= 30
            for name in dimensions:
                assert 1 <= len(name) <= 250
                assert isinstance(document[name], str)
                assert 1 <= len(document[name]) <= 1024
        assert 1 <= len(directive["Metrics"]) <= 100
        for metric in directive["Metrics"]:
            assert set(metric) == {"Name", "Unit"}
            assert UNITS.fullmatch(metric["Unit"])
            assert type(document[metric["Name"]]) in (int, float)


# CloudWatch


@given(
    st.dictionaries(st.sampled_from(COUNTS), st.integers(0, 2**53)),
    st.dictionaries(st.sampled_from(GAUGES), st.floats()),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
def test_a_line_is_of_the_embedded_metric_format(
    capsys: pytest.CaptureFixture[str], counts: dict[Any, int], gauges: dict[Any, float]
) -> None:
    with Metrics("news", emf=True, worker="2 of 5") as metrics:
        for count, n in counts.items():
            metrics.count(count, n)
        for gauge, value in gauges.items():
            metrics.gauge(gauge, value)
    (document,) = lines_of(capsys)
    check_embedded_metric_format(document)


def test_a_line_says_what_was_counted_and_set(capsys: pytest.CaptureFixture[str]) -> None:
    with Metrics("news", emf=True, worker="2 of 5") as metrics:
        metrics.count("received")
        metrics.count("received", 9)
        metrics.gauge("held", 3)
        metrics.gauge("held", 7)
    (document,) = lines_of(capsys)
    del document["_aws"]
    assert document == {
        "Queue": "news",
        "Worker": "2 of 5",
        "MessagesReceived": 10,
        "ArticlesLabelled": 0,
        "MessagesDeleted": 0,
        "MessagesReleased": 0,
        "MessagesAbandoned": 0,
        "MessagesRefused": 0,
        "MessagesHeld": 7,
    }


def test_the_lines_of_a_run_add_up_to_its_counts(capsys: pytest.CaptureFixture[str]) -> None:
    def count(metrics: Metrics) -> None:
        for _ in range(5000):
            metrics.count("deleted")

    with Metrics("news", emf=True, every_s=0.001) as metrics:
        threads = [threading.Thread(target=count, args=(metrics,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sum(line["MessagesDeleted"] for line in lines_of(capsys)) == 20_000


def test_lines_come_by_themselves(capsys: pytest.CaptureFixture[str]) -> None:
    written: list[str] = []
    with Metrics("news", emf=True, every_s=0.001):
        while "\n" not in "".join(written):
            written.append(capsys.readouterr().out)
    assert "MessagesDeleted" in json.loads("".join(written).splitlines()[0])


def test_without_emf_nothing_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    with Metrics("news") as metrics:
        metrics.count("received")
    assert capsys.readouterr().out == ""


def test_a_reader_that_goes_away_ends_the_lines_and_nothing_else() -> None:
    program = """
import os, sys
from batchclf.metrics import Metrics
reading, writing = os.pipe()
os.close(reading)
os.dup2(writing, 1)
with Metrics("news", emf=True, every_s=0.001) as metrics:
    metrics._writer.join(60)
    metrics.count("received")
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
"""
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60
    )
    assert (ended.returncode, "Traceback" in ended.stderr) == (0, False), ended.stderr
    assert "standard output is gone" in ended.stderr


# Prometheus


@pytest.fixture
def served() -> Iterator[Metrics]:
    with Metrics("news", port=0) as metrics:
        yield metrics


def test_prometheus_fetches_counts_and_gauges_with_their_units(served: Metrics) -> None:
    for number, name in enumerate(COUNTS, 1):
        served.count(name, number)  # type: ignore[arg-type]
    for number, name in enumerate(GAUGES, 1):
        served.gauge(name, number + 0.5)  # type: ignore[arg-type]
    assert scrape(served) == {
        "batchclf_messages_received_total": 1,
        "batchclf_articles_labelled_total": 2,
        "batchclf_messages_deleted_total": 3,
        "batchclf_messages_released_total": 4,
        "batchclf_messages_abandoned_total": 5,
        "batchclf_messages_refused_total": 6,
        "batchclf_oldest_message_age_seconds": 1.5,
        "batchclf_heartbeat_lag_seconds": 2.5,
        "batchclf_articles_per_second": 3.5,
        "batchclf_messages_held": 4.5,
    }


def test_counts_are_there_from_the_start_and_gauges_once_they_are_set(served: Metrics) -> None:
    assert sorted(scrape(served)) == sorted(
        f"batchclf_{what}_{name}_total"
        for name in COUNTS
        for what in ("articles" if name == "labelled" else "messages",)
    )


def test_counts_only_grow_from_one_fetch_to_the_next(served: Metrics) -> None:
    served.count("received", 2)
    first = scrape(served)
    served.count("received", 3)
    assert scrape(served)["batchclf_messages_received_total"] == 5
    assert first["batchclf_messages_received_total"] == 2


def test_two_workers_in_one_process_do_not_share_numbers(served: Metrics) -> None:
    with Metrics("news", port=0) as other:
        other.count("received", 7)
        assert scrape(served)["batchclf_messages_received_total"] == 0


def test_a_port_that_is_taken_is_a_usage_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--metrics-port {port}"), Metrics("news", port=port):
            pytest.fail("entered")


def test_nothing_is_served_after_the_end() -> None:
    with Metrics("news", port=0) as metrics:
        scrape(metrics)
    with pytest.raises(URLError):
        scrape(metrics)
