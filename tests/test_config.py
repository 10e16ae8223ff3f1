import pytest
from hypothesis import given, strategies as st

from batchclf.config import Keep, ReadSettings, Share, describe_names, find_share
from batchclf.errors import ConfigError, InputError

BATCH = {"AWS_BATCH_JOB_ARRAY_INDEX": "2", "AWS_BATCH_JOB_ARRAY_SIZE": "5"}
SLURM = {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "3"}

# Shares


@pytest.mark.parametrize(
    ("environment", "share"), [({}, Share(0, 1)), (BATCH, Share(2, 5)), (SLURM, Share(1, 3))]
)
def test_a_share_comes_from_the_array_that_the_job_is_part_of(
    environment: dict[str, str], share: Share
) -> None:
    assert find_share(None, None, environment) == share


def test_options_win_over_every_array() -> None:
    assert find_share(0, 2, {**BATCH, **SLURM}) == Share(0, 2)


def test_aws_batch_wins_over_slurm() -> None:
    assert find_share(None, None, {**BATCH, **SLURM}) == Share(2, 5)


def test_an_empty_variable_is_none() -> None:
    assert find_share(None, None, {**dict.fromkeys(BATCH, ""), **SLURM}) == Share(1, 3)


@pytest.mark.parametrize("names", [tuple(BATCH), tuple(SLURM)])
@pytest.mark.parametrize("values", [("-1", "4"), ("4", "4"), ("0", "0"), ("0", "-1")])
def test_an_index_outside_its_array_is_refused_by_the_names_of_both(
    names: tuple[str, str], values: tuple[str, str]
) -> None:
    with pytest.raises(ConfigError, match=f"{names[0]}={values[0]} with {names[1]}={values[1]}"):
        find_share(None, None, dict(zip(names, values, strict=True)))


@pytest.mark.parametrize(("index", "count"), [(-1, 4), (4, 4), (0, 0)])
def test_an_index_outside_the_options_is_refused(index: int, count: int) -> None:
    with pytest.raises(ConfigError, match=f"--shard-index={index} with --num-shards={count}"):
        find_share(index, count, {})


@pytest.mark.parametrize("name", [*BATCH, *SLURM])
def test_one_variable_without_the_other_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name} is set without .*; set both or neither$"):
        find_share(None, None, {name: "1"})


def test_an_option_is_not_completed_from_the_environment() -> None:
    with pytest.raises(ConfigError, match="--shard-index is set without --num-shards"):
        find_share(0, None, BATCH)
    with pytest.raises(ConfigError, match="--num-shards is set without --shard-index"):
        find_share(None, 3, BATCH)


@pytest.mark.parametrize("name", [*BATCH, *SLURM])
@pytest.mark.parametrize("value", ["two", "1.0", "0x1"])
def test_a_variable_that_is_no_whole_number_is_refused_by_name(name: str, value: str) -> None:
    environment = {**(BATCH if name in BATCH else SLURM), name: value}
    with pytest.raises(ConfigError, match=f"{name}='{value}' is not a whole number"):
        find_share(None, None, environment)


# Columns

COLUMNS = ("title", "id", "text", "url")


@pytest.mark.parametrize(
    ("keep", "kept"),
    [
        ("id", ("id",)),
        ("all", COLUMNS),
        ("none", ()),
        (("url", "title"), ("id", "url", "title")),
        (("url", "id"), ("url", "id")),
        (("url", "url"), ("id", "url")),
    ],
)
def test_what_is_kept_by_default_has_the_id_first(keep: Keep, kept: tuple[str, ...]) -> None:
    assert ReadSettings(keep=keep).kept_columns(COLUMNS, "in.csv") == kept


@pytest.mark.parametrize(
    ("keep", "kept"),
    [
        ("id", ("url",)),
        ("all", COLUMNS),
        ("none", ()),
        (("title",), ("url", "title")),
        (("title", "url"), ("title", "url")),
    ],
)
def test_a_named_id_column_takes_the_place_of_id(keep: Keep, kept: tuple[str, ...]) -> None:
    settings = ReadSettings(id_column="url", keep=keep)
    assert settings.kept_columns(COLUMNS, "in.csv") == kept


