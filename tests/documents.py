"""The Markdown documents and their code blocks, and how the blocks of one are run as one story."""

import os
import re
import shlex
import signal
import socket
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted(
    str(path.relative_to(REPOSITORY))
    for pattern in ("*.md", "docs/*.md", "jobs/*/README.md", "data/*/README.md")
    for path in REPOSITORY.glob(pattern)
)
RUNNABLE = {"sh", "python", "sql"}
LANGUAGES = RUNNABLE | {"text", "mermaid"}
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_INDENTED = re.compile(r"(?:\A|\n)\n    +(?![ *-])\S")
_SERVER = "127.0.0.1:8080"  # where the documents have `serve` listen
_TIMEOUT_S = 240

# A query as DuckDB reads it. Athena's names a table, and a fingerprint that is another one here.
_QUERY = """
import pathlib, re, sys
import duckdb
query = re.sub(r"fp = '[0-9a-f]{32}'", "fp IS NOT NULL", sys.stdin.read())
if pathlib.Path("labelled").is_dir():
    duckdb.sql("CREATE VIEW labelled AS SELECT * FROM 'labelled/fp=*/*.parquet'")
duckdb.sql(query).show()
"""


@dataclass(frozen=True)
class Block:
    """A fenced code block: its document, the line that its text begins at, language and text."""

    document: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.document}:{self.line}"


def read_blocks(document: str) -> list[Block]:
    text = (REPOSITORY / document).read_text(encoding="utf-8")
    return [
        Block(document, text.count("\n", 0, found.start(2)) + 1, found[1], found[2])
        for found in _FENCE.finditer(text)
    ]


def has_indented_code(document: str) -> bool:
    text = (REPOSITORY / document).read_text(encoding="utf-8")
    return _INDENTED.search(_FENCE.sub("", text)) is not None


def read_commands(block: Block) -> Iterator[list[str]]:
    """The simple commands of a shell block, as words; what they are piped into is another one."""
    pending = ""
    for line in block.text.replace("\\\n", " ").splitlines():
        pending += line + "\n"
        lexer = shlex.shlex(pending, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        try:
            words = list(lexer)
        except ValueError:  # a quotation goes on in the next line
            continue
        pending = ""
        yield from _split(words)


def _split(words: list[str]) -> Iterator[list[str]]:
    command: list[str] = []
    for word in [*words, ";"]:
        if re.fullmatch(r"[;&|()<>]+", word):
            if command and not command[-1].isdigit():
                yield command
            command = []
        elif command or not re.match(r"\w+=", word):
            command.append(word)


def arguments_of_batchclf(command: list[str]) -> list[str] | None:
    """What follows `batchclf` in a command, however it is started; None if it is another one."""
    for place, word in enumerate(command):
        started = place == 0 or command[place - 1] == "-m"
        if started and Path(word).name == "batchclf":
            return command[place + 1 :]
    return None


@dataclass(frozen=True)
class Story:
    """A document whose blocks run in order, in one shell, from the top folder of the project.

    Attributes:
        passed_over: how the blocks begin that cannot run here.
        placeholders: what stands for something of the reader's, and what it is here.
    """

    document: str
    passed_over: tuple[str, ...]
    placeholders: Mapping[str, str]

    def blocks(self) -> list[Block]:
        """Those that run, in their order."""
        return [
            block
            for block in read_blocks(self.document)
            if block.language in RUNNABLE and not block.text.startswith(self.passed_over)
        ]

    def run(self, folder: Path, environment: Mapping[str, str]) -> str:
        """Run it in a furnished copy of the repository; returns what it printed.

        Raises:
            AssertionError: a block failed; the message names it and ends with what was printed.
        """
        port = _free_port()
        environment = {**environment, "BATCHCLF_SERVE_PORT": str(port)}
        script = self._script()
        for placeholder, real in {**self.placeholders, _SERVER: f"127.0.0.1:{port}"}.items():
            script = script.replace(placeholder, real)
        shell = subprocess.Popen(
            ["bash", "-c", script],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            printed, _ = shell.communicate(timeout=_TIMEOUT_S)
        finally:
            with suppress(ProcessLookupError):  # all have ended, as they should
                os.killpg(shell.pid, signal.SIGKILL)
            shell.communicate()
        assert shell.returncode == 0, printed
        return printed

    def _script(self) -> str:
        lines = [
            "set -Eeuo pipefail",
            # A server in the background ends with the story.
            "trap 'echo \"failed: $BLOCK\"' ERR",
            "trap 'kill $(jobs -p) 2>/dev/null || true; wait' EXIT",
        ]
        for block in self.blocks():
            lines += [f"BLOCK={block}", 'echo "== $BLOCK"', _as_shell(block)]
        return "\n".join(lines)


def _as_shell(block: Block) -> str:
    if block.language == "python":
        return f"python - <<'END_OF_BLOCK'\n{block.text}END_OF_BLOCK"
    if block.language == "sql":
        return f"python -c {shlex.quote(_QUERY)} <<'END_OF_BLOCK'\n{block.text}END_OF_BLOCK"
    if block.text.startswith("batchclf serve "):
        server = block.text.partition("#")[0].strip()
        ping = f"curl -sf -o ping --retry 240 --retry-delay 1 --retry-all-errors {_SERVER}/ping"
        return f"{server} >serve.log 2>&1 &\n{ping} || {{ cat serve.log; false; }}"
    return block.text


def _free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
