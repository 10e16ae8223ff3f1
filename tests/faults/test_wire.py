"""Faults 8 to 11: throttling, bodies cut short, bytes flipped, connections reset."""

from collections.abc import Callable

import pyarrow as pa
import pytest
from fault_proxy import FaultProxy
from fault_rules import Fault, FlipReply, FlipRequest, Hold, Match, Reset, Status, Truncate
from faults.commands import COMMIT, FEW_ATTEMPTS, START_S, Classify, StartClassify, Verify, end_of
from faults.inputs import FORMATS, as_csv, as_parquet, flip_byte
from faults.places import LocalPlace, Place, S3Place, labels_of

READ = Match(operation="GetObject", path="/in/")


@pytest.mark.parametrize("stormy", [Match(), COMMIT], ids=["everywhere", "at-the-commit"])
def test_8_a_storm_of_503_ends_in_try_again_and_nothing_is_visible(
    s3: S3Place, proxy: FaultProxy, classify: Classify, news: pa.Table, stormy: Match
) -> None:
    source = s3.write("news.csv", as_csv(news))
    proxy.add(Fault(stormy, Status(503)))
    run = classify(s3, source, env=FEW_ATTEMPTS)
    assert run.exit_code == 75
    assert "503 SlowDown" in run.said
    assert s3.visible() == []


def test_8_a_few_503_at_every_kind_of_request_are_waited_out(
    s3: S3Place,
    proxy: FaultProxy,
    classify: Classify,
    news: pa.Table,
    expected_labels: dict[str, str | None],
) -> None:
    source = s3.write("news.csv", as_csv(news))
    operations = ("ListObjectsV2", "GetObject", "HeadObject", "PutObject")
    gusts = [proxy.add(Fault(Match(operation=o), Status(503), times=2)) for o in operations]
    assert classify(s3, source).exit_code == 0
    assert [proxy.hits(gust) for gust in gusts] == [2, 2, 2, 2]
    assert labels_of(s3) == expected_labels


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_9_a_body_cut_short_is_read_again_whole(
    s3: S3Place,
    proxy: FaultProxy,
    classify: Classify,
    news: pa.Table,
    expected_labels: dict[str, str | None],
    kind: str,
) -> None:
    source = s3.write(f"news.{kind}", FORMATS[kind](news))
    cut = proxy.add(Fault(READ, Truncate(), times=3))
    assert classify(s3, source).exit_code == 0
    assert proxy.hits(cut) == 3
    assert labels_of(s3) == expected_labels


def test_9_a_body_that_is_always_cut_short_ends_in_try_again(
    s3: S3Place, proxy: FaultProxy, classify: Classify, news: pa.Table
) -> None:
    source = s3.write("news.csv", as_csv(news))
    proxy.add(Fault(READ, Truncate()))
    assert classify(s3, source).exit_code == 75
    assert s3.visible() == []


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_10_a_byte_flipped_on_the_way_in_is_noticed_and_read_again(
    s3: S3Place,
    proxy: FaultProxy,
    classify: Classify,
    news: pa.Table,
    expected_labels: dict[str, str | None],
    kind: str,
) -> None:
    source = s3.write(f"news.{kind}", FORMATS[kind](news))
    flip = proxy.add(Fault(READ, FlipReply(), times=2))
    assert classify(s3, source).exit_code == 0
    assert proxy.hits(flip) == 2
    assert labels_of(s3) == expected_labels


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_10_a_byte_that_is_always_flipped_on_the_way_in_is_never_labelled(
    s3: S3Place, proxy: FaultProxy, classify: Classify, news: pa.Table, kind: str
) -> None:
    source = s3.write(f"news.{kind}", FORMATS[kind](news))
    proxy.add(Fault(READ, FlipReply()))
    assert classify(s3, source).exit_code == 75
    assert s3.visible() == []


@pytest.mark.parametrize("s3_server", ["moto"], indirect=True)  # ministack forgets the parts
def test_10_a_byte_flipped_in_an_object_that_went_up_in_parts_is_noticed_and_read_again(
    s3: S3Place,
    proxy: FaultProxy,
    classify: Classify,
    news: pa.Table,
    expected_labels: dict[str, str | None],
) -> None:
    """Which is how every large one does, and then S3 has no checksum over all of it."""
    body = as_csv(news) + b"\n" * (12 << 20)  # blank lines are no rows
    source = s3.write_parts(
        "news.csv", [body[: 5 << 20], body[5 << 20 : 11 << 20], body[11 << 20 :]]
    )
    flip = proxy.add(Fault(READ, FlipReply(), times=1))
    assert classify(s3, source).exit_code == 0
    assert proxy.hits(flip) == 1
    assert len(proxy.log(READ)) == 3  # for the plan, again, and to label
    assert labels_of(s3) == expected_labels


