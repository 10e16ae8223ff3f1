"""Bring a model directory behind a SageMaker endpoint, or run it over files by Batch Transform.

    python deploy.py pack model model.tar.gz
    python deploy.py endpoint news --image URI --model s3://b/model.tar.gz --role ARN
    python deploy.py transform news --image URI --model s3://b/model.tar.gz --role ARN \
        --input s3://b/articles/ --output s3://b/labelled/ --content-type application/jsonlines
    python deploy.py delete news

`--dry-run` prints the requests and sends none. The image is ours, whose `serve` speaks the
contract of SageMaker's containers; with `--pytorch-container` it is AWS's own, which runs
`inference.py` out of the packed model.
"""

import argparse
import json
import sys
import tarfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import boto3

from batchclf.checkpoint import load
from batchclf.errors import BatchclfError, ConfigError

HERE = Path(__file__).resolve().parent
CODE_IN_CONTAINER = "/opt/ml/model/code"
VARIANT = "all"
# https://docs.aws.amazon.com/sagemaker/latest/APIReference/API_ModelClientConfig.html
LONGEST_INVOCATION_S = 3600
# https://docs.aws.amazon.com/sagemaker/latest/APIReference/API_CreateTransformJob.html
MOST_PAYLOAD_MB = 100  # of one request, and of all that are sent at once
MOST_AT_ONCE = 8
# A job sends whole files, and sends on when it likes; an endpoint's limits are for strangers.
TRANSFORM_LIMITS = {
    "BATCHCLF_SERVE_MAX_ROWS": "1000000",
    "BATCHCLF_SERVE_MAX_QUEUE_ROWS": "10000000",
}
# A line of JSON is an article on its own. A CSV needs its header and a Parquet file its footer, so
# that these are sent whole.
SPLIT_BY_CONTENT_TYPE = {
    "application/jsonlines": "Line",
    "text/csv": "None",
    "application/vnd.apache.parquet": "None",
}


@dataclass(frozen=True)
class Call:
    """One request of the SageMaker API, as boto3 takes it."""

    operation: str
    parameters: dict[str, Any]


def model_call(flags: argparse.Namespace, name: str, *, isolated: bool) -> Call:
    """The request that makes the model known, under a name of its own.

    A model is an archive `model.tar.gz`, or the prefix of a model directory that is not packed.
    """
    container: dict[str, Any] = {"Image": flags.image, "Environment": _environment(flags)}
    if flags.model.endswith(".tar.gz"):
        container["ModelDataUrl"] = flags.model
    else:
        container["ModelDataSource"] = {
            "S3DataSource": {
                "S3Uri": flags.model.rstrip("/") + "/",
                "S3DataType": "S3Prefix",
                "CompressionType": "None",
            }
        }
    return Call(
        "create_model",
        {
            "ModelName": name,
            "PrimaryContainer": container,
            "ExecutionRoleArn": flags.role,
            # AWS's container installs our package when it starts; ours needs no network.
            "EnableNetworkIsolation": isolated and not flags.pytorch_container,
        },
    )


def endpoint_calls(flags: argparse.Namespace, name: str, *, exists: bool) -> list[Call]:
    """Model, configuration and endpoint; an endpoint that exists moves over without a pause."""
    variant: dict[str, Any] = {"VariantName": VARIANT, "ModelName": name}
    if flags.serverless:
        variant["ServerlessConfig"] = {
            "MemorySizeInMB": flags.memory_mb,
            "MaxConcurrency": flags.max_concurrency,
        }
    else:
        variant |= {
            "InstanceType": flags.instance_type,
            "InitialInstanceCount": flags.instance_count,
        }
    return [
        # Serverless endpoints know no network isolation:
        # https://docs.aws.amazon.com/sagemaker/latest/dg/serverless-endpoints.html
        model_call(flags, name, isolated=not flags.serverless),
        Call(
            "create_endpoint_config",
            {"EndpointConfigName": name, "ProductionVariants": [variant]},
        ),
        Call(
            "update_endpoint" if exists else "create_endpoint",
            {"EndpointName": flags.name, "EndpointConfigName": name},
        ),
    ]


