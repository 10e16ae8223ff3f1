"""The documents are true: their commands exist, their blocks run in order, their tables are whole.

A document is a story: its blocks run one after the other in one shell, from the top folder of a
copy of the project in which the files stand that it speaks of, with S3 and SQS on a server here.
What cannot run is named in `PASSED_OVER`, with the reason.
"""

import gzip
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import botocore.session
import click
import documents
import models
import pyarrow as pa
import pyarrow.csv as pc
import pyarrow.parquet as pq
import pytest
import servers
import torch
from documents import DOCUMENTS, LANGUAGES, REPOSITORY, Block, Story
from servers import Endpoint

from batchclf.cli import cli
from batchclf.schema import prediction_fields

QUEUE = "QUEUE-URL"
NEEDS_AWS = "the AWS CLI against an account; its calls are held against botocore below"
NEEDS_ROOT = "changes the machine; run on a folder of its own by test_jobs_cron.py"
INSTALLS = "installs from a package index"
# Blocks that are not run, by how they begin: why, and what is done instead.
PASSED_OVER = {
    ("README.md", "make demo"): "makes a virtual environment; the targets are looked up below",
    ("README.md", "pip install"): INSTALLS,
    ("README.md", "batchclf bench"): "takes minutes",
    ("README.md", "torchrun"): "four processes; run with two by e2e/test_train_processes.py",
    ("CONTRIBUTING.md", "make test"): "runs this test",
    ("CONTRIBUTING.md", "python3 -m venv"): INSTALLS,
    ("docs/output.md", "CREATE EXTERNAL TABLE"): "Athena; its columns are compared below",
    ("docs/output.md", "MSCK REPAIR TABLE"): "Athena",
    ("docs/serve.md", "pip install"): INSTALLS,
    ("docs/tuning.md", "pip install"): INSTALLS,
    ("docs/serve.md", "runtime = boto3.client"): (
        "an endpoint on AWS; the same body is posted by serve/test_contract.py"
    ),
    ("jobs/aws-batch/README.md", "docker build"): (
        "Docker and an AWS account; the image is built by e2e/test_container.py"
    ),
    ("jobs/aws-batch/README.md", "./submit.py"): "run on moto by test_jobs_aws_batch.py",
    ("jobs/cron/README.md", "python3 -m venv /opt/batchclf"): NEEDS_ROOT,
    ("jobs/cron/README.md", "install -m 644 crontab"): NEEDS_ROOT,
    ("jobs/cron/README.md", "install -m 644 -t /etc/systemd"): NEEDS_ROOT,
    ("jobs/ec2/README.md", "aws ec2 run-instances"): NEEDS_AWS,
    ("jobs/ec2/README.md", "aws ssm start-session"): NEEDS_AWS,
    ("jobs/sagemaker/README.md", "python launch.py"): "run on moto by test_jobs_sagemaker.py",
    ("jobs/sqs-worker/README.md", "aws cloudformation deploy"): NEEDS_AWS,
    ("jobs/sqs-worker/README.md", "aws s3api"): NEEDS_AWS,
    ("jobs/walkthrough/README.md", "source .venv/bin/activate"): INSTALLS,
    ("jobs/walkthrough/README.md", "moto_server"): "the test has a server of its own",
}


def passed_over(document: str) -> tuple[str, ...]:
    return tuple(beginning for name, beginning in PASSED_OVER if name == document)


BLOCKS = [block for document in DOCUMENTS for block in documents.read_blocks(document)]
SHELL_BLOCKS = [block for block in BLOCKS if block.language == "sh"]
STORIES = [
    document
    for document in DOCUMENTS
    # the walk-through is run, and its output looked at, by e2e/test_walkthrough.py
    if document != "jobs/walkthrough/README.md"
    and not document.startswith("data/")
    and Story(document, passed_over(document), {}).blocks()
]
# Commands of the AWS CLI that are no call of one API; their options are not held against botocore.
COMPOSED = {("cloudformation", "deploy"), ("s3", "cp"), ("s3", "sync")}
ATHENA_TYPES = {
    "string": "string",
    "bigint": "int64",
    "float": "float",
    "int": "int32",
    "boolean": "bool",
}


