"""One object for which a store fails is no outage; five in a row, or no answer at all, are."""

import pytest

from batchclf.errors import CredentialsError, StoreError
from batchclf.outage import MOST_FAILED, OutageWatch

ILL = StoreError("s3://news/in/a.csv: 503")


def answers() -> None:
    """As a store that is well."""


def test_objects_of_a_few_messages_are_no_outage() -> None:
    watch = OutageWatch(answers)
    for number in range(MOST_FAILED - 1):
        watch.check(f"message {number}", ILL)


def test_the_same_message_again_and_again_is_no_outage() -> None:
    watch = OutageWatch(answers)
    for _ in range(10 * MOST_FAILED):
        watch.check("one", ILL)


def test_the_objects_of_many_messages_in_a_row_are_an_outage() -> None:
    watch = OutageWatch(answers)
    for number in range(MOST_FAILED - 1):
        watch.check(f"message {number}", ILL)
    with pytest.raises(StoreError, match="of 5 messages in a row"):
        watch.check("the last", ILL)


def test_what_could_be_read_in_between_begins_a_new_row() -> None:
    watch = OutageWatch(answers)
    for number in range(10 * MOST_FAILED):
        watch.check(f"message {number}", ILL)
        if number % (MOST_FAILED - 1) == 0:
            watch.end()


@pytest.mark.parametrize("silence", [StoreError("503"), CredentialsError("expired")])
def test_an_output_that_does_not_answer_either_is_an_outage(silence: Exception) -> None:
    def ask() -> None:
        raise silence

    with pytest.raises(type(silence), match=str(silence)):
        OutageWatch(ask).check("message", ILL)
