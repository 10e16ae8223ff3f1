"""What `batchclf classify` writes: rows, columns, layout, footers and notes."""

import json
import re
import statistics
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import models
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from e2e import archives, outputs
from tokenizers import Tokenizer

if TYPE_CHECKING:
    from conftest import RunBatchclf
    from e2e.conftest import Classify

Done = subprocess.CompletedProcess[str]
MAX_LENGTH = 64
NUM_ROWS = 35
SOURCES = ("a.parquet", "b.csv", "c.csv.gz", "d.jsonl", "e.jsonl.gz", "f.parquet", "g.parquet")
PREDICTIONS = ("row", "label", "score", "probs", "n_tokens", "truncated", "error")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("classify")


@pytest.fixture(scope="module")
def plain(classify: "Classify", archive: Path, folder: Path) -> Done:
    """A run over the archive with shards of four rows, into `plain`."""
    return classify(archive, "--output", folder / "plain", "--rows-per-shard", "4")


@pytest.fixture(scope="module")
def labelled(plain: Done, folder: Path) -> Path:
    assert plain.returncode == 0, plain.stderr
    return folder / "plain"


@pytest.fixture(scope="module")
def rows(labelled: Path) -> dict[str, list[dict[str, Any]]]:
    return outputs.read_sources(labelled)


