"""`batchclf report`: what `classify` wrote, as a page, as JSON and as Markdown."""

import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from conftest import RunBatchclf
from e2e import archives, outputs
from e2e.conftest import QUIET, Classify
from labelled_outputs import commit, note_run, open_sink
from models import LABELS
from serve.browser import chromium

from batchclf.report_job import make_report
from batchclf.report_page import report_page

NUM_ROWS = 60
WIDTHS = (390, 820, 1400)
HOSTILE = "</script><script>document.title = 'broken'</script>"


def write_news(path: Path) -> Path:
    rows = archives.articles(NUM_ROWS, seed=3)
    for number, row in enumerate(rows):
        row["label"] = LABELS[number % len(LABELS)]
    rows[5]["text"] = ""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_a_labelled_output_is_reported_in_every_format(
    classify: Classify, run_batchclf: RunBatchclf, tmp_path: Path
) -> None:
    news = write_news(tmp_path / "news.csv")
    options = ("--keep-columns", "published,label", "--rows-per-shard", "25")
    done = classify(news, "--output", tmp_path / "labelled", *options)
    assert done.returncode == 0, done.stderr
    rows = outputs.read_source(tmp_path / "labelled", "news.csv").to_pylist()

    done = run_batchclf("report", "labelled", env=QUIET, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "report  batchclf-report.html\n"
    page = (tmp_path / "batchclf-report.html").read_text()
    assert "Labels of 60 articles" in page
    assert "Complete: 3 of 3 planned shards" in page
    assert "empty_text" in page
    assert "input_label" in page

    done = run_batchclf("report", "labelled", "--format", "json", env=QUIET, cwd=tmp_path)
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["counts"]["num_rows"] == NUM_ROWS
    shown = {each["label"]: each["num_rows"] for each in found["labels"] if each["num_rows"]}
    assert shown == Counter(row["label"] for row in rows if row["label"])
    right = [row["label"] == row["input_label"] for row in rows if row["label"]]
    assert found["truth"]["agreement"]["accuracy"] == pytest.approx(sum(right) / len(right))
    assert (found["dates"]["column"], found["dates"]["periods"]["unit"]) == ("published", "day")
    assert found["dates"]["periods"]["totals"] == [24, 24, 12]
    (run,) = found["runs"]["found"]
    assert (run["command"], run["num_rows"]) == ("classify", NUM_ROWS)
    assert found["card"]["labels"] == list(LABELS)

    torn = outputs.output_files(tmp_path / "labelled")[0]
    torn.write_bytes(torn.read_bytes()[:-9])
    where = tmp_path / "new folder" / "report.md"
    command = ("report", "labelled", "--format", "md", "--to", where)
    done = run_batchclf(*command, env=QUIET, cwd=tmp_path)
    assert done.returncode == 65
    assert torn.name in done.stderr
    assert "batchclf verify" in done.stderr
    assert "| articles | 35 | 100.0% |" in where.read_text()


def write_page(folder: Path) -> Path:
    """The page of an output with forty labels, long ones and hostile ones among them."""
    labels = [
        f"{HOSTILE if number == 1 else 'a label of a good many words, number'} {number}"
        for number in range(40)
    ]
    sink = open_sink(folder, labels)
    given = [row % 40 for row in range(400)]
    given[7] = -1
    columns = {
        "published": [f"20{row % 20 + 10}-02-03" for row in range(400)],
        "true": [labels[row * row % 40] for row in range(400)],
    }
    commit(
        sink,
        f"s3://news/{'a-long-name' * 12}{HOSTILE}",
        columns,
        given,
        errors={7: f"unparseable: {HOSTILE}"},
        num_labels=40,
        min_score=0.6,
    )
    note_run(sink, labels, busy={"read": 0.2, HOSTILE: 0.7}, errors=["x" * 300])
    path = folder / "report.html"
    path.write_bytes(report_page(make_report(str(folder))))
    return path


def test_the_page_fits_every_screen_fetches_nothing_and_runs_nothing(tmp_path: Path) -> None:
    with chromium(tmp_path / "browser") as browser:
        page = write_page(tmp_path)
        browser.execute_cdp_cmd("Network.enable", {})
        for width in WIDTHS:
            size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
            browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
            browser.get(page.as_uri())
            assert browser.title == "Labels of 400 articles"
            for fold in browser.find_elements("css selector", "details"):
                browser.execute_script("arguments[0].open = true", fold)
            root = "document.documentElement"
            assert browser.execute_script(f"return {root}.scrollWidth") <= width
            fetched = "return performance.getEntriesByType('resource').length"
            assert browser.execute_script(fetched) == 0
        assert browser.get_log("browser") == []
