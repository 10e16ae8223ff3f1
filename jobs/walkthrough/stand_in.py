#!/usr/bin/env python3
"""What a console of AWS would do in the walk-through, on a test server that speaks AWS's protocols.

    stand_in.py create      the archive's bucket, and buckets and queues of the templates;
                            prints the URL of the queue
    stand_in.py put FILE... copies files to s3://my-archive/in/
    stand_in.py notify      lets the bucket tell the queue of every new object

On AWS itself `aws cloudformation deploy` and `aws s3 cp` do all that.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import boto3
from cfnlint.decode import decode

JOBS = Path(__file__).resolve().parents[1]
STACK = "news"
INPUT, PREFIX, OUTPUT = "my-archive", "in/", "my-labels"


def create() -> None:
    """Make the buckets and the queues."""
    boto3.client("s3").create_bucket(Bucket=INPUT)
    common = {"Image": "batchclf:1", "InputBucket": INPUT, "OutputBucket": OUTPUT}
    common |= {"VpcId": "vpc-1", "SubnetIds": "subnet-1"}
    _deploy("sqs-worker", ("Queue", "DeadLetterQueue"), common)
    _deploy("aws-batch", ("LabelledBucket",), common | {"CreateOutputBucket": "yes"})
    print(_queue_url())


def put(*files: str) -> None:
    """Copy files into the archive."""
    for file in files:
        boto3.client("s3").upload_file(file, INPUT, PREFIX + Path(file).name)


def notify() -> None:
    """Set the notifications that the template sets on a bucket which it makes itself."""
    sqs = boto3.client("sqs")
    attributes = sqs.get_queue_attributes(QueueUrl=_queue_url(), AttributeNames=["QueueArn"])
    wanted = _template("sqs-worker")["Resources"]["NewObjects"]["Properties"]
    configurations = []
    for told in wanted["NotificationConfiguration"]["QueueConfigurations"]:
        suffix = next(
            rule["Value"] for rule in told["Filter"]["S3Key"]["Rules"] if rule["Name"] == "suffix"
        )
        rules = [{"Name": "prefix", "Value": PREFIX}, {"Name": "suffix", "Value": suffix}]
        configurations.append(
            {
                "QueueArn": attributes["Attributes"]["QueueArn"],
                "Events": [told["Event"]],
                "Filter": {"Key": {"FilterRules": rules}},
            }
        )
    boto3.client("s3").put_bucket_notification_configuration(
        Bucket=INPUT, NotificationConfiguration={"QueueConfigurations": configurations}
    )


def _deploy(job: str, resources: tuple[str, ...], settings: dict[str, str]) -> None:
    """Make some resources of a template: those that a test server has, and this job needs."""
    template = _template(job)
    template["Resources"] = {name: template["Resources"][name] for name in resources}
    for name in ("Outputs", "Metadata"):
        template.pop(name, None)
    boto3.client("cloudformation").create_stack(
        StackName=STACK if job == "sqs-worker" else f"{STACK}-{job}",
        TemplateBody=json.dumps(template),
        Parameters=[
            {"ParameterKey": name, "ParameterValue": value} for name, value in settings.items()
        ],
    )


def _template(job: str) -> dict[str, Any]:
    """A template as plain JSON, its short forms such as !Ref written out."""
    template, problems = decode(str(JOBS / job / "template.yaml"))
    if problems:
        sys.exit(f"{job}: {problems}")
    found: dict[str, Any] = json.loads(json.dumps(template))
    return found


def _queue_url() -> str:
    url: str = boto3.client("sqs").get_queue_url(QueueName=STACK)["QueueUrl"]
    return url


COMMANDS = {"create": create, "put": put, "notify": notify}

if __name__ == "__main__":
    if sys.argv[1:2] == [] or sys.argv[1] not in COMMANDS:
        sys.exit(__doc__)
    if not os.environ.get("AWS_ENDPOINT_URL"):
        sys.exit("set AWS_ENDPOINT_URL to a test server; on AWS deploy the templates themselves")
    COMMANDS[sys.argv[1]](*sys.argv[2:])
