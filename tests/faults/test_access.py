"""Fault 14: a store that refuses us."""

import pyarrow as pa
import pytest
from fault_proxy import FaultProxy
from fault_rules import Fault, Match, Status
from faults.commands import COMMIT, Classify
from faults.inputs import articles, as_csv
from faults.places import S3Place, labels_of


def test_14_an_input_that_may_not_be_read_is_an_error_and_the_others_go_on(
    s3: S3Place, proxy: FaultProxy, classify: Classify, news: pa.Table
) -> None:
    others = articles(5, seed=1)
    sources = [s3.write("news.csv", as_csv(news)), s3.write("others.csv", as_csv(others))]
    proxy.add(Fault(Match(operation="GetObject", path="/in/news.csv"), Status(403)))
    run = classify(s3, *sources)
    assert run.exit_code == 65
    assert "news.csv: the store answered 403 AccessDenied" in run.said
    assert list(labels_of(s3)) == others["id"].to_pylist()


def test_14_inputs_that_may_not_be_listed_are_an_error(
    s3: S3Place, proxy: FaultProxy, classify: Classify
) -> None:
    proxy.add(Fault(Match(operation="ListObjectsV2"), Status(403)))
    run = classify(s3, f"s3://{s3.bucket}/in/")
    assert run.exit_code == 65
    assert f"s3://{s3.bucket}/in/: the store answered 403 AccessDenied" in run.said


@pytest.mark.parametrize("match", [Match(method="PUT"), COMMIT], ids=["probe", "commit"])
def test_14_an_output_that_may_not_be_written_is_an_error_of_configuration(
    s3: S3Place, proxy: FaultProxy, classify: Classify, news: pa.Table, match: Match
) -> None:
    source = s3.write("news.csv", as_csv(news))
    proxy.add(Fault(match, Status(403)))
    run = classify(s3, source)
    assert run.exit_code == 64
    assert "the store answered 403 AccessDenied" in run.said
    assert s3.visible() == []


@pytest.mark.parametrize(
    "match", [Match(), Match(method="PUT")], ids=["from-the-start", "in-the-middle"]
)
def test_14_expired_credentials_are_said_to_be_so(
    s3: S3Place, proxy: FaultProxy, classify: Classify, news: pa.Table, match: Match
) -> None:
    source = s3.write("news.csv", as_csv(news))
    proxy.add(Fault(match, Status(400, code="ExpiredToken", message="The token has expired.")))
    run = classify(s3, source)
    assert run.exit_code == 64
    assert "the credentials are not accepted (ExpiredToken The token has expired.)" in run.said


def test_14_without_credentials_it_is_said_how_to_give_them(
    s3: S3Place, classify: Classify, news: pa.Table
) -> None:
    source = s3.write("news.csv", as_csv(news))
    run = classify(s3, source, env={"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""})
    assert run.exit_code == 64
    assert "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in run.said
