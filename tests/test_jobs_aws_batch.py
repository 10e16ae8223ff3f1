"""The AWS Batch definitions: linted, deployed to moto, submitted to, and run by real workers.

moto enforces the permissions of the workers' role; it deploys the stack, less the schedule.
"""

import ast
import fnmatch
import importlib.util
import io
import json
import re
import shlex
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from email import message_from_string
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import boto3
import botocore.session
import models
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import servers
from botocore.exceptions import ClientError
from botocore.validate import ParamValidator
from servers import Endpoint

if TYPE_CHECKING:
    from conftest import RunBatchclf

FOLDER = Path(__file__).resolve().parents[1] / "jobs" / "aws-batch"
TEMPLATE = FOLDER / "template.yaml"
ARCHIVE, LABELS = "my-archive", "my-labels"
ROWS_PER_FILE = 4


@pytest.fixture(scope="module")
def template() -> dict[str, Any]:
    from cfnlint.decode import decode

    decoded, problems = decode(str(TEMPLATE))
    assert problems == []
    plain: dict[str, Any] = json.loads(json.dumps(decoded))
    return plain


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("aws_batch_submit", FOLDER / "submit.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True)
class Cloud:
    """A moto server of our own with the stack in it and three files in the archive."""

    endpoint: Endpoint

    def client(self, service: str, **credentials: str) -> Any:
        keys = {
            "aws_access_key_id": servers.ACCESS_KEY,
            "aws_secret_access_key": servers.SECRET_KEY,
            **credentials,
        }
        return boto3.session.Session(region_name=servers.REGION).client(
            service,  # type: ignore[call-overload]
            endpoint_url=self.endpoint.endpoint_url,
            **keys,
        )

    def tell(self, path: str, body: str) -> None:
        """Call moto's own interface."""
        request = urllib.request.Request(
            f"{self.endpoint.endpoint_url}/moto-api/{path}",
            data=body.encode(),
            headers={"Content-Type": "text/plain"},
        )
        with urllib.request.urlopen(request) as reply:
            reply.read()

    @contextmanager
    def enforcing_rights(self) -> Iterator[None]:
        """Refuse what no policy allows."""
        self.tell("reset-auth", "0")
        try:
            yield
        finally:
            self.tell("reset-auth", "inf")

    def put_news(self, name: str, column: str = "body") -> None:
        rows = {
            "id": [f"{name}-{row}" for row in range(ROWS_PER_FILE)],
            "title": ["Bank shares rise"] * ROWS_PER_FILE,
            column: [f"The profits of {row} doubled." for row in range(ROWS_PER_FILE)],
        }
        file = io.BytesIO()
        pq.write_table(pa.table(rows), file)
        self.endpoint.s3.put_object(Bucket=ARCHIVE, Key=f"news/{name}", Body=file.getvalue())

    def keys(self, bucket: str) -> set[str]:
        found = self.endpoint.s3.list_objects_v2(Bucket=bucket)
        return {entry["Key"] for entry in found.get("Contents", [])}

    def job_definition(self) -> dict[str, Any]:
        found: dict[str, Any]
        (found,) = self.client("batch").describe_job_definitions()["jobDefinitions"]
        return found

    def submit(self, *args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, FOLDER / "submit.py", *args],
            env=servers.clean_environment(self.endpoint.env),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def jobs(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.client("batch").list_jobs(jobQueue="batchclf")[
            "jobSummaryList"
        ]
        return found


@pytest.fixture(scope="module")
def cloud(template: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cloud]:
    folder = tmp_path_factory.mktemp("cloud")
    model = models.make_hf_checkpoint(folder / "tiny")
    with servers.moto(folder) as endpoint:
        cloud = Cloud(endpoint)
        cloud.tell("config", json.dumps({"batch": {"use_docker": False}}))
        _deploy(cloud, template, model)
        endpoint.s3.create_bucket(Bucket=ARCHIVE)
        for name in ("a.parquet", "b.parquet", "c.parquet"):
            cloud.put_news(name)
        yield cloud


def _deploy(cloud: Cloud, template: Mapping[str, Any], model: Path) -> None:
    ec2 = cloud.client("ec2")
    given = {
        "Image": "registry.example/batchclf:1",
        "Model": str(model),
        "Dtype": "float32",
        "InputBucket": ARCHIVE,
        "InputPrefix": "news/",
        "TextColumns": "title body",
        "KeepColumns": "title",
        "OutputBucket": LABELS,
        "CreateOutputBucket": "yes",
        "VpcId": ec2.describe_vpcs()["Vpcs"][0]["VpcId"],
        "SubnetIds": ec2.describe_subnets()["Subnets"][0]["SubnetId"],
    }
    # moto takes lists from parameters that are given, but not from their defaults
    for name in ("GpuInstanceTypes", "CpuInstanceTypes"):
        given[name] = template["Parameters"][name]["Default"]
    stack = json.loads(json.dumps(template))
    for resource in stack["Resources"].values():
        # moto asks for the role that AWS makes by itself
        if resource["Type"] == "AWS::Batch::ComputeEnvironment":
            resource["Properties"]["ServiceRole"] = {"Fn::GetAtt": ["InstanceRole", "Arn"]}
    del stack["Resources"]["NightlyRun"]
    cloud.client("cloudformation").create_stack(
        StackName="batchclf",
        TemplateBody=json.dumps(stack),
        Parameters=[{"ParameterKey": k, "ParameterValue": v} for k, v in given.items()],
        Capabilities=["CAPABILITY_IAM"],
    )


@dataclass(frozen=True)
class DryRun:
    """What `submit.py --dry-run` printed and said, and the jobs before and after it."""

    request: dict[str, Any]
    said: str
    jobs_before: list[dict[str, Any]]
    jobs_after: list[dict[str, Any]]


@pytest.fixture(scope="module")
def dry_run(cloud: Cloud) -> DryRun:
    before = cloud.jobs()
    run = cloud.submit("--dry-run")
    assert run.returncode == 0, run.stderr
    return DryRun(json.loads(run.stdout), run.stderr, before, cloud.jobs())


def validate(request: Mapping[str, Any]) -> list[str]:
    """What botocore finds wrong with the parameters of SubmitJob."""
    service = botocore.session.get_session().get_service_model("batch")
    shape = service.operation_model("SubmitJob").input_shape
    report = ParamValidator().validate(request, shape)
    return [report.generate_report()] if report.has_errors() else []


def test_cfn_lint_finds_nothing_in_the_template() -> None:
    run = subprocess.run(
        [servers.script("cfn-lint"), "--include-checks", "I", "--", TEMPLATE],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (run.returncode, run.stdout) == (0, "")


def test_every_parameter_of_the_template_says_what_it_is(template: dict[str, Any]) -> None:
    parameters = template["Parameters"]
    assert [name for name in parameters if not parameters[name].get("Description")] == []


def test_every_parameter_of_the_template_stands_in_a_group_of_its_form(
    template: dict[str, Any],
) -> None:
    groups = template["Metadata"]["AWS::CloudFormation::Interface"]["ParameterGroups"]
    assert sorted(name for group in groups for name in group["Parameters"]) == sorted(
        template["Parameters"]
    )


def test_no_file_names_an_account() -> None:
    texts = [path.read_text(encoding="utf-8") for path in FOLDER.iterdir() if path.is_file()]
    assert [found for text in texts for found in re.findall(r"\b[0-9]{12}\b", text)] == []


def test_the_readme_gives_every_parameter_that_has_no_default(template: dict[str, Any]) -> None:
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    needed = {name for name, given in template["Parameters"].items() if "Default" not in given}
    given = set(re.findall(r"\b([A-Z]\w+)=", readme.partition("--parameter-overrides")[2]))
    assert needed <= given <= set(template["Parameters"])


@pytest.mark.parametrize(
    ("exit_code", "status_reason", "action"),
    [
        (75, "Essential container in task exited", "RETRY"),
        (137, "Essential container in task exited", "RETRY"),
        (None, "Host EC2 (instance i-0) terminated.", "RETRY"),
        (1, "Essential container in task exited", "EXIT"),
        (64, "Essential container in task exited", "EXIT"),
        (65, "Essential container in task exited", "EXIT"),
        (70, "Essential container in task exited", "EXIT"),
        (None, "Task failed to start", "EXIT"),
    ],
)
def test_only_what_may_pass_is_tried_again(
    template: dict[str, Any], exit_code: int | None, status_reason: str, action: str
) -> None:
    rules = template["Resources"]["JobDefinition"]["Properties"]["RetryStrategy"]["EvaluateOnExit"]
    seen = {"OnExitCode": exit_code, "OnStatusReason": status_reason, "OnReason": ""}
    assert next(rule["Action"] for rule in rules if _matches(rule, seen)) == action


def _matches(rule: Mapping[str, str], seen: Mapping[str, object]) -> bool:
    return all(
        seen[name] is not None and fnmatch.fnmatchcase(str(seen[name]), pattern)
        for name, pattern in rule.items()
        if name != "Action"
    )


def test_spot_gpus_come_before_cpus(cloud: Cloud) -> None:
    batch = cloud.client("batch")
    (queue,) = batch.describe_job_queues()["jobQueues"]
    order = sorted(queue["computeEnvironmentOrder"], key=lambda entry: entry["order"])
    kinds = {
        found["computeEnvironmentArn"]: found["computeResources"]["type"]
        for found in batch.describe_compute_environments()["computeEnvironments"]
    }
    assert [kinds[entry["computeEnvironment"]] for entry in order] == ["SPOT", "EC2"]


def test_a_job_asks_for_no_gpu_so_that_it_fits_both_kinds_of_machine(cloud: Cloud) -> None:
    asked = cloud.job_definition()["containerProperties"]["resourceRequirements"]
    assert {requirement["type"] for requirement in asked} == {"VCPU", "MEMORY"}


@pytest.mark.parametrize("before", ['OPTIONS="--default-ulimit nofile=32768:65536"\n', ""])
def test_gpu_machines_show_their_gpu_to_jobs_that_ask_for_none(
    template: dict[str, Any], tmp_path: Path, before: str
) -> None:
    user_data = template["Resources"]["GpuLaunchTemplate"]["Properties"]["LaunchTemplateData"][
        "UserData"
    ]["Fn::Base64"]
    (part,) = message_from_string(user_data).get_payload()
    options = tmp_path / "docker"
    options.write_text(before, encoding="utf-8")
    script = part.get_payload().replace("/etc/sysconfig/docker", str(options))
    assert "systemctl restart docker" in script
    script = script.replace("systemctl restart docker", "")
    subprocess.run(["/bin/sh", "-ec", script], check=True)
    (line,) = options.read_text(encoding="utf-8").splitlines()
    assert shlex.split(line)[0].startswith("OPTIONS=--default-runtime nvidia ")


def test_an_output_bucket_of_the_template_ends_incomplete_uploads(
    template: dict[str, Any],
) -> None:
    bucket = template["Resources"]["LabelledBucket"]
    (rule,) = bucket["Properties"]["LifecycleConfiguration"]["Rules"]
    assert rule["Status"] == "Enabled"
    assert rule["AbortIncompleteMultipartUpload"]["DaysAfterInitiation"] >= 1
    assert bucket["DeletionPolicy"] == "Retain"


@pytest.mark.parametrize(("variant", "size"), [(1, None), (2, 4)])
def test_the_nightly_request_is_one_that_aws_batch_takes(
    template: dict[str, Any], variant: int, size: int | None
) -> None:
    target = template["Resources"]["NightlyRun"]["Properties"]["Target"]
    text = target["Input"]["Fn::If"][variant]["Fn::Sub"]
    workers = str(template["Parameters"]["NightlyWorkers"]["Default"])
    for name, value in (("AWS::StackName", "batchclf"), ("NightlyWorkers", workers)):
        text = text.replace(f"${{{name}}}", value)
    # the scheduler writes the names of the API with a capital
    request = _uncapitalised(json.loads(text))
    assert validate(request) == []
    assert request.get("arrayProperties", {}).get("size") == size


def _uncapitalised(value: Any) -> Any:
    if isinstance(value, dict):
        return {key[0].lower() + key[1:]: _uncapitalised(inner) for key, inner in value.items()}
    return value


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ([], 3),
        (["--max-workers", "1"], None),
        (["--rows-per-shard", "2"], 6),
        (["--limit", "3"], None),
    ],
)
def test_the_array_is_as_large_as_the_shards_and_the_limit_allow(
    cloud: Cloud, options: list[str], size: int | None
) -> None:
    run = cloud.submit("--dry-run", *options)
    request = json.loads(run.stdout)
    assert validate(request) == []
    assert request.get("arrayProperties", {}).get("size") == size


def test_the_options_of_classify_are_passed_on_to_the_workers(cloud: Cloud) -> None:
    columns = ["--text-column", "body", "--text-column", "title", "--keep-columns", "none"]
    uris = [f"s3://{ARCHIVE}/news/a.parquet", "--output", f"s3://{LABELS}/other"]
    run = cloud.submit("--dry-run", *uris, *columns, "--rows-per-shard", "3")
    command = json.loads(run.stdout)["containerOverrides"]["command"]
    assert command[:2] == ["classify", f"s3://{ARCHIVE}/news/a.parquet"]
    assert command[2:] == [*uris[1:], *columns, "--rows-per-shard", "3"]


def test_a_dry_run_submits_nothing(dry_run: DryRun) -> None:
    assert dry_run.jobs_after == dry_run.jobs_before


def test_the_plan_is_made_with_the_settings_of_the_stack(dry_run: DryRun) -> None:
    """Without them the inputs have no column `text` and cannot be read."""
    assert dry_run.said == "3 files, 12 rows, 3 shards: 3 workers\n"


def test_the_workers_get_what_the_stack_labels_every_night(dry_run: DryRun) -> None:
    command = dry_run.request["containerOverrides"]["command"]
    assert command == ["classify", f"s3://{ARCHIVE}/news/"]


def test_a_request_may_not_set_variables_that_are_reserved_for_aws_batch(
    cloud: Cloud, dry_run: DryRun
) -> None:
    given = cloud.job_definition()["containerProperties"]["environment"]
    given += dry_run.request["containerOverrides"].get("environment", [])
    assert [each["name"] for each in given if each["name"].startswith("AWS_BATCH")] == []


def test_an_input_that_cannot_be_read_keeps_the_job_from_being_submitted(cloud: Cloud) -> None:
    cloud.put_news("odd/z.parquet", column="words")
    before = cloud.jobs()
    run = cloud.submit(f"s3://{ARCHIVE}/news/odd/")
    cloud.endpoint.s3.delete_object(Bucket=ARCHIVE, Key="news/odd/z.parquet")
    assert run.returncode == 65
    assert "no text column 'body'" in run.stderr
    assert cloud.jobs() == before


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["news.csv"], "news.csv: workers in the cloud cannot read it"),
        (["--stack", "elsewhere"], "no active job definition 'elsewhere'"),
        (["--max-workers", "10001"], "--max-workers"),
    ],
)
def test_what_makes_no_sense_is_a_usage_error(cloud: Cloud, args: list[str], said: str) -> None:
    run = cloud.submit(*args)
    assert (run.returncode, run.stdout) == (64, "")
    assert said in run.stderr


