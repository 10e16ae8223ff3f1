"""Faults 15 to 18: inputs that change, vanish, are damaged, or hold rows that are no text."""

import signal
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from fault_proxy import FaultProxy
from fault_rules import Fault, Hold, Match
from faults.commands import (
    CALL_OF_LINK,
    START_S,
    Classify,
    StartClassify,
    Verify,
    at_call,
    end_of,
    wait_until_stopped,
)
from faults.inputs import articles, as_csv, as_csv_gz, as_jsonl, as_parquet
from faults.places import LocalPlace, Place, S3Place, labels_of

READ = Match(operation="GetObject", path="/in/news.csv")
HUGE_BYTES = 64 << 20
# Small shards and windows: reading is far from its end when the first shard is committed.
STEP_BY_STEP = ("--rows-per-shard", "20", "--max-batch-tokens", "128", "--keep-columns", "text")


def shouted(table: pa.Table) -> pa.Table:
    """Other texts of the same size."""
    return table.set_column(1, "text", pc.utf8_upper(table["text"]))


def rewrite(path: Path, content: bytes) -> None:
    with path.open("r+b") as file:
        file.write(content)


def replace(path: Path, content: bytes) -> None:
    new = path.with_name("new")
    new.write_bytes(content)
    new.replace(path)


# Between the plan, which reads a CSV once, and the read


def test_15_an_object_replaced_before_its_read_fails_alone_and_is_another_shard_next_time(
    s3: S3Place,
    proxy: FaultProxy,
    start_classify: StartClassify,
    classify: Classify,
    verify: Verify,
    news: pa.Table,
) -> None:
    others = articles(5, seed=1)
    sources = [s3.write("news.csv", as_csv(news)), s3.write("others.csv", as_csv(others))]
    hold = Hold("before")
    held = proxy.add(Fault(READ, hold, skip=1, times=1))
    process = start_classify(s3, *sources, "--keep-columns", "text")
    proxy.wait_for(held, START_S)
    new = shouted(news)
    s3.write("news.csv", as_csv(new))
    hold.release()
    run = end_of(process)
    assert run.exit_code == 75
    assert "news.csv: replaced since the plan was made" in run.said
    assert s3.rows()["text"].to_pylist() == others["text"].to_pylist()
    again = classify(s3, *sources, "--keep-columns", "text")
    assert (again.exit_code, again.num_committed, again.num_done_before) == (0, 1, 1)
    texts = pa.concat_tables([new, others])["text"].to_pylist()
    assert sorted(s3.rows()["text"].to_pylist()) == sorted(texts)
    assert verify(s3, *sources).exit_code == 0


def test_16_an_object_deleted_before_its_read_is_an_error_and_the_others_go_on(
    s3: S3Place, proxy: FaultProxy, start_classify: StartClassify, news: pa.Table
) -> None:
    others = articles(5, seed=1)
    sources = [s3.write("news.csv", as_csv(news)), s3.write("others.csv", as_csv(others))]
    hold = Hold("before")
    held = proxy.add(Fault(READ, hold, skip=1, times=1))
    process = start_classify(s3, *sources)
    proxy.wait_for(held, START_S)
    s3.remove("news.csv")
    hold.release()
    run = end_of(process)
    assert run.exit_code == 65
    assert "news.csv: there is no such object" in run.said
    assert list(labels_of(s3)) == others["id"].to_pylist()


def test_15_a_local_file_rewritten_before_its_read_fails_alone(
    local: LocalPlace, start_classify: StartClassify, tmp_path: Path, news: pa.Table
) -> None:
    others = articles(5, seed=1)
    sources = [local.write("news.csv", as_csv(news)), local.write("others.csv", as_csv(others))]
    stop = at_call(1, signal.SIGSTOP, local.folder, tmp_path / "calls")
    process = start_classify(local, *sources, env=stop)
    wait_until_stopped(process)
    rewrite(Path(sources[0]), as_csv(shouted(news)))
    process.send_signal(signal.SIGCONT)
    run = end_of(process)
    assert run.exit_code == 75
    assert "news.csv: replaced since the plan was made" in run.said
    assert list(labels_of(local)) == others["id"].to_pylist()


def test_16_a_local_file_deleted_before_its_read_is_an_error_and_the_others_go_on(
    local: LocalPlace, start_classify: StartClassify, tmp_path: Path, news: pa.Table
) -> None:
    others = articles(5, seed=1)
    sources = [local.write("news.csv", as_csv(news)), local.write("others.csv", as_csv(others))]
    stop = at_call(1, signal.SIGSTOP, local.folder, tmp_path / "calls")
    process = start_classify(local, *sources, env=stop)
    wait_until_stopped(process)
    local.remove("news.csv")
    process.send_signal(signal.SIGCONT)
    run = end_of(process)
    assert run.exit_code == 65
    assert "news.csv: No such file" in run.said
    assert list(labels_of(local)) == others["id"].to_pylist()


# In the middle of the read


