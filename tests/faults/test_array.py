"""Fault 29: shares of an array that are empty, or make no sense."""

import pytest
from faults.commands import Classify
from faults.inputs import articles, as_csv
from faults.places import LocalPlace, Place

AWS_INDEX, AWS_SIZE = "AWS_BATCH_JOB_ARRAY_INDEX", "AWS_BATCH_JOB_ARRAY_SIZE"
SLURM_INDEX, SLURM_SIZE = "SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT"


def test_29_a_share_without_shards_does_nothing_and_succeeds(
    place: Place, classify: Classify
) -> None:
    source = place.write("news.csv", as_csv(articles(5)))
    run = classify(place, source, env={AWS_INDEX: "0", AWS_SIZE: "8"})
    assert run.exit_code == 0
    assert run.answer["num_shards"]["mine"] == 0
    assert place.names() == []


@pytest.mark.parametrize(
    ("options", "env"),
    [
        (["--shard-index", "4", "--num-shards", "4"], {}),
        (["--shard-index", "-1", "--num-shards", "4"], {}),
        (["--shard-index", "0", "--num-shards", "0"], {}),
        (["--shard-index", "0"], {}),
        (["--num-shards", "4"], {}),
        (["--shard-index", "one", "--num-shards", "4"], {}),
        ([], {AWS_INDEX: "4", AWS_SIZE: "4"}),
        ([], {AWS_INDEX: "4"}),
        ([], {AWS_SIZE: "4"}),
        ([], {AWS_INDEX: "one", AWS_SIZE: "4"}),
        ([], {SLURM_INDEX: "4", SLURM_SIZE: "4"}),
        ([], {SLURM_INDEX: "1"}),
        ([], {SLURM_INDEX: "1", SLURM_SIZE: "many"}),
    ],
)
def test_29_an_index_without_a_size_or_outside_it_is_a_usage_error(
    local: LocalPlace, classify: Classify, options: list[str], env: dict[str, str]
) -> None:
    run = classify(local, "news.csv", *options, env=env)
    assert run.exit_code == 64
    named = [*options[::2], *env]
    assert any(name in run.said for name in named)
    assert local.names() == []