def test_a_request_larger_than_aws_batch_takes_is_refused(script: ModuleType) -> None:
    definition = {"jobDefinitionName": "batchclf", "jobDefinitionArn": "arn"}
    inputs = [f"s3://{ARCHIVE}/{number:050}.parquet" for number in range(500)]
    with pytest.raises(script.ConfigError, match="name a prefix"):
        script.make_request(definition, ["classify", *inputs], 500)


@pytest.mark.slow
def test_the_workers_of_a_submitted_array_label_every_row_once_with_no_more_rights_than_theirs(
    cloud: Cloud, run_batchclf: "RunBatchclf"
) -> None:
    before = cloud.keys(ARCHIVE), cloud.keys(LABELS)
    assert cloud.submit("--max-workers", "2").returncode == 0
    assert (cloud.keys(ARCHIVE), cloud.keys(LABELS)) == before
    size, command, environment = _submitted(cloud)
    worker = _worker_credentials(cloud)
    with cloud.enforcing_rights():
        for index in range(size):
            _work(run_batchclf, command, environment | worker, index, size)
        s3 = _s3_of(cloud, worker)
        labelled = _labelled(s3)
        assert sum(_num_rows(s3, key) for key in labelled) == 3 * ROWS_PER_FILE
        _check_rights(s3, labelled)
    # with one more input the mark of success, which a worker may delete, speaks too soon
    cloud.put_news("d.parquet")
    with cloud.enforcing_rights():
        _work(run_batchclf, command, environment | worker, 0, 1)
    output = f"s3://{LABELS}/labelled"
    verdict = run_batchclf("verify", output, f"s3://{ARCHIVE}/news/", env=cloud.endpoint.env)
    assert verdict.returncode == 0, verdict.stdout


