"""A report of an output on S3, whole objects and parts of large ones."""

import pyarrow as pa
import pytest
from labelled_outputs import LABELS, commit, note_run, note_success

from batchclf import report_job
from batchclf.report_job import make_report
from batchclf.sink import Sink
from batchclf.store import open_folder

pytestmark = pytest.mark.usefixtures("s3_of_this_process")


@pytest.mark.parametrize("whole_bytes", [8 << 20, 0], ids=["whole", "in parts"])
def test_an_output_on_s3_is_counted(
    bucket: str, monkeypatch: pytest.MonkeyPatch, whole_bytes: int
) -> None:
    monkeypatch.setattr(report_job, "_WHOLE_BYTES", whole_bytes)
    sink = Sink(open_folder(f"s3://{bucket}/out"), "0f", LABELS, probs=True)
    columns = {"published": pa.array(["2024-01-01", "2024-01-02"])}
    names = [commit(sink, f"s3://{bucket}/{name}.csv", columns, [0, 1]) for name in "ab"]
    sink.folder.put(f"{sink.prefix}torn.parquet", b"PAR1")
    note_run(sink)
    note_success(sink, names)
    found = make_report(f"s3://{bucket}/out")
    assert found.counts.num_rows == 4
    assert (found.plan.complete, found.plan.num_there) == (True, 2)
    assert found.dates is not None
    assert found.dates.periods is not None
    assert found.dates.periods.totals == (2, 2)
    (problem,) = found.problems
    assert problem.startswith("torn.parquet: not a whole Parquet file")
    assert found.verify.startswith(f"batchclf verify s3://{bucket}/out/fp=0f")
