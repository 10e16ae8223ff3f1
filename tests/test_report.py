"""What a report says of outputs made on the spot, and how it shows what strangers wrote."""

import json
import re
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from labelled_outputs import (
    FINGERPRINT,
    LABELS,
    commit,
    note_run,
    note_success,
    open_sink,
)
from outline import Outline

from batchclf.errors import CheckpointError, ConfigError, OutputError
from batchclf.report import Report
from batchclf.report_job import make_report
from batchclf.report_markdown import report_markdown
from batchclf.report_page import report_page
from batchclf.sink import Sink

HOSTILE = "</style></script><script>alert(1)</script>\x00\u202e| `x` *y* [z](javascript:1)"
DAY = date(2024, 1, 31)


@pytest.fixture
def sink(tmp_path: Path) -> Sink:
    return open_sink(tmp_path)


def kept(labels: list[str | None]) -> dict[str, Any]:
    """The columns of so many rows: an id, a date, long words, and true labels."""
    return {
        "id": pa.array([f"id {row}" for row in range(len(labels))]),
        "published": pa.array([DAY] * len(labels)),
        "body": pa.array([HOSTILE * 2_000] * len(labels)),
        "input_label": pa.array(labels, pa.string()),
    }


def commit_two(sink: Sink) -> list[str]:
    """Six rows in two shards of one file: two sport, two tech, one abstained, one failed."""
    first = kept(["sport", "sport", "tech"])
    second = kept(["tech", None, "weather"])
    uri = "s3://news/2024.csv"
    return [
        commit(sink, uri, first, [1, 2, 2], min_score=0.6),
        commit(sink, uri, second, [2, 1, -1], errors={2: "null_text: no text"}, start=3),
    ]


def report_of(sink: Sink, **options: str) -> Report:
    return make_report(sink.folder.uri, **options)  # type: ignore[arg-type]


def test_a_complete_output_is_counted(sink: Sink) -> None:
    note_run(sink)
    note_success(sink, commit_two(sink))
    found = report_of(sink)
    counts = found.counts
    assert (counts.num_rows, counts.num_labelled, counts.num_abstained) == (6, 4, 1)
    assert {each.label: each.num_rows for each in found.labels} == {
        "sport": 2,
        "tech": 2,
        "business": 0,
    }
    assert found.labels[0].mean_score == pytest.approx((0.9 + 0.65) / 2, abs=0.01)
    assert (found.plan.complete, found.plan.num_planned, found.problems) == (True, 2, [])
    assert [(each.name, each.num_rows, each.num_outputs) for each in found.sources] == [
        ("s3://news/2024.csv", 6, 2)
    ]
    (example,) = found.failures["null_text"].examples
    assert (example.source, example.row, example.reason) == ("s3://news/2024.csv", 5, "no text")
    assert found.verify == f"batchclf verify {sink.folder.uri}/fp={FINGERPRINT} 'news files'"


def test_dates_and_true_labels_are_found_by_themselves(sink: Sink) -> None:
    commit_two(sink)
    note_run(sink)
    found = report_of(sink)
    assert found.dates is not None
    assert found.dates.column == "published"
    assert found.dates.periods is not None
    assert (found.dates.periods.starts, found.dates.periods.totals) == (("2024-01-31",), (6,))
    truth = found.truth
    assert truth is not None
    assert truth.column == "input_label"
    assert truth.agreement is not None
    assert (truth.agreement.num_examples, truth.agreement.accuracy) == (3, 2 / 3)
    assert (truth.num_missing, truth.num_unlabelled, truth.unknown) == (1, 1, {"weather": 1})


def test_columns_can_be_named(sink: Sink) -> None:
    columns = {
        "seen": pa.array(["2020-01-01"]),
        "published": pa.array(["2024-01-01"]),
        "number": pa.array([1]),
    }
    commit(sink, "s3://news/a.csv", columns, [1])
    note_run(sink)
    assert "--date-column takes another: published" in report_of(sink).notes[0]
    found = report_of(sink, date_column="published", label_column="number")
    assert found.dates is not None
    assert found.dates.periods is not None
    assert found.dates.periods.starts == ("2024-01-01",)
    assert found.truth is not None
    assert found.truth.unknown == {"1": 1}
    with pytest.raises(ConfigError, match="kept are: seen, published, number"):
        report_of(sink, date_column="born")
    with pytest.raises(ConfigError, match="holds int64, and dates, timestamps or strings"):
        report_of(sink, date_column="number")