def _submitted(cloud: Cloud) -> tuple[int, list[str], dict[str, str]]:
    """How many workers were submitted, and what AWS Batch would start them with."""
    children = [job["jobId"] for job in cloud.jobs() if ":" in job["jobId"]]
    (container, *others) = [
        job["container"] for job in cloud.client("batch").describe_jobs(jobs=children)["jobs"]
    ]
    assert all(other["command"] == container["command"] for other in others)
    settings = {each["name"]: each["value"] for each in container["environment"]}
    return len(children), container["command"], settings


def _worker_credentials(cloud: Cloud) -> dict[str, str]:
    role_arn = cloud.job_definition()["containerProperties"]["jobRoleArn"]
    iam, role = cloud.client("iam"), role_arn.rpartition("/")[2]
    # moto keeps a policy from CloudFormation as a Python dict, and enforces those that are JSON
    policy = iam.get_role_policy(RoleName=role, PolicyName="buckets")["PolicyDocument"]
    as_json = json.dumps(ast.literal_eval(str(policy)))
    iam.put_role_policy(RoleName=role, PolicyName="buckets", PolicyDocument=as_json)
    keys = cloud.client("sts").assume_role(RoleArn=role_arn, RoleSessionName="worker")
    return {
        "AWS_ACCESS_KEY_ID": keys["Credentials"]["AccessKeyId"],
        "AWS_SECRET_ACCESS_KEY": keys["Credentials"]["SecretAccessKey"],
        "AWS_SESSION_TOKEN": keys["Credentials"]["SessionToken"],
        "AWS_ENDPOINT_URL": cloud.endpoint.endpoint_url,
        "NO_PROXY": servers.HOST,
    }