@pytest.mark.parametrize(("keep", "kept"), [("id", ()), (("url",), ("url",))])
def test_an_input_without_an_id_has_none(keep: Keep, kept: tuple[str, ...]) -> None:
    assert ReadSettings(keep=keep).kept_columns(("text", "url"), "in.csv") == kept


def test_a_missing_kept_column_is_an_error_that_lists_the_columns() -> None:
    with pytest.raises(
        InputError,
        match=r"in\.csv: no column 'date'; it has the columns title, id, text, url\. .*--keep-col",
    ):
        ReadSettings(keep=("date",)).kept_columns(COLUMNS, "in.csv")


@pytest.mark.parametrize("keep", ["id", "all", ("title",)])
def test_a_missing_id_column_is_an_error_that_lists_the_columns(keep: Keep) -> None:
    settings = ReadSettings(id_column="key", keep=keep)
    with pytest.raises(
        InputError, match=r"no id column 'key'; it has the columns title.*--id-column"
    ):
        settings.kept_columns(COLUMNS, "in.csv")


def test_a_missing_text_column_is_an_error_that_lists_the_columns() -> None:
    with pytest.raises(
        InputError,
        match=r"in\.csv: no text column 'body'; it has the columns title, id.*--text-column",
    ):
        ReadSettings(("title", "body")).check_text_columns(COLUMNS, "in.csv")


@pytest.mark.parametrize(("header", "written"), [("id;text", ";"), ("id\ttext", r"\\t")])
def test_a_header_in_one_piece_makes_the_advice_a_delimiter(header: str, written: str) -> None:
    with pytest.raises(InputError, match=f"set --delimiter '{written}'"):
        ReadSettings().check_text_columns((header,), "in.csv")


def test_a_text_column_that_stands_there_twice_is_an_error() -> None:
    with pytest.raises(InputError, match="the text column 'text' stands there 2 times"):
        ReadSettings().check_text_columns(("text", "id", "text"), "in.csv")


@pytest.mark.parametrize("keep", ["id", "all", ("id",)])
def test_a_kept_column_that_stands_there_twice_is_an_error(keep: Keep) -> None:
    with pytest.raises(InputError, match="the column 'id' stands there 2 times"):
        ReadSettings(keep=keep).kept_columns(("id", "text", "id"), "in.csv")


def test_columns_that_nobody_asked_for_may_stand_there_twice() -> None:
    columns = ("id", "text", "tag", "tag")
    ReadSettings().check_text_columns(columns, "in.csv")
    assert ReadSettings().kept_columns(columns, "in.csv") == ("id",)


def test_no_text_column_is_refused() -> None:
    with pytest.raises(ConfigError, match="name at least one text column"):
        ReadSettings(text_columns=())


def test_a_text_column_named_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="named twice: title, text, title"):
        ReadSettings(text_columns=("title", "text", "title"))


@pytest.mark.parametrize("delimiter", ["", ",,", '"', "\n", "\r"])
def test_a_delimiter_that_csv_cannot_have_is_refused(delimiter: str) -> None:
    with pytest.raises(ConfigError, match="delimiter must be one character"):
        ReadSettings(delimiter=delimiter)


# Messages


def test_no_names_are_no_columns() -> None:
    assert describe_names([]) == "no columns"


@given(st.integers(1, 60), st.integers(1, 30))
def test_a_list_of_names_says_how_many_it_leaves_out(count: int, most: int) -> None:
    described = describe_names([f"c{i}" for i in range(count)], most)
    shown, _, rest = described.removeprefix("the columns ").partition(" and ")
    assert len(shown.split(", ")) == min(count, most)
    assert rest == (f"{count - most} more" if count > most else "")


def test_names_that_could_spoil_a_log_line_are_escaped_and_cut() -> None:
    assert describe_names(["ü", "a\x1b[31m\nb", "x" * 1000]) == (
        "the columns ü, a\\x1b[31m\\nb, " + "x" * 100 + "..."
    )
