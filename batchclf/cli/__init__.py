"""The command line: options in, exit codes out. What the commands do stands elsewhere."""

import gc
import sys
from typing import NoReturn

import click

from batchclf import __version__
from batchclf.cli.bench import bench
from batchclf.cli.build import build
from batchclf.cli.classify import classify
from batchclf.cli.enqueue import enqueue
from batchclf.cli.evaluate import evaluate
from batchclf.cli.import_checkpoint import import_checkpoint
from batchclf.cli.plan import plan
from batchclf.cli.report import report
from batchclf.cli.serve import serve
from batchclf.cli.train import train
from batchclf.cli.verify import verify
from batchclf.cli.work import work
from batchclf.errors import EXIT_BUG, EXIT_OK, EXIT_TRY_AGAIN, EXIT_USAGE, BatchclfError
from batchclf.log import report as tell


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="batchclf")
def cli() -> None:
    """Label a news archive with a fine-tuned GPT-2 classifier.

    Files in, labelled Parquet out, every row exactly once. Every option can also be set by an
    environment variable: BATCHCLF_CLASSIFY_MODEL for `classify --model`.

    \b
    Exit codes: 0 all done; 64 bad usage or configuration; 65 an input cannot
    be read; 70 a bug; 75 try again (interrupted, throttled, disk full).
    """


def _add(command: click.Command) -> None:
    """Add a command, each option of which is also read from `BATCHCLF_<COMMAND>_<OPTION>`.

    click would take the name of our variable, which says more than the option as it is written.
    """
    for option in command.params:
        if isinstance(option, click.Option):
            written = max(option.opts, key=len).removeprefix("--")
            option.envvar = f"BATCHCLF_{command.name}_{written}".replace("-", "_").upper()
    cli.add_command(command)


for each in (
    classify,
    plan,
    enqueue,
    work,
    verify,
    report,
    train,
    evaluate,
    import_checkpoint,
    build,
    bench,
    serve,
):
    _add(each)


def main() -> NoReturn:
    """Run the command line and leave with one of the exit codes of `batchclf.errors`."""
    code = _run()
    gc.freeze()  # or the interpreter spends most of a second on cycles in what is about to go
    sys.exit(code)


def _run() -> int:
    try:
        result = cli.main(standalone_mode=False)
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.ClickException as error:
        error.show()
        return EXIT_USAGE
    except (click.Abort, KeyboardInterrupt):
        tell("interrupted; run the same command again to go on")
        return EXIT_TRY_AGAIN
    except BatchclfError as error:
        tell(str(error))
        return error.exit_code
    except MemoryError as error:
        tell(f"out of memory: {error}")
        return EXIT_TRY_AGAIN
    except SystemExit:
        # click's answer to a closed pipe: whoever read our output has seen enough
        return EXIT_OK
    except Exception:  # noqa: BLE001 - the one place where a bug becomes an exit code
        tell("this is a bug in batchclf; please report it with this traceback", trace=True)
        return EXIT_BUG
    return result if isinstance(result, int) else EXIT_OK