def _work(
    run_batchclf: "RunBatchclf",
    command: Sequence[str],
    environment: Mapping[str, str],
    index: int,
    size: int,
) -> None:
    share = {"AWS_BATCH_JOB_ARRAY_INDEX": str(index), "AWS_BATCH_JOB_ARRAY_SIZE": str(size)}
    run = run_batchclf(*command, env={**environment, **share, "OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stderr


def _s3_of(cloud: Cloud, worker: Mapping[str, str]) -> Any:
    return cloud.client(
        "s3",
        aws_access_key_id=worker["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=worker["AWS_SECRET_ACCESS_KEY"],
        aws_session_token=worker["AWS_SESSION_TOKEN"],
    )


def _labelled(s3: Any) -> list[str]:
    found = s3.list_objects_v2(Bucket=LABELS)["Contents"]
    assert any(entry["Key"].endswith("/_SUCCESS.json") for entry in found)
    return [entry["Key"] for entry in found if entry["Key"].endswith(".parquet")]


def _num_rows(s3: Any, key: str) -> int:
    body = s3.get_object(Bucket=LABELS, Key=key)["Body"].read()
    num_rows: int = pq.read_table(pa.BufferReader(body)).num_rows
    return num_rows


def _check_rights(s3: Any, labelled: Sequence[str]) -> None:
    # large objects go up in parts
    upload = {"Bucket": LABELS, "Key": "labelled/large.parquet"}
    upload["UploadId"] = s3.create_multipart_upload(**upload)["UploadId"]
    s3.upload_part(**upload, PartNumber=1, Body=b"part")
    s3.abort_multipart_upload(**upload)
    refused = [
        (s3.delete_object, {"Bucket": LABELS, "Key": labelled[0]}),
        (s3.delete_object, {"Bucket": ARCHIVE, "Key": "news/a.parquet"}),
        (s3.put_object, {"Bucket": ARCHIVE, "Key": "news/new.parquet", "Body": b""}),
        (s3.put_object, {"Bucket": LABELS, "Key": "elsewhere/new.parquet", "Body": b""}),
        (s3.get_object, {"Bucket": ARCHIVE, "Key": "private/a.parquet"}),
        (s3.create_bucket, {"Bucket": "another-bucket"}),
    ]
    for call, what in refused:
        with pytest.raises(ClientError, match="AccessDenied"):
            call(**what)
