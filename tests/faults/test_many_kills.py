"""Four workers over one plan, killed at random moments until all is done."""

import os

import pyarrow as pa
import pytest
from faults.commands import ForkClassify, Verify
from faults.forks import Fork
from faults.inputs import FORMATS, articles
from faults.killing import Massacre, Pace
from faults.places import LocalPlace, Place, labels_of, temporary

NUM_WORKERS = 4
# On a local folder; a fifth of them on each S3, which takes longer.
NUM_KILLS = int(os.environ.get("MANY_KILLS", "100"))
# Small shards and batches: reading, computing and publishing go on at once, and no worker is done
# before it was killed often enough.
ROWS_PER_SHARD = 5
OPTIONS = ("--rows-per-shard", str(ROWS_PER_SHARD), "--max-batch-tokens", "64")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_after_many_kills_every_row_is_there_once_and_nothing_else(
    place: Place, fork_classify: ForkClassify, verify: Verify
) -> None:
    if isinstance(place, LocalPlace):
        num_kills, shards_per_file = NUM_KILLS, 2 * NUM_KILLS
    else:
        num_kills, shards_per_file = NUM_KILLS // 5, NUM_KILLS // 2
    tables, sources = [], []
    for seed, (kind, encode) in enumerate(FORMATS.items()):
        tables.append(articles(shards_per_file * ROWS_PER_SHARD, seed=seed))
        sources.append(place.write(f"news.{kind}", encode(tables[-1])))
    undisturbed = place.with_output("undisturbed")
    pace = Pace.of(fork_classify(undisturbed, *sources, *OPTIONS))

    def start(worker: int) -> Fork:
        share = ("--shard-index", str(worker), "--num-shards", str(NUM_WORKERS))
        return fork_classify(place, *sources, *OPTIONS, *share)

    massacre = Massacre(num_kills, pace)
    massacre.run(NUM_WORKERS, start)
    print(f"killed {dict(massacre.killed)} at up to {pace.longest_s} s")

    assert massacre.killed.total() == num_kills
    assert min(massacre.killed[phase] for phase in pace.longest_s) >= num_kills // 10
    found = labels_of(place)
    assert sorted(found) == sorted(pa.concat_tables(tables)["id"].to_pylist())
    assert found == labels_of(undisturbed)
    assert temporary(place) == []
    assert verify(place, *sources).exit_code == 0