def test_a_torn_output_is_a_problem_and_the_others_are_counted(sink: Sink) -> None:
    names = commit_two(sink)
    note_run(sink)
    note_success(sink, [*names, "gone.parquet"])
    torn = Path(sink.folder.uri) / sink.prefix / names[0]
    torn.write_bytes(torn.read_bytes()[:-20])
    found = report_of(sink)
    (problem,) = found.problems
    assert names[0] in problem
    assert found.counts.num_rows == 3
    assert (found.plan.complete, found.plan.num_there) == (False, 1)
    assert found.plan.missing == sorted([names[0], "gone.parquet"])
    texts = " ".join(Outline(report_page(found)).texts)
    assert "1 of 3 planned shards are whole" in texts
    assert "1 problem found" in texts


def test_a_torn_page_of_an_output_is_a_problem(sink: Sink) -> None:
    (name, _) = commit_two(sink)
    spoilt = Path(sink.folder.uri) / sink.prefix / name
    content = bytearray(spoilt.read_bytes())
    metadata = pa.parquet.read_metadata(spoilt).row_group(0)
    chunk = next(
        metadata.column(place)
        for place in range(metadata.num_columns)
        if metadata.column(place).path_in_schema == "score"
    )
    begin = chunk.dictionary_page_offset or chunk.data_page_offset
    content[begin : begin + 40] = bytes(40)
    spoilt.write_bytes(content)
    found = report_of(sink)
    assert "torn" in found.problems[0]
    assert found.counts.num_rows == 3


def test_what_no_run_saw_done_is_not_called_complete(sink: Sink) -> None:
    commit_two(sink)
    note_run(sink)
    found = report_of(sink)
    assert (found.plan.complete, found.plan.num_planned, found.plan.num_there) == (False, 2, 2)
    assert "Not known to be complete" in " ".join(Outline(report_page(found)).texts)


def test_what_the_last_run_could_not_do_is_told(sink: Sink) -> None:
    commit_two(sink)
    note_run(sink, complete=False, errors=["bad.csv: no text column 'text'"])
    text = " ".join(Outline(report_page(report_of(sink))).texts)
    assert "Not complete: 2 outputs of 2 planned shards" in text
    assert "bad.csv: no text column 'text'" in text


def test_an_output_without_notes_is_counted_but_not_called_complete(sink: Sink) -> None:
    commit_two(sink)
    found = report_of(sink)
    assert (found.counts.num_rows, found.plan.complete, found.runs.latest) == (6, False, None)
    assert found.truth is not None  # the columns of probabilities tell the labels
    assert "no run left a note" in report_markdown(found)


def test_a_column_name_with_a_dot_is_no_path(sink: Sink) -> None:
    columns = {"date.seen": pa.array([DAY]), "date": pa.array([{"seen": 1}])}
    commit(sink, "s3://news/a.parquet", columns, [1])
    found = report_of(sink)
    assert found.dates is not None
    assert (found.dates.column, found.dates.num_undated) == ("date.seen", 0)


def test_repeats_of_a_message_count_once(sink: Sink) -> None:
    for number, ids in enumerate((["m1", "m2", "m1"], ["m2", "m3"])):
        columns = {"message_id": pa.array(ids), "receive_count": pa.array([1] * len(ids))}
        commit(sink, "sqs://news", columns, [1] * len(ids), version=f"sha256:{number}")
    shards = {"committed": 0, "done_before": 0}
    received = {"received": 5, "deleted": 5}
    note_run(sink, messages=received, num_sets=2, num_shards=shards, ended="done")
    found = report_of(sink)
    assert (found.counts.num_rows, found.num_repeats) == (3, 2)
    (run,) = found.runs.found
    assert (run.command, run.num_committed, run.messages, run.errors) == ("work", 2, received, ())
    assert "2 outputs from a queue" in " ".join(Outline(report_page(found)).texts)
    assert found.labels[0].num_rows == 3
    assert found.plan.complete is None
    assert [(each.name, each.num_rows) for each in found.sources] == [("sqs://news", 5)]
    assert "2 rows are of messages that were delivered again" in found.notes[0]


def test_of_several_fingerprints_the_newest_complete_one_is_read(tmp_path: Path) -> None:
    for number, start in enumerate(("aa", "bb", "cc")):
        sink = open_sink(tmp_path, fingerprint=start * 16)
        name = commit(sink, f"s3://news/{start}.csv", kept(["sport"]), [1])
        note_run(sink, number=number)
        if start != "cc":
            note_success(sink, [name])
    found = make_report(str(tmp_path))
    assert found.fingerprint == "bb" * 16
    assert "2 other fingerprints" in found.notes[0]
    assert make_report(str(tmp_path), fingerprint="cc").fingerprint == "cc" * 16
    assert make_report(f"{tmp_path}/fp={'aa' * 16}").fingerprint == "aa" * 16
    with pytest.raises(ConfigError, match=f"there are\n  {'aa' * 16}"):
        make_report(str(tmp_path), fingerprint="dd")


def test_an_output_without_rows_makes_a_page(sink: Sink) -> None:
    commit(sink, "s3://news/empty.csv", {"id": pa.array([], pa.string())}, [])
    note_run(sink)
    found = report_of(sink)
    assert found.counts.num_rows == 0
    Outline(report_page(found))
    assert "| labelled | 0 | 0.0% |" in report_markdown(found)


