"""The stack of the SQS worker: checked by AWS's own linter, and against what the worker does."""

import subprocess
from typing import Any

import pytest
import servers
from conftest import REPOSITORY

from batchclf.cli.work import work
from batchclf.messages import AllowedSources
from batchclf.store.base import SUFFIXES

JOB = REPOSITORY / "jobs" / "sqs-worker"
TEMPLATE = JOB / "template.yaml"
SHUTDOWN_S = 30  # from SIGTERM to the end of a worker, as the contract says


@pytest.fixture(scope="module")
def resources() -> dict[str, Any]:
    from cfnlint.decode import decode

    template, problems = decode(str(TEMPLATE))
    assert problems == []
    found: dict[str, Any] = template["Resources"]
    return found


@pytest.fixture(scope="module")
def container(resources: dict[str, Any]) -> dict[str, Any]:
    (found,) = resources["TaskDefinition"]["Properties"]["ContainerDefinitions"]
    return dict(found)


def test_the_linter_of_cloudformation_finds_nothing() -> None:
    linter = subprocess.run(
        [servers.script("cfn-lint"), "--include-checks", "I", "--", TEMPLATE],
        capture_output=True,
        text=True,
        check=False,
    )
    assert linter.stdout == ""
    assert linter.returncode == 0, linter.stderr


def test_a_worker_has_time_to_give_its_messages_back(container: dict[str, Any]) -> None:
    assert container["StopTimeout"] >= SHUTDOWN_S


def test_every_variable_of_the_container_is_an_option_of_work(container: dict[str, Any]) -> None:
    options = {f"BATCHCLF_WORK_{option}".upper() for option in names_of_options()}
    names = {variable["Name"] for variable in container["Environment"]} - {"AWS_REGION"}
    assert names <= options
    assert container["Command"] == ["work"]


def names_of_options() -> list[str]:
    """The options of `work` without their dashes, as variables name them."""
    return [
        name.removeprefix("--").replace("-", "_")
        for option in work.params
        for name in [*option.opts, *option.secondary_opts]
    ]


def test_a_worker_may_read_below_the_prefix_that_it_allows(
    resources: dict[str, Any], container: dict[str, Any]
) -> None:
    (allowed,) = (
        variable["Value"]["Fn::Sub"]
        for variable in container["Environment"]
        if variable["Name"] == "BATCHCLF_WORK_ALLOW_SOURCE"
    )
    assert readable(resources) == allowed.replace("s3://", "arn:${AWS::Partition}:s3:::") + "*"
    AllowedSources([allowed.replace("${InputBucket}", "news").replace("${InputPrefix}", "in/")])


def readable(resources: dict[str, Any]) -> str:
    (policy,) = resources["WorkerRole"]["Properties"]["Policies"]
    statements = {s["Sid"]: s for s in policy["PolicyDocument"]["Statement"]}
    arn: str = statements["ReadInput"]["Resource"]["Fn::Sub"]
    return arn


def test_no_policy_of_the_worker_allows_all_calls_or_all_resources(
    resources: dict[str, Any],
) -> None:
    (policy,) = resources["WorkerRole"]["Properties"]["Policies"]
    for statement in policy["PolicyDocument"]["Statement"]:
        actions = statement["Action"]
        for action in [actions] if isinstance(actions, str) else actions:
            assert "*" not in action
        assert statement["Resource"] != "*"


def test_only_s3_may_send_and_only_for_the_input_bucket(resources: dict[str, Any]) -> None:
    statements = resources["QueuePolicy"]["Properties"]["PolicyDocument"]["Statement"]
    (allowed,) = (s for s in statements if s["Effect"] == "Allow")
    assert allowed["Principal"] == {"Service": "s3.amazonaws.com"}
    assert "${InputBucket}" in allowed["Condition"]["ArnEquals"]["aws:SourceArn"]["Fn::Sub"]
    assert "aws:SourceAccount" in allowed["Condition"]["StringEquals"]


def test_every_kind_of_file_that_can_be_read_is_notified_of_and_no_other(
    resources: dict[str, Any],
) -> None:
    told = resources["NewObjects"]["Properties"]["NotificationConfiguration"]
    suffixes = {
        rule["Value"]
        for queue in told["QueueConfigurations"]
        for rule in queue["Filter"]["S3Key"]["Rules"]
        if rule["Name"] == "suffix"
    }
    assert suffixes == set(SUFFIXES)


def test_the_service_grows_with_the_messages_that_wait_for_each_task(
    resources: dict[str, Any],
) -> None:
    policy = resources["BacklogPerTaskPolicy"]["Properties"]
    tracking = policy["TargetTrackingScalingPolicyConfiguration"]
    metrics = {m["Id"]: m for m in tracking["CustomizedMetricSpecification"]["Metrics"]}
    (told,) = (m for m in metrics.values() if m["ReturnData"])
    named = {n: m["MetricStat"]["Metric"]["MetricName"] for n, m in metrics.items() if m != told}
    assert named == {
        "visible": "ApproximateNumberOfMessagesVisible",
        "running": "RunningTaskCount",
    }
    assert told["Expression"].startswith("visible / ")
