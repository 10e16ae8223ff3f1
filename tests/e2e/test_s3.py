"""The whole way on S3: the same command, layout and answers as on local folders."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from e2e import archives, outputs
from e2e.conftest import QUIET
from fault_proxy import FaultProxy
from fault_rules import Fault, Match, Status
from servers import Endpoint

if TYPE_CHECKING:
    from conftest import RunBatchclf
    from e2e.conftest import Classify

SOURCES = ("a.parquet", "b.csv", "e.jsonl.gz")
SCORE_TOLERANCE = 1e-5
ODD_KEY = "in/2024/a b+c%20ü=(1).csv"

# source -> id -> label and score
Answers = dict[str, dict[str, tuple[str | None, float | None]]]


def upload(server: Endpoint, bucket: str, archive: Path) -> None:
    for name in SOURCES:
        server.s3.upload_file(str(archive / name), bucket, f"in/{name}")


def download(server: Endpoint, bucket: str, prefix: str, folder: Path) -> Path:
    """A copy of the objects under a prefix; returns the folder that it is."""
    for page in server.s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
        for item in page.get("Contents", []):
            path = folder / item["Key"]
            path.parent.mkdir(parents=True, exist_ok=True)
            server.s3.download_file(bucket, item["Key"], str(path))
    return folder / prefix


@pytest.fixture(scope="module")
def local_answers(
    classify: "Classify", archive: Path, tmp_path_factory: pytest.TempPathFactory
) -> Answers:
    output = tmp_path_factory.mktemp("local") / "out"
    done = classify(*(archive / name for name in SOURCES), "--output", output)
    assert done.returncode == 0, done.stderr
    return answers(output)


def answers(output: Path) -> Answers:
    return {
        name: {row["id"]: (row["label"], row["score"]) for row in rows}
        for name, rows in outputs.read_sources(output).items()
    }


def test_prefix_in_prefix_out_done_once_and_verified(
    classify: "Classify",
    run_batchclf: "RunBatchclf",
    archive: Path,
    local_answers: Answers,
    s3_server: Endpoint,
    bucket: str,
    tmp_path: Path,
) -> None:
    upload(s3_server, bucket, archive)
    odd = archives.write(tmp_path / "odd.csv", archives.articles(3, seed=5))
    s3_server.s3.upload_file(str(odd), bucket, ODD_KEY)
    s3_server.s3.put_object(Bucket=bucket, Key="in/_tmp/half.csv", Body=b"not for us\n")
    command = (f"s3://{bucket}/in/", "--output", f"s3://{bucket}/out", "--log-format", "json")
    # the URL as an option, all else from the environment
    env = {k: v for k, v in s3_server.env.items() if k != "AWS_ENDPOINT_URL"}
    url = ("--endpoint-url", s3_server.endpoint_url)

    done = classify(*command, *url, env=env)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["num_shards"]["committed"] == len(SOURCES) + 1
    assert summary["output"].startswith(f"s3://{bucket}/out/fp=")

    copy = download(s3_server, bucket, "out", tmp_path)
    found = answers(copy)
    assert len(found.pop(ODD_KEY.rsplit("/", 1)[-1])) == 3
    assert found.keys() == local_answers.keys()
    for name, expected in local_answers.items():
        assert found[name].keys() == expected.keys()
        for row_id, answer in expected.items():
            assert found[name][row_id] == pytest.approx(answer, abs=SCORE_TOLERANCE)
    others = {name for name in outputs.contents(copy) if not name.endswith(".parquet")}
    assert {name.split("/")[1] for name in others} == {"_SUCCESS.json", "_runs"}
    assert s3_server.endpoint_url not in "".join(
        content.decode() for name, content in outputs.contents(copy).items() if name in others
    )

    again = classify(*command, env=dict(s3_server.env))
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["num_shards"]["done_before"] == len(SOURCES) + 1

    for inputs in ((), (f"s3://{bucket}/in/",)):
        verdict = run_batchclf(
            *("verify", f"s3://{bucket}/out", *inputs), env={**QUIET, **s3_server.env}
        )
        assert verdict.returncode == 0, verdict.stdout + verdict.stderr
        assert "complete and whole: 4 shards, 24 rows" in verdict.stdout


@pytest.mark.parametrize(
    ("given", "output", "exit_code", "words"),
    [
        ("s3://{bucket}-gone/in/", "s3://{bucket}/out", 65, "there is no such bucket"),
        ("s3://{bucket}/gone/", "s3://{bucket}/out", 65, "s3://{bucket}/gone/: no .parquet"),
        ("s3://{bucket}/in/gone.csv", "s3://{bucket}/out", 65, "s3://{bucket}/in/gone.csv: no "),
        ("s3://{bucket}/in/", "s3://{bucket}-gone/out", 64, "there is no such bucket"),
    ],
)
def test_a_place_that_is_not_there_is_an_error(
    classify: "Classify",
    archive: Path,
    s3_server: Endpoint,
    bucket: str,
    given: str,
    output: str,
    exit_code: int,
    words: str,
) -> None:
    upload(s3_server, bucket, archive)
    done = classify(
        given.format(bucket=bucket), "--output", output.format(bucket=bucket), env=s3_server.env
    )
    assert done.returncode == exit_code, done.stderr
    assert words.format(bucket=bucket) in done.stderr
    assert not s3_server.s3.list_objects_v2(Bucket=bucket, Prefix="out").get("Contents")


@pytest.mark.parametrize(
    ("given", "output", "words"),
    [
        ("s3://bucket/in/", "s3://bucket/in/out", "inside the input"),
        ("s3://bucket/in", "s3://bucket/in", "inside the input"),
        ("s3://bucket/in/", "s3://", "write s3://bucket/prefix"),
    ],
)
def test_an_output_that_makes_no_sense_is_refused_before_anything_is_asked(
    classify: "Classify", given: str, output: str, words: str
) -> None:
    done = classify(given, "--output", output, "--endpoint-url", "http://127.0.0.1:1")
    assert done.returncode == 64, done.stderr
    assert words in done.stderr


def test_a_bucket_of_another_region_is_told_with_its_region(
    classify: "Classify",
    proxy: FaultProxy,
    proxied: Endpoint,
    bucket: str,
    tmp_path: Path,
) -> None:
    headers = {"x-amz-bucket-region": "eu-west-3"}
    proxy.add(Fault(Match(), Status(400, "AuthorizationHeaderMalformed", headers=headers)))
    done = classify(f"s3://{bucket}/in/", "--output", tmp_path / "out", env=proxied.env)
    assert done.returncode == 64, done.stderr
    assert f"s3://{bucket}/in/: the bucket is in another region" in done.stderr
    assert "AWS_REGION=eu-west-3" in done.stderr
