"""What can go wrong, as one tree. Each class carries the exit code that the command ends with.

BatchclfError                 70  a bug, unless a subclass says otherwise
├── ConfigError               64  a wrong option, or settings that contradict each other
│   └── CredentialsError      64  the store or queue does not accept who we are
├── CheckpointError           64  the model directory is missing something or is not what it says
│   └── DisagreementError     64  a build labels too many texts otherwise than float32 does
├── InputError                65  an input cannot be read
│   ├── InputChangedError     75  an input was replaced while it was read; run again
│   ├── ErrorRateError        65  too many rows of a shard could not be labelled
│   └── MessageError          65  a queue's message is not understood, or may not be followed
├── OutputError               65  an output is incomplete, torn or not ours
├── QueueError                75  the queue failed in a way that may pass: 5xx, throttling, resets
├── StoreError                75  the store failed in a way that may pass: 5xx, throttling, resets
│   ├── DamagedError          75  bytes keep arriving that do not fit their checksum
│   └── OutOfSpaceError       75  a disk is full
└── Interrupted               75  SIGTERM or SIGINT

The codes follow sysexits.h: 64 EX_USAGE, 65 EX_DATAERR, 70 EX_SOFTWARE, 75 EX_TEMPFAIL.
"""

from typing import ClassVar

EXIT_OK = 0
EXIT_USAGE = 64
EXIT_INPUT = 65
EXIT_BUG = 70
EXIT_TRY_AGAIN = 75


class BatchclfError(Exception):
    """Base of all errors that batchclf raises on purpose."""

    exit_code: ClassVar[int] = EXIT_BUG


class ConfigError(BatchclfError):
    """A wrong option, or settings that contradict each other."""

    exit_code = EXIT_USAGE


class CredentialsError(ConfigError):
    """The store or queue does not accept who we are; trying again will not help."""


class CheckpointError(BatchclfError):
    """The model directory is missing something or is not what it says."""

    exit_code = EXIT_USAGE


class DisagreementError(CheckpointError):
    """A build labels too many texts otherwise than float32 does; it was not kept."""


class InputError(BatchclfError):
    """An input cannot be read: gone, corrupt, or without the columns asked for."""

    exit_code = EXIT_INPUT


class InputChangedError(InputError):
    """An input was replaced between the plan and the end of the read; run again."""

    exit_code = EXIT_TRY_AGAIN


class ErrorRateError(InputError):
    """More rows of a shard failed than the options allow; the shard is not published."""


class MessageError(InputError):
    """A queue's message that is not understood or may not be followed; its redrive policy decides.

    It fails that message alone and never ends a command.
    """


class OutputError(BatchclfError):
    """An output is incomplete, torn, or holds something that is not ours."""

    exit_code = EXIT_INPUT


class StoreError(BatchclfError):
    """The store failed in a way that may pass (5xx, throttling, resets), also after our retries."""

    exit_code = EXIT_TRY_AGAIN


class QueueError(BatchclfError):
    """The queue failed in a way that may pass (5xx, throttling, resets), also after our retries."""

    exit_code = EXIT_TRY_AGAIN


class DamagedError(StoreError):
    """Bytes that do not fit their checksum, also after our retries: on the way, or in the store."""


class OutOfSpaceError(StoreError):
    """The disk for scratch files or output is full; nothing half-written was left."""


class Interrupted(BatchclfError):  # noqa: N818 - a request, not an error
    """SIGTERM or SIGINT asked us to stop; what was not committed is done by the next run."""

    exit_code = EXIT_TRY_AGAIN
