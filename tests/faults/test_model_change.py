"""Fault 30: the model directory holds other weights at the next attempt."""

import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from faults.commands import Classify, Verify
from faults.inputs import as_csv
from faults.places import Place, labels_of


@pytest.fixture
def folders(
    place: Place,
    classify: Classify,
    model: Path,
    other_model: Path,
    news: pa.Table,
    tmp_path: Path,
) -> tuple[str, str]:
    """`fp=...` of half the shards by one model, and of all by the one that took its place."""
    changing = tmp_path / "model"
    source = place.write("news.csv", as_csv(news))
    shutil.copytree(model, changing)
    half = ("--rows-per-shard", "30", "--shard-index", "0", "--num-shards", "2")
    first = classify(place, source, *half, model=changing)
    shutil.rmtree(changing)
    shutil.copytree(other_model, changing)
    second = classify(place, source, "--rows-per-shard", "30", model=changing)
    assert (first.exit_code, first.num_committed) == (0, 1)
    assert (second.exit_code, second.num_committed, second.num_done_before) == (0, 2, 0)
    before, after = (run.answer["output"].rpartition("/")[2] for run in (first, second))
    return before, after


def test_30_a_new_model_starts_a_folder_of_its_own_and_verify_tells_of_both(
    place: Place, verify: Verify, news: pa.Table, folders: tuple[str, str]
) -> None:
    before, after = folders
    assert before != after
    assert (len(labels_of(place, before)), len(labels_of(place, after))) == (30, 60)
    for name in place.visible():
        footer = pq.read_metadata(pa.BufferReader(place.read_output(name))).metadata
        assert f"fp={footer[b'batchclf.fingerprint'].decode()}" == name.partition("/")[0]
    proof = verify(place)
    assert proof.exit_code == 65
    assert "holds the outputs of 2 fingerprints" in proof.said
    assert verify(place, under=after).exit_code == 0