def test_10_a_byte_flipped_in_a_page_of_a_local_parquet_is_never_labelled(
    local: LocalPlace, classify: Classify, news: pa.Table
) -> None:
    content = as_parquet(news)
    source = local.write("news.parquet", flip_byte(content, content.index(b"PAR1", 1) // 4))
    run = classify(local, source)
    assert run.exit_code == 65
    assert "news.parquet: not a readable Parquet file" in run.said
    assert local.visible() == []


@pytest.mark.parametrize("s3_server", ["ministack"], indirect=True)  # moto does not look
def test_10_a_byte_flipped_on_the_way_out_is_refused_and_sent_again(
    s3: S3Place, proxy: FaultProxy, classify: Classify, verify: Verify, news: pa.Table
) -> None:
    source = s3.write("news.csv", as_csv(news))
    flip = proxy.add(Fault(COMMIT, FlipRequest(), times=1))
    assert classify(s3, source).exit_code == 0
    assert proxy.hits(flip) == 1
    assert [exchange.status for exchange in proxy.log(COMMIT)] == [400, 200]
    assert verify(s3, source).exit_code == 0


def test_10_bytes_that_always_arrive_damaged_end_in_try_again(
    s3: S3Place, proxy: FaultProxy, classify: Classify, news: pa.Table
) -> None:
    """AWS answers an upload that does not fit its checksum with 400 BadDigest."""
    source = s3.write("news.csv", as_csv(news))
    proxy.add(Fault(COMMIT, Status(400, code="BadDigest")))
    assert classify(s3, source).exit_code == 75
    assert s3.visible() == []


@pytest.mark.parametrize("s3_server", ["moto"], indirect=True)  # ministack refuses it
def test_10_a_byte_flipped_on_the_way_into_a_careless_store_is_found_by_verify(
    s3: S3Place, proxy: FaultProxy, classify: Classify, verify: Verify, news: pa.Table
) -> None:
    source = s3.write("news.csv", as_csv(news))
    proxy.add(Fault(COMMIT, FlipRequest(), times=1))
    classify(s3, source)
    (name,) = s3.visible()
    proof = verify(s3, source)
    assert proof.exit_code == 65
    (problem,) = proof.answer["problems"]
    assert f"{name.rpartition('/')[2]}: damaged" in problem


@pytest.mark.parametrize(
    "index",
    [lambda content: len(content) // 8, lambda content: content.rindex(b"label")],
    ids=["in-a-page", "in-a-column-name"],
)
def test_10_a_byte_flipped_in_a_stored_output_is_found_by_verify(
    place: Place,
    classify: Classify,
    verify: Verify,
    news: pa.Table,
    index: Callable[[bytes], int],
) -> None:
    source = place.write("news.csv", as_csv(news))
    assert classify(place, source).exit_code == 0
    (name,) = place.visible()
    content = place.read_output(name)
    place.write_output(name, flip_byte(content, index(content)))
    proof = verify(place, source)
    assert proof.exit_code == 65
    assert [name.rpartition("/")[2] in problem for problem in proof.answer["problems"]] == [True]


def test_11_a_connection_reset_at_any_kind_of_request_is_made_again(
    s3: S3Place,
    proxy: FaultProxy,
    classify: Classify,
    news: pa.Table,
    expected_labels: dict[str, str | None],
) -> None:
    source = s3.write("news.csv", as_csv(news))
    operations = ("ListObjectsV2", "GetObject", "HeadObject", "PutObject")
    resets = [proxy.add(Fault(Match(operation=o), Reset(), times=1)) for o in operations]
    assert classify(s3, source).exit_code == 0
    assert [proxy.hits(reset) for reset in resets] == [1, 1, 1, 1]
    assert labels_of(s3) == expected_labels


def test_11_a_connection_reset_in_the_middle_of_a_body_is_read_again_whole(
    s3: S3Place,
    proxy: FaultProxy,
    start_classify: StartClassify,
    news: pa.Table,
    expected_labels: dict[str, str | None],
) -> None:
    source = s3.write("news.csv", as_csv(news))
    hold = Hold("body")
    held = proxy.add(Fault(READ, hold, times=1))
    process = start_classify(s3, source)
    proxy.wait_for(held, START_S)
    hold.drop()
    assert end_of(process).exit_code == 0
    assert labels_of(s3) == expected_labels


def test_11_connections_that_are_always_reset_end_in_try_again(
    s3: S3Place, proxy: FaultProxy, classify: Classify, news: pa.Table
) -> None:
    source = s3.write("news.csv", as_csv(news))
    proxy.add(Fault(Match(), Reset()))
    assert classify(s3, source, env=FEW_ATTEMPTS).exit_code == 75