def transform_calls(flags: argparse.Namespace, name: str) -> list[Call]:
    """Model and job. Requests are as large as the container asks for, unless the flags say."""
    split = SPLIT_BY_CONTENT_TYPE[flags.content_type]
    source = {"S3DataSource": {"S3DataType": "S3Prefix", "S3Uri": flags.input}}
    parameters = {
        "TransformJobName": name,
        "ModelName": name,
        "ModelClientConfig": {"InvocationsTimeoutInSeconds": LONGEST_INVOCATION_S},
        "BatchStrategy": "MultiRecord" if split == "Line" else "SingleRecord",
        "TransformInput": {
            "DataSource": source,
            "ContentType": flags.content_type,
            "SplitType": split,
            "CompressionType": "Gzip" if flags.gzip else "None",
        },
        "TransformOutput": {
            "S3OutputPath": flags.output,
            "Accept": flags.accept or flags.content_type,
            "AssembleWith": split,
        },
        "TransformResources": {
            "InstanceType": flags.instance_type,
            "InstanceCount": flags.instance_count,
        },
    }
    if not flags.pytorch_container:
        parameters["Environment"] = TRANSFORM_LIMITS
    if flags.max_payload_mb is not None:
        parameters["MaxPayloadInMB"] = flags.max_payload_mb
        parameters["MaxConcurrentTransforms"] = min(
            MOST_AT_ONCE, MOST_PAYLOAD_MB // flags.max_payload_mb
        )
    return [model_call(flags, name, isolated=True), Call("create_transform_job", parameters)]


def pack(model: Path, archive: Path, wheel: Path | None) -> None:
    """Write a model directory as the archive that SageMaker unpacks into `/opt/ml/model`.

    Args:
        model: the model directory.
        archive: a `.tar.gz` to write.
        wheel: our package, for AWS's PyTorch container; `inference.py` goes along.

    Raises:
        CheckpointError: it is not a model directory.
    """
    load(model)
    with tarfile.open(archive, "w:gz") as tar:
        for path in sorted(model.iterdir()):
            if path.is_file() and not path.name.startswith("."):
                tar.add(path, path.name)
        if wheel is not None:
            requirements = archive.with_suffix(".requirements")
            requirements.write_text(f"{CODE_IN_CONTAINER}/{wheel.name}\n", encoding="utf-8")
            tar.add(requirements, "code/requirements.txt")
            requirements.unlink()
            tar.add(wheel, f"code/{wheel.name}")
            tar.add(HERE / "inference.py", "code/inference.py")


