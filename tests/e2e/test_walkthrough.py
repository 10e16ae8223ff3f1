"""The backfill of jobs/walkthrough, as its README tells it: from bucket to proof on one machine."""

import re
import sys
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import servers
from documents import REPOSITORY, Story

DOCUMENT = "jobs/walkthrough/README.md"
# Installing, and the server: the test has both.
PASSED_OVER = ("source .venv/bin/activate", "moto_server")
SAMPLE_ROWS = 125


@pytest.mark.slow
def test_a_backfill_and_the_next_night_label_the_archive_once(tmp_path: Path) -> None:
    with servers.moto(tmp_path) as server:
        folder = tmp_path / "project"
        folder.mkdir()
        for name in ("data", "jobs"):
            (folder / name).symlink_to(REPOSITORY / name)
        environment = servers.clean_environment(server.env) | {
            "PATH": f"{Path(sys.executable).parent}:{servers.script('x').parent}:/usr/bin:/bin",
            "OMP_NUM_THREADS": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        printed = Story(DOCUMENT, PASSED_OVER, {}).run(folder, environment)

        assert re.findall(r"complete and whole: .*? (\d+) rows", printed) == ["93", "125"], printed
        assert "<html" in (folder / "report.html").read_text(encoding="utf-8")
        rows = Counter(
            identifier
            for table in labelled(server)
            for identifier in table.column("id").to_pylist()
        )
        assert set(rows.values()) == {1}
        assert len(rows) == SAMPLE_ROWS
        for url in server.sqs.list_queues()["QueueUrls"]:
            found = server.sqs.get_queue_attributes(QueueUrl=url, AttributeNames=["All"])
            prefix = "ApproximateNumberOfMessages"
            left = [found["Attributes"][prefix + what] for what in ("", "NotVisible", "Delayed")]
            assert left == ["0", "0", "0"], url


def labelled(server: servers.Endpoint) -> list[pa.Table]:
    found = server.s3.list_objects_v2(Bucket="my-labels", Prefix="labelled/")["Contents"]
    return [
        pq.read_table(
            pa.BufferReader(
                server.s3.get_object(Bucket="my-labels", Key=item["Key"])["Body"].read()
            )
        )
        for item in found
        if item["Key"].endswith(".parquet")
    ]
