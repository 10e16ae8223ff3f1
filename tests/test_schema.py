import pyarrow as pa
import pytest
from hypothesis import given, strategies as st

from batchclf.schema import PREDICTION_COLUMNS, output_name, output_schema, prediction_fields

LABELS = ("business", "sport")
PROBS = pa.struct([pa.field("business", pa.float32()), pa.field("sport", pa.float32())])


def test_the_columns_that_are_added_have_the_types_of_the_contract() -> None:
    fields = [(f.name, f.type, f.nullable) for f in prediction_fields(LABELS, probs=True)]
    assert fields == [
        ("row", pa.int64(), False),
        ("label", pa.string(), True),
        ("score", pa.float32(), True),
        ("probs", PROBS, True),
        ("n_tokens", pa.int32(), False),
        ("truncated", pa.bool_(), False),
        ("error", pa.string(), True),
    ]


def test_without_probs_the_other_columns_are_the_same() -> None:
    fields = prediction_fields(LABELS, probs=True)
    assert prediction_fields(LABELS, probs=False) == [f for f in fields if f.name != "probs"]


def test_kept_columns_stand_first_with_their_own_types() -> None:
    kept = pa.schema([("id", pa.int32()), ("tags", pa.list_(pa.string()))])
    schema = output_schema(kept, LABELS, probs=True)
    assert list(schema)[:2] == list(kept)
    assert schema.names[2:] == list(PREDICTION_COLUMNS)


@pytest.mark.parametrize("name", ["id", "text", "labels", "row_number", "Überschrift", ""])
def test_a_name_that_is_not_ours_stays(name: str) -> None:
    assert output_name(name, (name,)) == name


@pytest.mark.parametrize("name", [*PREDICTION_COLUMNS, "Label", "ROW"])
def test_a_name_of_ours_in_any_case_is_renamed(name: str) -> None:
    assert output_name(name, (name,)) == f"input_{name}"


def test_a_renamed_column_does_not_take_the_name_of_another() -> None:
    assert output_name("label", ("label", "INPUT_label")) == "input_input_label"


names_like_ours = st.builds(
    lambda prefix, name, upper: prefix + (name.upper() if upper else name),
    st.sampled_from(["", "input_", "input_input_"]),
    st.sampled_from(PREDICTION_COLUMNS[:3]),
    st.booleans(),
)


@given(st.lists(names_like_ours, unique_by=str.lower, max_size=12))
def test_names_that_differ_without_case_still_do_when_renamed_and_none_is_ours(
    names: list[str],
) -> None:
    renamed = [output_name(name, names).lower() for name in names]
    assert len({*renamed, *PREDICTION_COLUMNS}) == len(names) + len(PREDICTION_COLUMNS)
