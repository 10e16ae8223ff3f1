import ctypes
import errno
import fcntl
import hashlib
import os
import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import IO

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from batchclf.errors import (
    ConfigError,
    InputChangedError,
    InputError,
    OutOfSpaceError,
    StoreError,
)
from batchclf.store import (
    Folder,
    Scratch,
    Source,
    check_separate,
    check_unchanged,
    find_sources,
    local,
    open_folder,
    open_source,
    open_source_tail,
)

NOBODY = 65534


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    prepared = open_folder(str(tmp_path / "out"))
    prepared.prepare()
    return prepared


def publish(folder: Folder, name: str, content: bytes) -> bool:
    with folder.scratch(name) as scratch:
        scratch.file.write(content)
        return folder.publish(scratch)


def content_of(folder: Folder, name: str) -> bytes | None:
    file = folder.open(name)
    if file is None:
        return None
    with file:
        return file.read()


def files_under(path: str | Path) -> set[str]:
    return {str(p.relative_to(path)) for p in Path(path).rglob("*") if p.is_file()}


@contextmanager
def child_writing(folder: Folder, name: str) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds a scratch file; it publishes it when told to."""
    program = (
        "import sys\n"
        "from batchclf.store import open_folder\n"
        "folder = open_folder(sys.argv[1])\n"
        "with folder.scratch(sys.argv[2]) as scratch:\n"
        "    scratch.file.write(b'of the child')\n"
        "    scratch.file.flush()\n"
        "    print('ready', flush=True)\n"
        "    sys.stdin.readline()\n"
        "    print(folder.publish(scratch), flush=True)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, folder.uri, name],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as child:
        assert read_line(child.stdout) == "ready"
        yield child
        child.kill()


def read_line(stream: IO[str] | None) -> str:
    assert stream is not None
    return stream.readline().strip()


# Publishing


def test_a_published_file_appears_whole_under_its_name(folder: Folder) -> None:
    assert publish(folder, "fp=0/a.parquet", b"rows")
    assert content_of(folder, "fp=0/a.parquet") == b"rows"
    assert folder.sizes("fp=0/") == {"fp=0/a.parquet": 4}


def test_a_second_publication_is_told_so_and_changes_nothing(folder: Folder) -> None:
    assert publish(folder, "a", b"first")
    assert not publish(folder, "a", b"second")
    assert content_of(folder, "a") == b"first"


@pytest.mark.parametrize("hard_links", [True, False])
def test_of_many_that_publish_one_name_at_once_one_wins_and_the_file_is_its_own(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, hard_links: bool
) -> None:
    if not hard_links:
        monkeypatch.setattr(os, "link", refuse(errno.EPERM))
    count = 12
    together = threading.Barrier(count)

    def try_to_publish(number: int) -> bool:
        with folder.scratch("a") as scratch:
            scratch.file.write(b"%d" % number * 10_000)
            together.wait()
            return folder.publish(scratch)

    with ThreadPoolExecutor(count) as pool:
        for _ in range(10):
            created = list(pool.map(try_to_publish, range(count)))
            assert created.count(True) == 1
            assert content_of(folder, "a") == b"%d" % created.index(True) * 10_000
            folder.delete("a")
    assert files_under(folder.uri) == set()


def refuse(code: int) -> Callable[..., None]:
    def refused(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    return refused


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOTSUP, errno.EMLINK])
def test_without_hard_links_a_rename_that_does_not_replace_publishes(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    monkeypatch.setattr(os, "link", refuse(code))
    folder.prepare()
    assert publish(folder, "a", b"first")
    assert not publish(folder, "a", b"second")
    assert content_of(folder, "a") == b"first"
    assert files_under(folder.uri) == {"a"}


@pytest.mark.parametrize("rename", ["missing", "not supported"])
def test_without_hard_links_and_such_a_rename_nothing_is_written(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, rename: str
) -> None:
    def not_supported(*_: object) -> int:
        ctypes.set_errno(errno.EINVAL)
        return -1

    library = {} if rename == "missing" else {"renameat2": not_supported}
    monkeypatch.setattr(os, "link", refuse(errno.EPERM))
    monkeypatch.setattr(local, "ctypes", fake_ctypes(SimpleNamespace(**library)))
    with pytest.raises(ConfigError, match="neither hard links nor a rename"):
        folder.prepare()
    assert files_under(folder.uri) == set()


def fake_ctypes(library: object) -> SimpleNamespace:
    return SimpleNamespace(CDLL=lambda *_, **__: library, get_errno=ctypes.get_errno)


def test_a_rename_that_fails_for_another_reason_says_that_reason(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        ctypes.set_errno(errno.ENOSPC)
        return -1

    monkeypatch.setattr(os, "link", refuse(errno.EPERM))
    monkeypatch.setattr(local, "ctypes", fake_ctypes(SimpleNamespace(renameat2=full)))
    with pytest.raises(OutOfSpaceError, match="No space left"):
        publish(folder, "a", b"first")


def test_a_file_system_that_replaces_what_is_there_is_refused(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def overwrite(temporary: Path, final: Path) -> None:
        final.write_bytes(temporary.read_bytes())

    monkeypatch.setattr(os, "link", overwrite)
    with pytest.raises(ConfigError, match="replaced a file that may only be created"):
        folder.prepare()
    assert files_under(folder.uri) == set()


def test_a_scratch_file_of_another_kind_of_store_is_refused(folder: Folder) -> None:
    with folder.scratch("a") as scratch, pytest.raises(StoreError, match="not of this folder"):
        folder.publish(Scratch("a", scratch.file))


# Scratch files


@pytest.mark.parametrize("name", ["fp=0/a.parquet", "fp=0/" + "a" * 200 + ".parquet"])
def test_nobody_who_reads_the_folder_sees_a_scratch_file(folder: Folder, name: str) -> None:
    with folder.scratch(name) as scratch:
        pq.write_table(pa.table({"a": [1]}), scratch.file)
        scratch.file.flush()
        assert len(files_under(folder.uri)) == 1
        assert Path(str(scratch.path)).name.startswith(".")
        assert folder.sizes("") == {}
        assert folder.open(name) is None
        assert ds.dataset(folder.uri, format="parquet").files == []


def test_a_scratch_file_is_gone_after_its_use_and_after_an_error(folder: Folder) -> None:
    def fail() -> None:
        with folder.scratch("a") as scratch:
            scratch.file.write(b"half")
            raise InputError("of the reader")

    with folder.scratch("a") as scratch:
        scratch.file.write(b"half")
    with pytest.raises(InputError, match="of the reader"):
        fail()
    assert files_under(folder.uri) == set()


def test_what_a_killed_process_left_is_removed_by_the_next_run(folder: Folder) -> None:
    for name in ("a", "fp=0/b.parquet", "fp=0/_runs/c.json"):
        with child_writing(folder, name) as child:
            child.kill()
            child.wait()
    assert len(files_under(folder.uri)) == 3
    folder.prepare()
    assert files_under(folder.uri) == set()


def test_what_a_living_process_writes_is_left_to_it(folder: Folder) -> None:
    with child_writing(folder, "fp=0/a.parquet") as child:
        folder.prepare()
        child.communicate("go\n")
        assert child.returncode == 0
    assert content_of(folder, "fp=0/a.parquet") == b"of the child"


def test_a_scratch_file_that_a_starting_run_took_for_abandoned_is_made_again(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    removed: list[Path] = []
    real_flock = fcntl.flock

    def flock_after_it_was_removed(file: IO[bytes], operation: int) -> None:
        if not removed:
            (path,) = (p for p in Path(folder.uri).iterdir() if p.is_file())
            path.unlink()
            removed.append(path)
        real_flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", flock_after_it_was_removed)
    assert publish(folder, "a", b"content")
    assert removed
    assert content_of(folder, "a") == b"content"


def test_a_published_file_outlives_the_process_that_was_killed_after_it(folder: Folder) -> None:
    with child_writing(folder, "a") as child:
        (temporary,) = files_under(folder.uri)
        os.link(Path(folder.uri, temporary), Path(folder.uri, "a"))  # and then it is killed
        child.kill()
        child.wait()
    folder.prepare()
    assert files_under(folder.uri) == {"a"}
    assert content_of(folder, "a") == b"of the child"


def test_temporary_files_of_other_programs_are_left_alone(folder: Folder) -> None:
    others = {".editor.tmp", ".cache/x.tmp", "notes.tmp", ".hidden"}
    for name in others:
        path = Path(folder.uri, name)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
    folder.prepare()
    assert files_under(folder.uri) == others


def test_runs_that_start_and_publish_at_once_do_not_take_each_others_files(folder: Folder) -> None:
    stop = threading.Event()

    def start_again_and_again() -> None:
        while not stop.is_set():
            folder.prepare()

    with ThreadPoolExecutor(2) as pool:
        starting = [pool.submit(start_again_and_again) for _ in range(2)]
        try:
            published = [publish(folder, f"fp=0/{i}", b"%d" % i) for i in range(150)]
        finally:
            stop.set()
        for future in starting:
            future.result()
    assert all(published)
    assert len(folder.sizes("fp=0/")) == 150


# Folders that cannot be written


@contextmanager
def without_rights(path: Path) -> Iterator[None]:
    """As a user who may not write there; root ignores permissions."""
    path.chmod(0o500)
    if os.geteuid() == 0:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if os.getuid() == 0:
            os.seteuid(0)
        path.chmod(0o700)


def test_a_folder_without_rights_is_an_error_that_names_it(tmp_path: Path) -> None:
    folder = open_folder(str(tmp_path / "mine" / "out"))
    (tmp_path / "mine").mkdir()
    with without_rights(tmp_path / "mine"), pytest.raises(ConfigError) as caught:
        folder.prepare()
    assert str(caught.value).startswith(f"{folder.uri}: Permission denied; choose a folder")


def test_a_folder_that_lost_its_rights_is_an_error_of_the_writer(folder: Folder) -> None:
    with without_rights(Path(folder.uri)), pytest.raises(ConfigError, match="Permission denied"):
        publish(folder, "a", b"")


@pytest.mark.parametrize("below", ["", "/out", "/out/deeper"])
def test_a_folder_at_or_below_a_file_is_an_error_that_names_it(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("I am here")
    folder = open_folder(f"{tmp_path}/file{below}")
    assert folder.sizes("fp=0/") == {}
    with pytest.raises(ConfigError) as caught:
        folder.prepare()
    assert str(caught.value).startswith(f"{folder.uri}: ")


def test_a_full_disk_is_an_error_that_leaves_nothing_behind(folder: Folder) -> None:
    with file_size_limit(1 << 16), pytest.raises(OutOfSpaceError, match="run the same command"):
        publish(folder, "a", b"x" * (1 << 17))
    assert files_under(folder.uri) == set()


@contextmanager
def file_size_limit(size_bytes: int) -> Iterator[None]:
    """EFBIG beyond it, which writers meet as they meet a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# The rest of a folder