def delete(client: Any, endpoint: str) -> None:
    """Remove an endpoint with its configuration and model."""
    config = client.describe_endpoint(EndpointName=endpoint)["EndpointConfigName"]
    variants = client.describe_endpoint_config(EndpointConfigName=config)["ProductionVariants"]
    client.delete_endpoint(EndpointName=endpoint)
    client.delete_endpoint_config(EndpointConfigName=config)
    for variant in variants:
        client.delete_model(ModelName=variant["ModelName"])


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command and its flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack", help="write a model directory as model.tar.gz")
    packing.add_argument("model", type=Path, help="model directory")
    packing.add_argument("archive", type=Path, help=".tar.gz to write")
    packing.add_argument(
        "--wheel", type=Path, help="our package, for AWS's PyTorch container; adds inference.py"
    )
    endpoint = commands.add_parser("endpoint", help="make an endpoint, or move it to a new model")
    _add_model_flags(endpoint, instance_type="ml.c7i.xlarge")
    endpoint.add_argument("--serverless", action="store_true", help="no instances; CPU only")
    endpoint.add_argument("--memory-mb", type=int, default=3072, help="serverless [3072]")
    endpoint.add_argument("--max-concurrency", type=int, default=5, help="serverless [5]")
    transform = commands.add_parser("transform", help="label files on S3, then go")
    _add_model_flags(transform, instance_type="ml.c7i.2xlarge")
    transform.add_argument("--input", required=True, help="s3:// prefix of files")
    transform.add_argument("--output", required=True, help="s3:// prefix to write to")
    transform.add_argument(
        "--content-type",
        choices=SPLIT_BY_CONTENT_TYPE,
        default="application/jsonlines",
        help="of the files [application/jsonlines]",
    )
    transform.add_argument("--accept", help="type of the answers [that of the files]")
    transform.add_argument("--gzip", action="store_true", help="the files are compressed")
    transform.add_argument(
        "--max-payload-mb",
        type=int,
        choices=range(1, MOST_PAYLOAD_MB + 1),
        metavar="N",
        help="largest request, and so the largest CSV or Parquet file; 1 to 100 [6]",
    )
    deletion = commands.add_parser("delete", help="remove an endpoint, its configuration and model")
    deletion.add_argument("name", help="of the endpoint")
    for command in (endpoint, transform, deletion):
        command.add_argument("--region", help="[that of the AWS configuration]")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    """Do what the command says; returns an exit status."""
    flags = parse(arguments)
    try:
        if flags.command == "pack":
            pack(flags.model, flags.archive, flags.wheel)
            return 0
        if flags.command == "delete":
            delete(boto3.client("sagemaker", region_name=flags.region), flags.name)
            return 0
        return _deploy(flags)
    except BatchclfError as error:
        print(f"Error: {error}", file=sys.stderr)
        return error.exit_code


def _deploy(flags: argparse.Namespace) -> int:
    # Models and configurations cannot be changed, so that each deployment has its own.
    name = f"{flags.name}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}"
    client = None if flags.dry_run else boto3.client("sagemaker", region_name=flags.region)
    if flags.command == "transform":
        calls = transform_calls(flags, name)
    else:
        exists = client is not None and _endpoint_exists(client, flags.name)
        calls = endpoint_calls(flags, name, exists=exists)
    if client is None:
        print(json.dumps([asdict(call) for call in calls], indent=2))
        return 0
    for call in calls:
        getattr(client, call.operation)(**call.parameters)
    if flags.wait and flags.command == "transform":
        client.get_waiter("transform_job_completed_or_stopped").wait(TransformJobName=name)
    elif flags.wait:
        client.get_waiter("endpoint_in_service").wait(EndpointName=flags.name)
    print(name if flags.command == "transform" else flags.name)
    return 0


def _endpoint_exists(client: Any, name: str) -> bool:
    pages = client.get_paginator("list_endpoints").paginate(NameContains=name)
    return any(found["EndpointName"] == name for page in pages for found in page["Endpoints"])


def _environment(flags: argparse.Namespace) -> dict[str, str]:
    environment = {}
    if flags.pytorch_container:
        environment = {
            "SAGEMAKER_PROGRAM": "inference.py",
            "SAGEMAKER_SUBMIT_DIRECTORY": CODE_IN_CONTAINER,
        }
    for pair in flags.env:
        name, equals, value = pair.partition("=")
        if not name or not equals:
            raise ConfigError(f"--env {pair}: write NAME=VALUE")
        environment[name] = value
    return environment


def _add_model_flags(parser: argparse.ArgumentParser, instance_type: str) -> None:
    parser.add_argument("name", help="of the endpoint or job")
    parser.add_argument("--image", required=True, help="container image URI in ECR")
    parser.add_argument(
        "--model", required=True, help="s3:// address of model.tar.gz, or prefix of a directory"
    )
    parser.add_argument("--role", required=True, help="ARN of the execution role")
    parser.add_argument("--instance-type", default=instance_type, help=f"[{instance_type}]")
    parser.add_argument("--instance-count", type=int, default=1, help="[1]")
    parser.add_argument(
        "--env",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="for the container, such as BATCHCLF_SERVE_DTYPE=bfloat16; repeatable",
    )
    parser.add_argument(
        "--pytorch-container", action="store_true", help="the image is AWS's own, not ours"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the requests, send none")
    parser.add_argument("--wait", action="store_true", help="until it serves, or is done")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
