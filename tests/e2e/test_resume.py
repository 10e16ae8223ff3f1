"""The same command again, other commands into the same output, and shares of an array."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from e2e import archives, outputs

if TYPE_CHECKING:
    from e2e.conftest import Classify

NUM_SHARDS = 6
SHARES = (
    ("--shard-index {} --num-shards {}", "", ""),
    ("", "AWS_BATCH_JOB_ARRAY_INDEX", "AWS_BATCH_JOB_ARRAY_SIZE"),
    ("", "SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT"),
)


@pytest.fixture(scope="module")
def news(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 rows that `--rows-per-shard 2` cuts into six shards."""
    return archives.write(tmp_path_factory.mktemp("news") / "news.csv", archives.articles(12))


@pytest.fixture(scope="module")
def complete(classify: "Classify", news: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete output that nobody may change."""
    output = tmp_path_factory.mktemp("complete") / "out"
    done = classify(news, "--output", output, "--rows-per-shard", "2")
    assert done.returncode == 0, done.stderr
    return output


def labels(output: Path) -> list[tuple[str, str]]:
    rows = outputs.read_source(output, "news.csv").to_pylist()
    return [(row["id"], row["label"]) for row in rows]


def success(output: Path) -> Path:
    return outputs.fingerprint_folder(output) / "_SUCCESS.json"


def test_only_what_is_missing_is_done_again(
    classify: "Classify", news: Path, complete: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    options = ("--output", output, "--rows-per-shard", "2", "--log-format", "json")

    classify(news, *options)
    before = outputs.contents(output)
    again = classify(news, *options)
    assert again.returncode == 0, again.stderr
    summary = json.loads(again.stdout.splitlines()[-1])
    assert summary["num_shards"]["committed"] == 0
    assert summary["num_shards"]["done_before"] == NUM_SHARDS
    assert summary["complete"]
    after = outputs.contents(output)
    assert {name: after[name] for name in before} == before

    files = outputs.output_files(output)
    files[3].unlink()
    third = classify(news, *options)
    assert third.returncode == 0, third.stderr
    assert json.loads(third.stdout.splitlines()[-1])["num_shards"]["committed"] == 1
    repaired = outputs.contents(output)
    assert files[3].exists()
    assert {name for name in before if repaired[name] != before[name]} == {
        str(files[3].relative_to(output))
    }
    assert labels(output) == labels(complete)


def test_other_settings_go_to_another_folder(
    classify: "Classify", news: Path, complete: Path
) -> None:
    options = ("--rows-per-shard", "2", "--max-length", "16", "--dry-run")
    done = classify(news, "--output", complete, *options)
    assert done.returncode == 0, done.stderr
    assert "0 done, 6 to do" in done.stdout
    assert outputs.fingerprint_folder(complete).name not in done.stdout


def test_another_cut_of_the_same_input_is_refused(
    classify: "Classify", news: Path, complete: Path
) -> None:
    before = outputs.contents(complete)
    done = classify(news, "--output", complete, "--rows-per-shard", "3")
    assert done.returncode == 64
    assert "news.csv" in done.stderr
    assert "--rows-per-shard" in done.stderr
    assert outputs.contents(complete) == before


def test_another_input_withdraws_success_until_it_is_done_too(
    classify: "Classify", news: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    classify(news, "--output", output)
    assert success(output).exists()
    (tmp_path / "bad.csv").write_text("id,headline\n1,no text here\n")
    more = archives.write(tmp_path / "more.jsonl", archives.articles(3, seed=1))
    done = classify(news, more, tmp_path / "bad.csv", "--output", output)
    assert done.returncode == 65
    assert not success(output).exists()
    done = classify(news, more, "--output", output)
    assert done.returncode == 0, done.stderr
    assert success(output).exists()


def test_shares_of_an_array_do_each_shard_once_and_the_last_one_marks_success(
    classify: "Classify", news: Path, complete: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    committed = []
    for index, (options, index_name, count_name) in enumerate(SHARES):
        env = {index_name: str(index), count_name: "3"} if index_name else {}
        assert not list(output.glob("fp=*/_SUCCESS.json"))
        done = classify(
            *(news, "--output", output, "--rows-per-shard", "2", "--log-format", "json"),
            *options.format(index, 3).split(),
            env=env,
        )
        assert done.returncode == 0, done.stderr
        committed.append(json.loads(done.stdout.splitlines()[-1])["num_shards"]["committed"])
    assert committed == [2, 2, 2]
    assert success(output).exists()
    assert labels(output) == labels(complete)


def test_a_worker_beyond_the_shards_does_nothing_and_exits_0(
    classify: "Classify", news: Path, tmp_path: Path
) -> None:
    done = classify(
        *(news, "--output", tmp_path / "out"),
        env={"AWS_BATCH_JOB_ARRAY_INDEX": "0", "AWS_BATCH_JOB_ARRAY_SIZE": "3"},
    )
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "env", "words"),
    [
        ("--shard-index 1", {}, "--shard-index is set without --num-shards"),
        ("--num-shards 4", {}, "--num-shards is set without --shard-index"),
        ("--shard-index 4 --num-shards 4", {}, "outside 0 to 3"),
        ("--shard-index -1 --num-shards 4", {}, "outside 0 to 3"),
        ("", {"AWS_BATCH_JOB_ARRAY_INDEX": "1"}, "AWS_BATCH_JOB_ARRAY_SIZE"),
        (
            "",
            {"AWS_BATCH_JOB_ARRAY_INDEX": "x", "AWS_BATCH_JOB_ARRAY_SIZE": "2"},
            "not a whole number",
        ),
        ("", {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_COUNT": "2"}, "SLURM_ARRAY_TASK_ID=7"),
    ],
)
def test_a_share_that_makes_no_sense_is_a_usage_error(
    classify: "Classify",
    news: Path,
    tmp_path: Path,
    options: str,
    env: dict[str, str],
    words: str,
) -> None:
    done = classify(news, "--output", tmp_path / "out", *options.split(), env=env)
    assert done.returncode == 64
    assert words in done.stderr
    assert not (tmp_path / "out").exists()