def test_notes_are_replaced_whole(folder: Folder) -> None:
    folder.put("fp=0/_runs/1.json", b"a longer note")
    folder.put("fp=0/_runs/1.json", b"short")
    assert content_of(folder, "fp=0/_runs/1.json") == b"short"
    assert files_under(folder.uri) == {"fp=0/_runs/1.json"}


def test_deleting_is_done_once_and_asked_for_as_often_as_one_likes(folder: Folder) -> None:
    folder.put("a", b"")
    folder.delete("a")
    folder.delete("a")
    assert folder.open("a") is None


def test_sizes_are_those_of_the_prefix(folder: Folder) -> None:
    for name in ("fp=0/a", "fp=0/_runs/b", "fp=01/c", "d"):
        folder.put(name, name.encode())
    assert folder.sizes("fp=0/") == {"fp=0/a": 6, "fp=0/_runs/b": 12}
    assert set(folder.sizes("fp=0")) == {"fp=0/a", "fp=0/_runs/b", "fp=01/c"}
    assert set(folder.sizes("")) == {"fp=0/a", "fp=0/_runs/b", "fp=01/c", "d"}


def test_a_folder_that_is_not_there_holds_nothing(tmp_path: Path) -> None:
    folder = open_folder(str(tmp_path / "none"))
    assert folder.sizes("") == {}
    assert folder.open("a") is None
    assert not (tmp_path / "none").exists()


