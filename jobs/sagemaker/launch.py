"""Start the training job on SageMaker with its Python SDK, version 3 (`pip install sagemaker`).

    python launch.py --image URI --role ARN --output s3://b/models \
        --train s3://b/bbc/train.csv --val s3://b/bbc/val.csv --test s3://b/bbc/test.csv \
        --hyperparameter epochs=3 --hyperparameter lr=2e-5 --spot --checkpoints s3://b/checkpoints

The SDK sends this folder along and runs `train.py` in the container, so that a new version of it
needs no new image. It prints where the model will be.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import boto3

if TYPE_CHECKING:
    from sagemaker.train import ModelTrainer

HERE = Path(__file__).resolve().parent
CHANNELS = "/opt/ml/input/data"
# What the job's page plots, out of the log of `batchclf train`.
METRICS = {
    "train:loss": r": loss (\S+);",
    "validation:loss": r"validation loss (\S+),",
    "validation:accuracy": r"validation loss \S+, accuracy (\S+)",
}
HOUR_S = 3600


def build_trainer(flags: argparse.Namespace, session: boto3.Session) -> "ModelTrainer":
    """The job as the SDK knows it; nothing has been sent."""
    from sagemaker.core.helper.session_helper import Session
    from sagemaker.core.training.configs import (
        CheckpointConfig,
        Compute,
        InputData,
        MetricDefinition,
        OutputDataConfig,
        SourceCode,
        StoppingCondition,
    )
    from sagemaker.train import ModelTrainer

    bucket, _, prefix = flags.output.removeprefix("s3://").partition("/")
    hyperparameters = {"base-model": flags.base_model, **flags.hyperparameters}
    channels = {"train": flags.train, "val": flags.val, "test": flags.test}
    if flags.base_model.startswith("s3://"):
        channels["base"] = flags.base_model
        hyperparameters["base-model"] = f"{CHANNELS}/base"
    waiting = {"max_wait_time_in_seconds": flags.max_wait_hours * HOUR_S} if flags.spot else {}
    trainer = ModelTrainer(
        # What the SDK sends along stays beside the model; it would make a bucket of its own.
        sagemaker_session=Session(
            boto_session=session, default_bucket=bucket, default_bucket_prefix=prefix or None
        ),
        role=flags.role,
        base_job_name=flags.name,
        training_image=flags.image,
        source_code=SourceCode(
            source_dir=str(HERE),
            entry_script="train.py",
            ignore_patterns=["launch.py", "deploy.py", "inference.py", "README.md", "__pycache__"],
        ),
        compute=Compute(
            instance_type=flags.instance_type,
            instance_count=flags.instance_count,
            volume_size_in_gb=flags.volume_gb,
            enable_managed_spot_training=flags.spot,
        ),
        stopping_condition=StoppingCondition(
            max_runtime_in_seconds=flags.max_run_hours * HOUR_S, **waiting
        ),
        input_data_config=[
            InputData(channel_name=name, data_source=uri) for name, uri in channels.items() if uri
        ],
        output_data_config=OutputDataConfig(s3_output_path=flags.output),
        checkpoint_config=CheckpointConfig(s3_uri=flags.checkpoints) if flags.checkpoints else None,
        hyperparameters=hyperparameters,
    )
    return trainer.with_metric_definitions(
        [MetricDefinition(name=name, regex=regex) for name, regex in METRICS.items()]
    )


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The flags, checked against each other."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--image", required=True, help="container image URI in ECR")
    parser.add_argument("--role", required=True, help="execution role: its name or ARN")
    parser.add_argument("--output", required=True, help="s3:// prefix for the model")
    for split, required in (("train", True), ("val", True), ("test", False)):
        parser.add_argument(f"--{split}", required=required, help=f"s3:// address of {split}.csv")
    parser.add_argument(
        "--base-model", default="gpt2", help="on the hub, or an s3:// prefix of one [gpt2]"
    )
    parser.add_argument(
        "--hyperparameter",
        dest="pairs",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a flag of train.py or `batchclf train`, such as epochs=3; repeatable",
    )
    parser.add_argument("--name", default="batchclf-train", help="of the job [batchclf-train]")
    parser.add_argument("--instance-type", default="ml.g6.xlarge", help="[ml.g6.xlarge]")
    parser.add_argument("--instance-count", type=int, default=1, help="[1]")
    parser.add_argument("--volume-gb", type=int, default=30, help="[30]")
    parser.add_argument("--max-run-hours", type=int, default=6, help="[6]")
    parser.add_argument("--spot", action="store_true", help="on spare capacity, at a lower price")
    parser.add_argument("--max-wait-hours", type=int, default=24, help="with --spot, in all [24]")
    parser.add_argument(
        "--checkpoints", help="s3:// prefix that an interrupted training goes on from"
    )
    parser.add_argument("--region", help="[that of the AWS configuration]")
    parser.add_argument("--wait", action="store_true", help="follow the log until the job ends")
    flags = parser.parse_args(arguments)
    if flags.spot and not flags.checkpoints:
        parser.error(
            "--spot needs --checkpoints, else every interruption starts from the beginning"
        )
    if flags.spot and flags.max_wait_hours < flags.max_run_hours:
        parser.error("--max-wait-hours counts the run too; it must be at least --max-run-hours")
    flags.hyperparameters = {}
    for pair in flags.pairs:
        name, equals, value = pair.partition("=")
        if not name or not equals:
            parser.error(f"--hyperparameter {pair}: write NAME=VALUE")
        flags.hyperparameters[name.removeprefix("--")] = _value(value)
    return flags


def main(arguments: Sequence[str], session: boto3.Session | None = None) -> int:
    """Start the job; returns an exit status."""
    flags = parse(arguments)
    trainer = build_trainer(flags, session or boto3.Session(region_name=flags.region))
    trainer.train(wait=flags.wait, logs=flags.wait)
    folder = trainer.output_data.rpartition("/")[0]
    print(f"{folder}/model.tar.gz")
    return 0


def _value(written: str) -> Any:
    try:
        return json.loads(written)
    except ValueError:
        return written


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