def all_rows(rows: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return [row for name in SOURCES[:-1] for row in rows[name]]


def test_every_input_row_has_one_output_row_in_its_order(
    rows: dict[str, list[dict[str, Any]]],
) -> None:
    articles = archives.articles(NUM_ROWS)
    assert [row["id"] for row in all_rows(rows)] == [row["id"] for row in articles]
    for found in rows.values():
        assert [row["row"] for row in found] == list(range(len(found)))


def test_an_output_has_the_id_and_the_prediction_columns_in_their_declared_types(
    labelled: Path,
) -> None:
    probs = pa.struct([pa.field(label, pa.float32()) for label in models.LABELS])
    expected = pa.schema(
        [
            pa.field("id", pa.string()),
            pa.field("row", pa.int64(), nullable=False),
            pa.field("label", pa.string()),
            pa.field("score", pa.float32()),
            pa.field("probs", probs),
            pa.field("n_tokens", pa.int32(), nullable=False),
            pa.field("truncated", pa.bool_(), nullable=False),
            pa.field("error", pa.string()),
        ]
    )
    for path in outputs.output_files(labelled):
        assert pq.read_schema(path).remove_metadata() == expected, path.name


def test_an_input_without_rows_has_an_output_without_rows(labelled: Path) -> None:
    (empty,) = (p for p in outputs.output_files(labelled) if p.name.startswith("g.parquet"))
    assert pq.read_metadata(empty).num_rows == 0


def test_the_label_is_the_most_probable_one_and_the_score_its_probability(
    rows: dict[str, list[dict[str, Any]]],
) -> None:
    for row in all_rows(rows):
        if row["error"] is None:
            assert sum(row["probs"].values()) == pytest.approx(1, abs=1e-5)
            assert row["label"] == max(row["probs"], key=row["probs"].__getitem__)
            assert row["score"] == row["probs"][row["label"]]


def test_a_row_without_text_has_an_error_code_and_nothing_else(
    rows: dict[str, list[dict[str, Any]]],
) -> None:
    null, empty = rows["a.parquet"][3], rows["b.csv"][2]
    assert null["error"].startswith("null_text:")
    assert empty["error"].startswith("empty_text:")
    for row in (null, empty):
        found = tuple(row[name] for name in ("label", "score", "probs", "n_tokens", "truncated"))
        assert found == (None, None, None, 0, False)


def test_n_tokens_and_truncated_are_those_of_the_tokenizer(
    rows: dict[str, list[dict[str, Any]]], model: Path
) -> None:
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    seen = set()
    for article, row in zip(archives.articles(NUM_ROWS), all_rows(rows), strict=True):
        if row["error"] is None:
            length = len(tokenizer.encode(article["text"]).ids)
            assert row["n_tokens"] == min(length, MAX_LENGTH)
            assert row["truncated"] == (length > MAX_LENGTH)
            seen.add(row["truncated"])
    assert seen == {True, False}


def test_output_names_start_with_the_name_of_their_input(labelled: Path) -> None:
    names = {path.name for path in outputs.output_files(labelled)}
    for source in SOURCES:
        assert any(name.startswith(source) for name in names), source
    assert len(names) == 3 + 2 + 2 + 2 + 1 + 1 + 1


def test_shards_follow_row_groups_and_the_asked_size(labelled: Path) -> None:
    ranges: dict[str, list[tuple[int, int]]] = {}
    for path in outputs.output_files(labelled):
        footer = outputs.footer(path)
        name = footer["source"].rsplit("/", 1)[-1]
        ranges.setdefault(name, []).append((int(footer["start"]), int(footer["stop"])))
    assert sorted(ranges["a.parquet"]) == [(0, 4), (4, 8), (8, 10)]
    assert sorted(ranges["b.csv"]) == [(0, 4), (4, 7)]


def test_the_layout_is_one_fingerprint_folder_with_outputs_a_run_note_and_success(
    labelled: Path,
) -> None:
    (folder,) = labelled.iterdir()
    assert re.fullmatch(r"fp=[0-9a-f]{32}", folder.name)
    others = {name for name in outputs.contents(folder) if not name.endswith(".parquet")}
    (run,) = others - {"_SUCCESS.json"}
    assert re.fullmatch(r"_runs/\d{8}T\d{6}Z-[0-9a-f]{8}\.json", run)


def test_a_footer_says_what_the_output_is_of(labelled: Path, archive: Path) -> None:
    path = next(p for p in outputs.output_files(labelled) if p.name.startswith("a.parquet"))
    footer = outputs.footer(path)
    assert footer["source"] == (archive / "a.parquet").as_uri()
    assert re.fullmatch(r"sha256:[0-9a-f]{64}", footer["source_version"])
    assert (footer["start"], footer["stop"]) == ("0", "4")
    assert (footer["num_rows"], footer["num_labelled"], footer["num_failed"]) == ("4", "3", "1")
    assert f"fp={footer['fingerprint']}" == path.parent.name
    assert footer["nonce"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", footer["finished_at"])
    assert footer["version"]


def test_outputs_are_zstd_with_statistics(labelled: Path) -> None:
    for path in outputs.output_files(labelled):
        metadata = pq.read_metadata(path)
        for group in range(metadata.num_row_groups):
            for column in range(metadata.num_columns):
                chunk = metadata.row_group(group).column(column)
                assert (chunk.compression, chunk.is_stats_set) == ("ZSTD", True)


def test_success_lists_every_planned_shard(labelled: Path) -> None:
    folder = outputs.fingerprint_folder(labelled)
    note = json.loads((folder / "_SUCCESS.json").read_text())
    assert sorted(note["shards"]) == [path.name for path in outputs.output_files(labelled)]
    assert note["num_rows"] == NUM_ROWS


def test_a_run_note_has_settings_counts_speed_and_versions(labelled: Path) -> None:
    (path,) = (outputs.fingerprint_folder(labelled) / "_runs").iterdir()
    note = json.loads(path.read_text())
    assert note["settings"]["cut"]["rows_per_shard"] == 4
    assert note["counts"]["num_rows"] == NUM_ROWS
    assert note["counts"]["num_failed"] == 2
    assert sum(note["labels"].values()) == NUM_ROWS - 2
    assert note["articles_per_s"] > 0
    assert {"batchclf", "torch", "tokenizers", "pyarrow"} <= note["versions"].keys()


def test_a_dataset_reader_takes_the_folder_as_it_is(labelled: Path) -> None:
    dataset = ds.dataset(labelled, partitioning="hive")
    assert dataset.count_rows() == NUM_ROWS
    table = dataset.to_table(filter=ds.field("error").is_valid())
    assert sorted(table["id"].to_pylist()) == ["a-0003", "a-0012"]
    assert table["fp"].unique().to_pylist() == [outputs.fingerprint_folder(labelled).name[3:]]


def test_the_summary_counts_rows_by_label_and_says_how_to_verify(
    plain: Done, labelled: Path, archive: Path
) -> None:
    assert "labelled 35 rows" in plain.stdout
    assert "failed 2" in plain.stdout
    folder = outputs.fingerprint_folder(labelled)
    assert f"batchclf verify {folder} {archive}" in plain.stdout


def test_several_text_columns_are_joined_by_a_newline_in_their_order(
    classify: "Classify", archive: Path, model: Path, tmp_path: Path
) -> None:
    done = classify(
        *(archive / "a.parquet", archive / "d.jsonl", "--output", tmp_path / "out"),
        *("--text-column", "title", "--text-column", "text", "--id-column", "url"),
        *("--keep-columns", "published,title", "--max-length", "32"),
    )
    assert done.returncode == 0, done.stderr
    found = outputs.read_sources(tmp_path / "out")
    assert list(found["a.parquet"][0]) == ["url", "published", "title", *PREDICTIONS]
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    articles = archives.articles(NUM_ROWS)
    for name, first in (("a.parquet", 0), ("d.jsonl", 22)):
        for row, article in zip(found[name], articles[first:], strict=False):
            text = None if article["id"] == "a-0003" else article["text"]
            joined = "\n".join(part for part in (article["title"], text) if part is not None)
            assert row["n_tokens"] == min(len(tokenizer.encode(joined).ids), 32)
            assert row["url"] == article["url"]


def test_all_columns_are_kept_with_their_types_and_the_unsure_labels_withheld(
    classify: "Classify", archive: Path, rows: dict[str, list[dict[str, Any]]], tmp_path: Path
) -> None:
    scores = sorted(row["score"] for row in rows["a.parquet"] if row["error"] is None)
    threshold = statistics.mean(scores[3:5])
    done = classify(
        *(archive / "a.parquet", "--output", tmp_path / "out", "--keep-columns", "all"),
        *("--no-probs", "--min-score", repr(threshold)),
    )
    assert done.returncode == 0, done.stderr
    table = outputs.read_source(tmp_path / "out", "a.parquet")
    kept = table.select(archives.SCHEMA.names)
    assert kept.equals(pq.read_table(archive / "a.parquet"))
    assert table.schema.names[5:] == [name for name in PREDICTIONS if name != "probs"]
    (path,) = outputs.output_files(tmp_path / "out")
    assert int(outputs.footer(path)["num_abstained"]) == 4
    for before, row in zip(rows["a.parquet"], table.to_pylist(), strict=True):
        sure = before["score"] is not None and before["score"] >= threshold
        assert row["label"] == (before["label"] if sure else None)
        assert row["score"] == (None if before["score"] is None else pytest.approx(before["score"]))
        assert row["error"] == before["error"]


def test_no_input_column_is_kept_when_none_is_asked_for(
    classify: "Classify", archive: Path, tmp_path: Path
) -> None:
    inputs = (archive / "*.jsonl", (archive / "b.csv").as_uri())
    done = classify(*inputs, "--output", tmp_path / "out", "--keep-columns", "none")
    assert done.returncode == 0, done.stderr
    found = outputs.read_sources(tmp_path / "out")
    assert {name: len(rows) for name, rows in found.items()} == {"b.csv": 7, "d.jsonl": 6}
    assert list(found["b.csv"][0]) == list(PREDICTIONS)


def test_a_bad_row_stops_the_job_when_errors_are_to_fail(
    classify: "Classify", archive: Path, tmp_path: Path
) -> None:
    done = classify(archive, "--output", tmp_path / "out", "--on-error", "fail")
    assert done.returncode == 65
    assert "a.parquet row 3: null_text" in done.stderr
    assert "--on-error" in done.stderr
    assert not [p for p in outputs.output_files(tmp_path / "out") if "a.parquet" in p.name]
    assert not (outputs.fingerprint_folder(tmp_path / "out") / "_SUCCESS.json").exists()


def test_a_shard_with_too_many_bad_rows_is_not_committed_and_the_others_are(
    classify: "Classify", archive: Path, tmp_path: Path
) -> None:
    # one of ten rows fails in a.parquet, one of seven in b.csv
    done = classify(archive, "--output", tmp_path / "out", "--max-error-rate", "0.1")
    assert done.returncode == 65
    assert "b.csv rows 0 to 7: 1 of 7 rows failed" in done.stderr
    assert "--max-error-rate 0.1" in done.stderr
    assert set(outputs.read_sources(tmp_path / "out")) == set(SOURCES) - {"b.csv"}
    assert not (outputs.fingerprint_folder(tmp_path / "out") / "_SUCCESS.json").exists()


def test_a_limit_takes_the_first_rows_of_the_whole_input(
    classify: "Classify", archive: Path, tmp_path: Path
) -> None:
    inputs = [archive / name for name in ("a.parquet", "b.csv", "d.jsonl")]
    done = classify(*inputs, "--output", tmp_path / "out", "--limit", "13")
    assert done.returncode == 0, done.stderr
    found = outputs.read_sources(tmp_path / "out")
    assert {name: len(rows) for name, rows in found.items()} == {"a.parquet": 10, "b.csv": 3}
    assert (outputs.fingerprint_folder(tmp_path / "out") / "_SUCCESS.json").exists()


def test_a_dry_run_shows_the_plan_and_writes_nothing(
    classify: "Classify", archive: Path, tmp_path: Path, plain: Done, labelled: Path
) -> None:
    options = ("--rows-per-shard", "4", "--dry-run")
    done = classify(archive, "--output", tmp_path / "out", *options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("to do ") == 12
    assert f"{archive / 'a.parquet'} rows 4 to 8" in done.stdout
    assert "35 rows" in done.stdout
    assert list(tmp_path.iterdir()) == []

    before = outputs.contents(labelled)
    done = classify(archive, "--output", labelled, *options)
    assert "12 done, 0 to do" in done.stdout
    assert outputs.contents(labelled) == before


def test_options_can_come_from_the_environment(
    run_batchclf: "RunBatchclf",
    model: Path,
    archive: Path,
    labelled: Path,
    tmp_path: Path,
) -> None:
    values = {
        "MODEL": str(model),
        "OUTPUT": str(labelled),
        "DTYPE": "float32",
        "TEXT_COLUMN": "text",
        "ROWS_PER_SHARD": "4",
        "DRY_RUN": "1",
    }
    env = {f"BATCHCLF_CLASSIFY_{name}": value for name, value in values.items()}
    done = run_batchclf("classify", archive, env=env)
    assert done.returncode == 0, done.stderr
    assert "12 done, 0 to do" in done.stdout


def test_numbers_for_cloudwatch_stand_alone_on_standard_output(
    classify: "Classify", archive: Path, folder: Path
) -> None:
    done = classify(archive, "--output", folder / "numbers", "--metrics", "emf")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert {line["Command"] for line in lines} == {"classify"}
    (directive,) = lines[-1]["_aws"]["CloudWatchMetrics"]
    assert directive["Dimensions"] == [["Command"]]
    expected = {
        "ArticlesLabelled": NUM_ROWS,
        "ArticlesFailed": 2,
        "ShardsCommitted": len(SOURCES),
        "InputsNotDone": 0,
    }
    assert {name: sum(line[name] for line in lines) for name in expected} == expected
    assert lines[-1]["ArticlesPerSecond"] > 0
    assert "labelled 35 rows in 7 shards" in done.stderr


def test_numbers_of_a_run_that_gives_up_are_told_too(
    classify: "Classify", archive: Path, tmp_path: Path
) -> None:
    options = ("--on-error", "fail", "--metrics", "emf")
    done = classify(archive, "--output", tmp_path / "out", *options)
    assert done.returncode != 0
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert sum(line["InputsNotDone"] for line in lines) == 1