def test_a_folder_may_be_given_as_a_uri(tmp_path: Path) -> None:
    folder = open_folder((tmp_path / "a b%20ü").as_uri())
    folder.prepare()
    assert (tmp_path / "a b%20ü").is_dir()


# Inputs


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    root = tmp_path / "in"
    for name in (
        "b.csv",
        "a.parquet",
        "c.jsonl.gz",
        "deep/er/d.CSV.GZ",
        "deep/e.jsonl",
        "notes.txt",
        ".hidden.csv",
        "_SUCCESS.csv",
        "_runs/f.csv",
        ".git/g.csv",
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    (root / "folder.csv").mkdir()
    return root


def names_of(sources: list[Source], root: Path) -> list[str]:
    return [str(Path(str(source)).relative_to(root.resolve())) for source in sources]


VISIBLE = ["a.parquet", "b.csv", "c.jsonl.gz", "deep/e.jsonl", "deep/er/d.CSV.GZ"]


def test_a_folder_is_every_known_file_in_it_by_name_but_those_that_readers_pass_over(
    inputs: Path,
) -> None:
    assert names_of(find_sources([str(inputs)]), inputs) == VISIBLE


def test_hidden_folders_above_an_input_do_not_hide_it(tmp_path: Path) -> None:
    place = tmp_path / ".cache" / "_in"
    place.mkdir(parents=True)
    (place / "a.csv").write_text("")
    assert names_of(find_sources([str(place)]), place) == ["a.csv"]


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("*.csv", ["_SUCCESS.csv", "b.csv"]),
        ("[ab].*", ["a.parquet", "b.csv"]),
        ("**/*.jsonl*", ["c.jsonl.gz", "deep/e.jsonl"]),
        ("deep/*", ["deep/e.jsonl"]),
        ("*", ["_SUCCESS.csv", "a.parquet", "b.csv", "c.jsonl.gz"]),
    ],
)
def test_a_glob_is_the_files_that_it_matches_by_name(
    inputs: Path, pattern: str, names: list[str]
) -> None:
    assert names_of(find_sources([f"{inputs}/{pattern}"]), inputs) == names