@pytest.mark.parametrize("change", [rewrite, replace])
def test_15_a_local_file_changed_while_it_is_read_commits_nothing_of_the_new_content(
    local: LocalPlace,
    start_classify: StartClassify,
    classify: Classify,
    verify: Verify,
    tmp_path: Path,
    change: Callable[[Path, bytes], None],
) -> None:
    old = articles(1000)
    new = shouted(old)
    source = local.write("news.csv", as_csv(old))
    stop = at_call(CALL_OF_LINK, signal.SIGSTOP, local.folder, tmp_path / "calls")
    process = start_classify(local, source, *STEP_BY_STEP, env=stop)
    wait_until_stopped(process)
    change(Path(source), as_csv(new))
    process.send_signal(signal.SIGCONT)
    run = end_of(process)
    assert run.exit_code == 75
    assert "news.csv: replaced while it was read" in run.said
    committed = set(local.rows()["text"].to_pylist())
    assert 0 < len(committed) < old.num_rows
    assert committed <= set(old["text"].to_pylist())

    again = classify(local, source, *STEP_BY_STEP)
    assert (again.exit_code, again.num_committed, again.num_done_before) == (0, 50, 0)
    found = [text for text in local.rows()["text"].to_pylist() if text not in committed]
    assert sorted(found) == sorted(new["text"].to_pylist())
    problems = verify(local, source).answer["problems"]
    assert ["outputs of 2 versions of it" in problem for problem in problems] == [True]


# Damaged files


def test_17_damaged_files_are_errors_that_name_them_and_the_others_are_labelled(
    place: Place, classify: Classify, news: pa.Table, expected_labels: dict[str, str | None]
) -> None:
    parquet, gz = as_parquet(news), as_csv_gz(news)
    reasons = {
        "cut.parquet": "not a readable Parquet file",
        "empty.parquet": "not a readable Parquet file",
        "text.parquet": "not a readable Parquet file",
        "cut.csv.gz": "damaged gzip",
        "parquet.csv": "but it is Parquet",
        "empty.csv": "empty, without even a header line",
        "body.csv": "no text column 'text'; it has the columns id, body",
        "body.parquet": "no text column 'text'; it has the columns id, body",
    }
    renamed = news.rename_columns(["id", "body"])
    place.write("cut.parquet", parquet[: len(parquet) // 2])
    place.write("empty.parquet", b"")
    place.write("text.parquet", as_csv(news))
    place.write("cut.csv.gz", gz[: len(gz) // 2])
    place.write("parquet.csv", parquet)
    place.write("empty.csv", b"")
    place.write("body.csv", as_csv(renamed))
    place.write("body.parquet", as_parquet(renamed))
    folder = place.write("whole.csv", as_csv(news)).removesuffix("whole.csv")
    run = classify(place, folder)
    assert run.exit_code == 65
    said = {name: [e for e in run.answer["errors"] if f"/{name}:" in e] for name in reasons}
    assert all(len(said[name]) == 1 and reasons[name] in said[name][0] for name in reasons), said
    assert len(run.answer["errors"]) == len(reasons)
    assert labels_of(place) == expected_labels


# Rows that are no text


MARKS = {
    "binary.parquet": [
        *("fine", "null_text", "empty_text", "empty_text", "invalid_utf8", "fine", "fine"),
    ],
    "numbers.parquet": ["not_text", "not_text"],
    "lines.csv": ["fine", "empty_text", "invalid_utf8", "unparseable", "fine", "fine"],
    "lines.jsonl": [
        *("fine", "null_text", "empty_text", "fine", "not_text", "null_text", "invalid_utf8"),
        *("unparseable", "fine"),
    ],
    "z.csv": ["fine"],
}


def words(num_bytes: int) -> bytes:
    return b"market " * (num_bytes // 7)


def test_18_rows_without_usable_text_are_marked_and_none_is_lost(
    place: Place, classify: Classify
) -> None:
    binary = [b"fine", None, b"", b" \n\t", b"not \xff utf-8", words(HUGE_BYTES), b"fine"]
    column = pa.array(binary, pa.large_binary())
    place.write("binary.parquet", as_parquet(pa.table({"text": column})))
    place.write("numbers.parquet", as_parquet(pa.table({"text": [1, 2]})))
    place.write(
        "lines.csv",
        b"".join(
            b"%s,%d\n" % line for line in ((b"text", 0), (b"fine", 1), (b"", 2), (b"\xe9t\xe9", 3))
        )
        + b"one field only\nfine,5\n"
        + words(HUGE_BYTES)
        + b",6\n",
    )
    objects = as_jsonl(pa.table({"text": ["fine", None, "", "\ud7ff"]}))
    place.write(
        "lines.jsonl",
        objects + b'{"text": 5}\n{"other": 1}\n{"text": "\xff"}\n{"text": "cut\n{"text": "fine"}\n',
    )
    folder = place.write("z.csv", b"text\nfine\n").removesuffix("z.csv")
    run = classify(place, folder)
    assert run.exit_code == 0
    assert {name: codes_of(place, name) for name in MARKS} == MARKS


def codes_of(place: Place, source_name: str) -> list[str]:
    """What became of each row of an input: `fine`, if it has a label and no error, or its code."""
    (name,) = (n for n in place.visible() if f"/{source_name}-" in n)
    rows = place.rows(name)
    assert rows["row"].to_pylist() == list(range(rows.num_rows))
    return [
        "fine" if error is None and label is not None else str(error).partition(":")[0]
        for label, error in zip(rows["label"].to_pylist(), rows["error"].to_pylist(), strict=True)
    ]