def test_a_folder_without_an_output_is_no_output(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="holds no output"):
        make_report(str(tmp_path / "nothing"))


def test_a_note_that_is_none_is_a_problem(sink: Sink) -> None:
    commit_two(sink)
    note_run(sink, busy=["no", "shares"])
    found = report_of(sink)
    assert "not the note of a run" in found.problems[0]
    assert found.counts.num_rows == 6
    assert {each.label for each in found.labels} == set(LABELS)


def test_the_card_is_of_the_model_with_these_labels(sink: Sink, tmp_path: Path) -> None:
    commit_two(sink)
    note_run(sink, model={"path": str(tmp_path), "labels": list(LABELS)})
    (tmp_path / "config.json").write_text(json.dumps({"id2label": dict(enumerate(LABELS))}))
    settings = {"temperature": 0.5, "metrics": {"val_accuracy": 0.987654321}}
    (tmp_path / "batchclf.json").write_text(json.dumps(settings))
    texts = Outline(report_page(report_of(sink))).texts
    assert "metrics.val_accuracy" in texts
    assert "0.987654" in texts
    (tmp_path / "config.json").write_text(json.dumps({"id2label": {"0": "other"}}))
    found = report_of(sink)
    assert found.card is None
    assert "of other labels now" in found.notes[0]
    with pytest.raises(CheckpointError, match=r"config\.json"):
        report_of(sink, model=str(tmp_path / "nowhere"))


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """Labels, ids, columns, file names, errors and notes that would rather be something else."""
    sink = open_sink(tmp_path_factory.mktemp("hostile"), (HOSTILE, "b"))
    columns = {
        HOSTILE: pa.array(["2024-01-01", "2024-02-01", HOSTILE]),
        "true": pa.array([HOSTILE, "b", "b"]),
    }
    errors = {2: f"{HOSTILE}: {HOSTILE}"}
    commit(sink, f"s3://x/{HOSTILE}", columns, [0, 1, -1], errors=errors, num_labels=2)
    note_run(
        sink,
        (HOSTILE, "b"),
        device=HOSTILE,
        errors=[HOSTILE],
        busy={HOSTILE: 0.5},
        settings={"inputs": [HOSTILE], HOSTILE: HOSTILE},
        versions={HOSTILE: HOSTILE},
    )
    found = make_report(sink.folder.uri, date_column=HOSTILE, label_column="true")
    assert found.truth is not None
    assert found.truth.agreement is not None
    return found


def test_nothing_that_strangers_wrote_is_more_than_text_in_the_page(hostile: Report) -> None:
    outline = Outline(report_page(hostile))
    assert not {"script", "img", "link", "iframe", "a"} & {tag for tag, _ in outline.tags}
    names = {name for _, attributes in outline.tags for name in attributes}
    assert not [name for name in names if name.startswith("on")]
    text = "".join(outline.texts)
    assert "<script>alert(1)</script>" in text
    assert "\u202e" not in text
    assert "\x00" not in text


def test_the_page_fetches_nothing_and_may_run_nothing(hostile: Report) -> None:
    page = report_page(hostile)
    for _, attributes in Outline(page).tags:
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith("#")
    assert b"default-src 'none'" in page
    assert b"@import" not in page


def test_every_plot_has_a_name_and_a_table(hostile: Report) -> None:
    outline = Outline(report_page(hostile))
    svgs = [attributes for tag, attributes in outline.tags if tag == "svg"]
    assert len(svgs) == 10
    assert all(svg["role"] == "img" and svg["aria-label"] for svg in svgs)
    assert sum(tag == "table" for tag, _ in outline.tags) >= len(svgs)
    ids = [attributes["id"] for _, attributes in outline.tags if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_markdown_escapes_what_strangers_wrote(hostile: Report) -> None:
    written = report_markdown(hostile)
    prose = "\n".join(line for line in written.splitlines() if not line.startswith("    "))
    assert not re.search(r"<\w", prose)
    assert "\u202e" not in written
    assert "](" not in prose.replace("\\](", "")
    rows = [line for line in prose.splitlines() if line.startswith("|")]
    cells = {len(re.findall(r"(?<!\\)\|", row)) for row in rows}
    assert cells <= {4, 5, 7, 8}
    assert not re.search(r"(?<!\\)[`*]", prose)


def test_json_holds_the_same_numbers(hostile: Report) -> None:
    found = json.loads(json.dumps(hostile.as_dict()))
    assert found["counts"]["num_rows"] == 3
    assert found["truth"]["agreement"]["accuracy"] == 1.0
    assert found["labels"][0]["num_rows"] == 1
    assert sum(found["labels"][0]["score_bins"]) == 1