def test_a_hidden_file_that_is_named_is_read(inputs: Path) -> None:
    assert names_of(find_sources([str(inputs / ".hidden.csv")]), inputs) == [".hidden.csv"]


def test_inputs_stand_in_the_order_of_the_arguments_and_each_once(
    inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(inputs / "deep")
    (inputs.parent / "link").symlink_to(inputs)
    given = [
        str(inputs / "deep"),
        str(inputs / "b.csv"),
        "../b.csv",
        f"{inputs}/./deep/../b.csv",
        (inputs / "b.csv").as_uri(),
        str(inputs.parent / "link" / "b.csv"),
        f"{inputs}/[ab].*",
        "e.jsonl",
    ]
    found = names_of(find_sources(given), inputs)
    assert found == ["deep/e.jsonl", "deep/er/d.CSV.GZ", "b.csv", "a.parquet"]


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ("nowhere", "nowhere: no such file or folder"),
        ("nowhere.csv", r"nowhere\.csv: no such file or folder"),
        ("notes.txt", r"notes\.txt: not a \.parquet, \.csv, .* file by its name"),
        ("*.txt", r"\*\.txt: no \.parquet, .* files there"),
        ("*.none", r"\*\.none: no \.parquet, \.csv, .* files there"),
        ("empty", r"empty: no \.parquet, \.csv, .* files there"),
        ("x" * 5000, "x: File name too long"),
    ],
)
def test_an_input_that_is_nothing_readable_is_an_error_that_names_it(
    inputs: Path, given: str, reason: str
) -> None:
    (inputs / "empty").mkdir()
    with pytest.raises(InputError, match=reason):
        find_sources([str(inputs / "b.csv"), str(inputs / given)])