def commands(program: str, *beginning: str) -> list[Any]:
    """The block and the words of each command that starts so, as parameters of a test."""
    return [
        pytest.param(block, command, id=f"{block} {' '.join(command[:3])}")
        for block in SHELL_BLOCKS
        for command in documents.read_commands(block)
        if command[: 1 + len(beginning)] == [program, *beginning]
    ]


def aws_calls() -> list[Any]:
    found = commands("aws")
    return [each for each in found if tuple(each.values[1][1:3]) not in COMPOSED]


def batchclf_commands() -> list[Any]:
    """The block and the arguments of each `batchclf`, however it is started."""
    return [
        pytest.param(block, arguments, id=f"{block} {arguments[0]}")
        for block in SHELL_BLOCKS
        for command in documents.read_commands(block)
        if (arguments := documents.arguments_of_batchclf(command))
    ]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    """A server of its own: the documents name their buckets."""
    with servers.moto(tmp_path_factory.mktemp("moto")) as endpoint:
        yield endpoint


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project, with the files that the documents speak of."""
    folder = tmp_path_factory.mktemp("docs") / "project"
    sample = REPOSITORY / "data" / "sample"
    shutil.copytree(REPOSITORY / "jobs", folder / "jobs")
    (folder / "data").symlink_to(REPOSITORY / "data")
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "bin" / "activate").write_text("# the PATH of the test has it already\n")
    (folder / "archive").mkdir()
    articles = pq.read_table(sample / "news-1.parquet")
    pc.write_csv(articles, folder / "train.csv")
    shutil.copy(sample / "news-2.csv", folder / "val.csv")
    (folder / "test.csv").write_bytes(gzip.decompress((sample / "news-3.csv.gz").read_bytes()))
    shutil.copy(folder / "test.csv", folder / "news.csv")
    others = {"text": "body", "category": "url"}
    renamed = articles.rename_columns([others.get(name, name) for name in articles.column_names])
    pq.write_table(renamed, folder / "archive" / "2024.parquet")
    queued = folder / "queued" / "fp=0"
    queued.mkdir(parents=True)
    delivered = {"message_id": ["a", "a"], "receive_count": pa.array([1, 2], pa.int32())}
    pq.write_table(pa.table(delivered), queued / "a.parquet")
    models.make_hf_checkpoint(folder / "gpt2", max_positions=160)
    (folder / "gpt2-classifier").symlink_to("gpt2")
    config = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 400, "n_positions": 160}
    torch.save(models.random_flatten_reference(**config).state_dict(), folder / "model.pth")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("document", STORIES)
def test_every_block_of_a_document_runs(
    document: str, project: Path, server: Endpoint, tmp_path: Path
) -> None:
    if shutil.which("curl") is None and "curl" in (REPOSITORY / document).read_text():
        pytest.skip("no curl here")
    with servers.fresh_queue(server) as queue:
        for bucket in ("my-archive", "my-labels"):
            server.s3.create_bucket(Bucket=bucket)
        articles = (project / "news.csv").read_bytes()
        server.s3.put_object(Bucket="my-archive", Key="2024/news.csv", Body=articles)
        folder = shutil.copytree(project, tmp_path / "project", symlinks=True)
        environment = servers.clean_environment(server.env) | {
            "PATH": f"{Path(sys.executable).parent}:{servers.script('x').parent}:/usr/bin:/bin",
            "BATCHCLF_WORK_IDLE_EXIT": "1",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        try:
            story = Story(document, passed_over(document), {QUEUE: queue.url})
            story.run(folder, environment)
        finally:
            empty(server, "my-archive", "my-labels")


def empty(server: Endpoint, *buckets: str) -> None:
    for bucket in buckets:
        for found in server.s3.list_objects_v2(Bucket=bucket).get("Contents", []):
            server.s3.delete_object(Bucket=bucket, Key=found["Key"])
        server.s3.delete_bucket(Bucket=bucket)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_code_stands_in_fenced_blocks_of_a_known_language(document: str) -> None:
    blocks = documents.read_blocks(document)
    assert {block.language for block in blocks} <= LANGUAGES
    assert not documents.has_indented_code(document)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_link_to_a_file_or_a_heading_leads_somewhere(document: str) -> None:
    text = (REPOSITORY / document).read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith(("https://", "http://")):
            continue
        path, _, anchor = link.partition("#")
        target = (REPOSITORY / document).parent / path if path else REPOSITORY / document
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {as_anchor(heading) for heading in headings}, link


def as_anchor(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_every_page_of_docs_is_linked_from_the_readme() -> None:
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    for document in DOCUMENTS:
        if document.startswith(("docs/", "jobs/")):
            assert f"({document})" in readme


@pytest.mark.parametrize(("document", "beginning"), PASSED_OVER)
def test_what_is_passed_over_is_one_block(document: str, beginning: str) -> None:
    found = [b for b in BLOCKS if b.document == document and b.text.startswith(beginning)]
    assert len(found) == 1


@pytest.mark.parametrize("block", SHELL_BLOCKS, ids=str)
def test_every_shell_block_is_well_formed(block: Block) -> None:
    subprocess.run(["bash", "-n", "-c", block.text], check=True)


@pytest.mark.parametrize(("block", "arguments"), batchclf_commands())
def test_every_batchclf_command_has_the_options_that_it_is_given(
    block: Block, arguments: list[str]
) -> None:
    name, *rest = arguments
    chosen = cli.commands[name]
    with click.Context(chosen) as context:
        chosen.parse_args(context, rest)


@pytest.mark.parametrize(("block", "command"), commands("make"))
def test_every_target_of_make_exists(block: Block, command: list[str]) -> None:
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    (phony,) = re.findall(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert command[1] in phony.split()


@pytest.mark.parametrize(("block", "command"), aws_calls())
def test_every_call_of_the_aws_cli_has_the_options_that_it_is_given(
    block: Block, command: list[str]
) -> None:
    service = {"s3api": "s3"}.get(command[1], command[1])
    model = botocore.session.Session().get_service_model(service)
    wanted = command[2].replace("-", "")
    (operation,) = (name for name in model.operation_names if name.lower() == wanted)
    shape = model.operation_model(operation).input_shape
    known = {name.lower() for name in shape.members} if shape else set()
    given = {word.removeprefix("--") for word in command if word.startswith("--")}
    assert {name.replace("-", "") for name in given} <= known


@pytest.mark.parametrize(("block", "command"), commands("aws", "cloudformation", "deploy"))
def test_every_parameter_that_is_deployed_is_one_of_the_template(
    block: Block, command: list[str]
) -> None:
    from cfnlint.decode import decode

    template, _ = decode(str((REPOSITORY / block.document).parent / "template.yaml"))
    given = command[command.index("--parameter-overrides") + 1 :]
    assert given
    assert {word.partition("=")[0] for word in given} <= set(template["Parameters"])


def test_the_table_of_athena_has_the_columns_that_are_written() -> None:
    (block,) = (block for block in BLOCKS if block.text.startswith("CREATE EXTERNAL TABLE"))
    columns = re.findall(r"^  `?(\w+)`? ([^\n]*?),?$", block.text, re.MULTILINE)
    kept = 3
    for (name, kind), field in zip(
        columns[kept:], prediction_fields(models.LABELS, probs=True), strict=True
    ):
        assert name == field.name
        if found := re.fullmatch(r"struct<(.*)>", kind):
            members = [member.strip().split(":") for member in found[1].split(",")]
            assert [[member.name, str(member.type)] for member in field.type] == members
        else:
            assert ATHENA_TYPES[kind] == str(field.type)


def test_every_error_code_of_a_row_is_explained() -> None:
    package = REPOSITORY / "batchclf"
    files = [package / "text.py", package / "predictions.py", *package.glob("source/*.py")]
    source = "\n".join(file.read_text(encoding="utf-8") for file in files)
    codes = set(re.findall(r'"([a-z0-9_]+): ', source))
    page = (REPOSITORY / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    explained = set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE))
    assert explained == codes


def test_every_message_that_is_explained_is_one_that_is_given() -> None:
    files = (REPOSITORY / "batchclf").rglob("*.py")
    source = re.sub(r'"\s*f?"', "", "\n".join(file.read_text(encoding="utf-8") for file in files))
    page = (REPOSITORY / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    table = page.partition("## Messages")[2].partition("\n## ")[0]
    explained = [
        message
        for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
        for message in re.findall(r"`([^`]+)`", row)
    ]
    assert explained
    for message in explained:
        for part in message.split("..."):
            assert part.strip() in source