NAMES = ["a b.csv", "100%25.csv", "a#b?c.csv", "ü.csv", "[x].csv", "a;b&c.csv", "caf\udce9.csv"]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_any_file_name_can_be_found_opened_and_found_again_by_its_uri(
    tmp_path: Path, name: str
) -> None:
    (tmp_path / name).write_text("content")
    (source,) = find_sources([str(tmp_path / name)])
    with open_source(source) as file:
        assert file.read() == b"content"
    assert find_sources([source.uri]) == [source] == find_sources([str(tmp_path)])
    assert source.uri.isascii()
    assert str(source) == str(tmp_path.resolve() / name)


def test_the_version_of_a_file_is_its_content(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("one")
    (source,) = find_sources([str(path)])
    assert source.version == f"sha256:{hashlib.sha256(b'one').hexdigest()}"
    assert source.size_bytes == 3
    path.unlink()
    path.write_text("one")
    assert find_sources([str(path)]) == [source]


# Inputs that change


@pytest.fixture
def planned(tmp_path: Path) -> Source:
    (tmp_path / "a.csv").write_text("id,text\n1,a\n")
    (source,) = find_sources([str(tmp_path / "a.csv")])
    return source


def append(path: Path) -> None:
    with path.open("a") as file:
        file.write("2,b\n")


def rewrite_with_the_same_size(path: Path) -> None:
    path.write_text(path.read_text().replace("1", "9"))
    os.utime(path, ns=(0, 0))


def replace_by_a_copy(path: Path) -> None:
    shutil.copy2(path, path.with_suffix(".new"))  # of the same size and time
    path.with_suffix(".new").replace(path)


CHANGES = [append, rewrite_with_the_same_size, replace_by_a_copy]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("opener", [open_source, open_source_tail])
def test_a_file_that_changed_since_the_plan_is_not_read(
    planned: Source, change: Callable[[Path], None], opener: Callable[[Source], IO[bytes]]
) -> None:
    change(Path(str(planned)))
    with pytest.raises(InputChangedError, match="replaced since the plan was made; run again"):
        opener(planned)


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changes_while_it_is_read_is_an_error_at_the_end(
    planned: Source, change: Callable[[Path], None]
) -> None:
    with open_source(planned):
        check_unchanged(planned)
        change(Path(str(planned)))
        with pytest.raises(InputChangedError, match="replaced while it was read; run again"):
            check_unchanged(planned)


def test_a_file_that_is_deleted_while_it_is_read_is_whole_for_its_reader(planned: Source) -> None:
    with open_source(planned) as file:
        Path(str(planned)).unlink()
        check_unchanged(planned)
        assert file.read() == b"id,text\n1,a\n"


def test_a_file_that_is_gone_before_it_is_read_is_an_error_that_names_it(planned: Source) -> None:
    Path(str(planned)).unlink()
    with pytest.raises(InputError, match=r"a\.csv: No such file or directory"):
        open_source(planned)


def test_a_file_that_is_written_while_it_is_planned_is_not_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.csv"
    path.write_text("id,text\n")
    real_digest = hashlib.file_digest

    def digest_while_somebody_writes(file: IO[bytes], name: str) -> object:
        append(path)
        return real_digest(file, name)  # type: ignore[arg-type]

    monkeypatch.setattr(hashlib, "file_digest", digest_while_somebody_writes)
    with pytest.raises(InputChangedError, match="is being written to"):
        find_sources([str(path)])


# Inputs and outputs


@pytest.mark.parametrize("output", ["", "/out", "/deeper/out", "/../in/out"])
def test_an_output_within_an_input_folder_is_refused(tmp_path: Path, output: str) -> None:
    (tmp_path / "in").mkdir()
    with pytest.raises(ConfigError, match="lies inside the input"):
        check_separate([str(tmp_path / "in")], f"{tmp_path}/in{output}")


@pytest.mark.parametrize("output", ["out", "in2", "in/../out", "."])
def test_an_output_beside_or_above_an_input_is_fine(tmp_path: Path, output: str) -> None:
    (tmp_path / "in").mkdir()
    check_separate([str(tmp_path / "in")], f"{tmp_path}/{output}")
