"""The contract of `batchclf serve`, through the console script and real clients."""

import csv
import io
import json
import re
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import servers
from botocore.config import Config
from botocore.exceptions import ClientError
from serve.running import (
    Server,
    free_port,
    is_ready,
    running,
    starting,
    starting_command,
    wait_until,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from conftest import RunBatchclf

TYPES = {
    "news-1.parquet": "application/vnd.apache.parquet",
    "news-2.csv": "text/csv",
    "news-4.jsonl": "application/jsonlines",
}
TEXT = "Striker scores twice in the cup final after extra time, says the coach of the champions."
LABELS = ["business", "entertainment", "politics", "sport", "tech"]


@pytest.fixture(scope="module")
def labelled(
    run_batchclf: "RunBatchclf", model: Path, sample: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, object]]:
    """What `classify` says of the sample, by id."""
    output = tmp_path_factory.mktemp("labelled")
    result = run_batchclf(
        "classify",
        sample,
        "--model",
        model,
        "--output",
        output,
        "--dtype",
        "float32",
        "--no-progress",
        env={"OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    rows = pa.concat_tables(pq.read_table(path) for path in output.glob("fp=*/*.parquet"))
    return {row["id"]: row for row in rows.to_pylist()}


@pytest.fixture(scope="module")
def article(sample: Path) -> dict[str, str]:
    """One of the sample, with its id."""
    row: dict[str, str] = pq.read_table(sample / "news-1.parquet").slice(3, 1).to_pylist()[0]
    return row


def test_ping_is_unhealthy_until_the_model_answered_a_warm_up(model: Path, tmp_path: Path) -> None:
    statuses = set()

    def healthy() -> bool:
        assert server.process.poll() is None, server.log_text()
        try:
            statuses.add(server.ask("GET", "/ping").status)
        except ConnectionRefusedError:
            return False
        return 200 in statuses

    with starting(tmp_path / "log", "--model", model) as server:
        wait_until(healthy, "a healthy /ping", 60)
        assert statuses <= {200, 503}
        assert [line for line in server.log_lines() if line["message"].startswith("ready on")]


def test_a_request_before_the_model_is_ready_is_told_when_to_come_back(
    model: Path, tmp_path: Path
) -> None:
    answers = []

    def answered() -> bool:
        assert server.process.poll() is None, server.log_text()
        try:
            answers.append(server.invoke({"text": TEXT}))
        except ConnectionRefusedError:
            return False
        return True

    with starting(tmp_path / "log", "--model", model) as server:
        wait_until(answered, "an answer", 60)
    if answers[0].status != 200:  # a very fast machine may have loaded the model already
        assert (answers[0].status, answers[0].code) == (503, "starting")
        assert answers[0].headers["Retry-After"] == "1"


def test_one_text_is_answered_with_probabilities_the_best_first(server: Server) -> None:
    answer = server.invoke({"text": TEXT})
    assert answer.status == 200
    assert answer.headers["Content-Type"] == "application/json"
    assert next(iter(answer.json)) == "sport"
    assert sorted(answer.json) == LABELS
    assert list(answer.json.values()) == sorted(answer.json.values(), reverse=True)
    assert sum(answer.json.values()) == pytest.approx(1, abs=1e-5)


def test_one_text_gets_the_probabilities_that_classify_gives(
    server: Server, article: dict[str, str], labelled: dict[str, dict[str, object]]
) -> None:
    answer = server.invoke({"text": article["text"]})
    assert answer.json == pytest.approx(labelled[article["id"]]["probs"], abs=1e-5)


@pytest.mark.parametrize("name", TYPES)
def test_a_file_gets_the_rows_that_classify_writes(
    name: str, server: Server, sample: Path, labelled: dict[str, dict[str, object]]
) -> None:
    answer = server.invoke((sample / name).read_bytes(), TYPES[name], Accept="application/json")
    assert answer.status == 200
    for row in answer.json:
        expected = labelled[row["id"]]
        assert row["probs"] == pytest.approx(expected["probs"], abs=1e-5)
        assert row["score"] == pytest.approx(expected["score"], abs=1e-5)
        for same in ("row", "label", "n_tokens", "truncated", "error"):
            assert row[same] == expected[same]


def test_an_answer_has_the_type_of_its_question_where_none_is_asked_for(
    server: Server, sample: Path
) -> None:
    for name, kind in TYPES.items():
        answer = server.invoke((sample / name).read_bytes(), kind)
        assert answer.headers["Content-Type"].split(";")[0] == kind


def test_every_type_of_answer_holds_the_same(server: Server, sample: Path) -> None:
    body = (sample / "news-2.csv").read_bytes()
    answers = {
        kind: server.invoke(body, "text/csv", Accept=kind).body
        for kind in ("application/json", *TYPES.values())
    }
    rows = json.loads(answers["application/json"])
    lines = answers["application/jsonlines"].splitlines()
    assert [json.loads(line) for line in lines] == rows
    table = pq.read_table(io.BytesIO(answers["application/vnd.apache.parquet"]))
    assert table.drop_columns("probs").to_pylist() == [
        {name: value for name, value in row.items() if name != "probs"} for row in rows
    ]
    assert table.schema.field("score").type == pa.float32()
    flat = list(csv.DictReader(io.StringIO(answers["text/csv"].decode())))
    assert [row["label"] for row in flat] == [row["label"] for row in rows]
    assert [float(row["probs.sport"]) for row in flat] == pytest.approx(
        [row["probs"]["sport"] for row in rows], abs=1e-6
    )


def test_a_csv_without_a_header_is_answered_line_by_line(server: Server) -> None:
    answer = server.invoke(f'"{TEXT}"\n"{TEXT}"\n'.encode(), "text/csv; header=absent")
    rows = list(csv.reader(io.StringIO(answer.body.decode())))
    assert [row[:2] for row in rows] == [["0", "sport"], ["1", "sport"]]


def test_rows_that_cannot_be_labelled_are_answered_with_their_error(server: Server) -> None:
    answer = server.invoke([{"text": TEXT}, {"text": None}, {"text": "a \ud800"}, {"text": " "}])
    assert answer.status == 200
    codes = [row["error"] and row["error"].split(":")[0] for row in answer.json]
    assert codes == [None, "null_text", "invalid_utf8", "empty_text"]
    assert [row["label"] for row in answer.json] == ["sport", None, None, None]


def test_a_single_text_that_cannot_be_labelled_is_refused_with_its_error(server: Server) -> None:
    answer = server.invoke({"text": ""})
    assert (answer.status, answer.code) == (422, "empty_text")


@pytest.mark.parametrize("body", [[], {"instances": []}])
def test_no_rows_are_answered_with_none(server: Server, body: object) -> None:
    answer = server.invoke(body)
    assert (answer.status, answer.json) == (200, {"predictions": []} if body else [])


def test_instances_are_answered_as_predictions(server: Server) -> None:
    answer = server.invoke({"instances": [{"text": TEXT}, TEXT]})
    assert [row["label"] for row in answer.json["predictions"]] == ["sport", "sport"]


def test_details_say_how_far_the_model_read(server: Server) -> None:
    text = f"{TEXT} " * 100
    answer = server.invoke({"text": text}, query="?details=true").json
    assert (answer["label"], answer["n_tokens"], answer["truncated"]) == ("sport", 256, True)
    again = server.invoke({"text": text[: answer["read_chars"]]}, query="?details=true").json
    assert (again["n_tokens"], again["truncated"]) == (256, False)
    assert again["probs"] == pytest.approx(answer["probs"], abs=1e-5)


def test_columns_are_chosen_in_the_query_or_in_custom_attributes(server: Server) -> None:
    body = f"title,body,x\nCup final,{TEXT.replace(',', '')},7\n".encode()
    query = "text_column=title&text_column=body&keep_columns=x"
    by_query = server.invoke(body, "text/csv", f"?{query}")
    by_attributes = server.invoke(body, "text/csv", **{"X-Amzn-SageMaker-Custom-Attributes": query})
    assert by_query.status == 200
    assert by_query.body == by_attributes.body
    assert by_query.body.splitlines()[1].startswith(b'"7",0,"sport"')


@pytest.mark.parametrize(
    ("kind", "accept", "body", "query", "status", "code"),
    [
        ("text/xml", "*/*", b"<a/>", "", 415, "unknown_type"),
        ("", "*/*", b"{}", "", 415, "unknown_type"),
        ("application/json", "text/html", b'{"text":"a"}', "", 406, "not_acceptable"),
        ("application/json", "*/*", b'{"text":', "", 400, "not_json"),
        ("application/json", "*/*", b"5", "", 400, "wrong_shape"),
        ("application/json", "*/*", b'{"texts":"a"}', "", 400, "unreadable"),
        ("text/csv", "*/*", b"", "", 400, "unreadable"),
        ("application/vnd.apache.parquet", "*/*", b"PAR1", "", 400, "unreadable"),
        ("application/json", "*/*", b'{"text":"a"}', "?color=red", 400, "unknown_parameter"),
        ("text/csv", "*/*", b"a\n", "?delimiter=ab", 400, "wrong_parameter"),
    ],
)
def test_a_wrong_request_is_told_what_is_wrong(
    server: Server, kind: str, accept: str, body: bytes, query: str, status: int, code: str
) -> None:
    answer = server.invoke(body, kind, query, Accept=accept)
    assert (answer.status, answer.code) == (status, code)
    assert server.ask("GET", "/ping").status == 200


@pytest.mark.parametrize("host", ["[", "a:b:c", "", "é", "x" * 5000])
def test_a_strange_host_is_none_of_our_business(server: Server, host: str) -> None:
    with server.connect() as connection:
        request = f"GET /page.js?x=%ff HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n"
        connection.sendall(request.encode("latin-1"))
        assert connection.recv(100).startswith(b"HTTP/1.1 200 ")


def test_a_compressed_body_is_refused(server: Server) -> None:
    answer = server.invoke({"text": TEXT}, Content_Encoding="gzip")
    assert (answer.status, answer.code) == (415, "unknown_encoding")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nothing", 404), ("GET", "/../../etc/passwd", 404), ("GET", "/invocations", 405)],
)
def test_what_is_not_there_is_said_so_in_json(
    server: Server, method: str, path: str, status: int
) -> None:
    answer = server.ask(method, path)
    assert answer.status == status
    assert answer.json["error"]["message"]
    assert answer.headers["Allow"] == ("POST" if status == 405 else None)


def test_an_answer_comes_in_one_packet(server: Server) -> None:
    with server.connect() as connection:
        connection.sendall(b"GET /execution-parameters HTTP/1.1\r\nhost: test\r\n\r\n")
        head, _, body = connection.recv(1 << 16).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ")
    assert json.loads(body)


def test_heads_alone_are_answered(server: Server) -> None:
    answer = server.ask("HEAD", "/ping")
    assert (answer.status, answer.body) == (200, b"")


def test_a_body_may_come_in_chunks(server: Server) -> None:
    body = json.dumps({"text": TEXT}).encode()
    pieces = iter([body[:5], body[5:50], body[50:]])
    answer = server.ask("POST", "/invocations", pieces, {"Content-Type": "application/json"})
    assert next(iter(answer.json)) == "sport"


def test_batch_transform_is_told_what_to_send(server: Server) -> None:
    wanted = server.ask("GET", "/execution-parameters").json
    assert wanted["BatchStrategy"] == "MULTI_RECORD"
    # https://docs.aws.amazon.com/sagemaker/latest/APIReference/API_CreateTransformJob.html
    assert 1 <= wanted["MaxConcurrentTransforms"] * wanted["MaxPayloadInMB"] <= 100


def test_a_batch_transform_job_gets_a_line_for_each_of_its_lines(
    model: Path, sample: Path, tmp_path: Path, labelled: dict[str, dict[str, object]]
) -> None:
    """What SageMaker does: asks for the parameters, cuts at lines, and puts answers together."""
    lines = (sample / "news-4.jsonl").read_bytes().splitlines(keepends=True)
    job = {
        "SAGEMAKER_BATCH": "true",
        "SAGEMAKER_BATCH_STRATEGY": "MULTI_RECORD",
        "SAGEMAKER_MAX_PAYLOAD_IN_MB": "3",
        "BATCHCLF_SERVE_MAX_BODY_MIB": "1",
        "BATCHCLF_SERVE_DTYPE": "float32",
    }
    kind = "application/jsonlines"
    with running(tmp_path / "log", "--model", model, env=job) as server:
        wanted = server.ask("GET", "/execution-parameters").json
        assert wanted["MaxPayloadInMB"] == 3
        payloads = [b"".join(lines[first : first + 5]) for first in range(0, len(lines), 5)]
        with ThreadPoolExecutor(wanted["MaxConcurrentTransforms"]) as pool:
            answers = list(pool.map(lambda body: server.invoke(body, kind, Accept=kind), payloads))
        assert {answer.headers["Content-Type"] for answer in answers} == {kind}
        rows = [json.loads(line) for answer in answers for line in answer.body.splitlines()]
        assert [row["id"] for row in rows] == [json.loads(line)["id"] for line in lines]
        for row in rows:
            assert row["probs"] == pytest.approx(labelled[row["id"]]["probs"], abs=1e-5)
        large = json.dumps({"text": TEXT, "other": "x" * (2 << 20)}).encode()
        assert server.invoke(large, kind, Accept=kind).status == 200


@pytest.fixture(scope="module")
def runtime(server: Server) -> "Iterator[object]":
    """AWS's own client, pointed at the server."""
    client = boto3.client(
        "sagemaker-runtime",
        region_name="us-east-1",
        endpoint_url=f"{server.url}",
        aws_access_key_id="testing",
        aws_secret_access_key="testing-secret",
        config=Config(retries={"total_max_attempts": 1}, proxies={}),
    )
    client.meta.events.register("before-sign", _as_in_a_container)
    yield client
    client.close()


def _as_in_a_container(request: object, **_: object) -> None:
    """SageMaker calls `/invocations` of the container for `/endpoints/NAME/invocations`."""
    request.url = re.sub(r"/endpoints/[^/]+/invocations", "/invocations", request.url)  # type: ignore[attr-defined]


def test_the_original_clients_call_works_unchanged(runtime: "object", server: Server) -> None:
    response = runtime.invoke_endpoint(  # type: ignore[attr-defined]
        EndpointName="news",
        ContentType="application/json",
        Accept="application/json",
        Body=json.dumps({"text": TEXT}),
    )
    body = json.loads(response["Body"].read().decode("utf-8"))
    assert body == server.invoke({"text": TEXT}).json


def test_invoke_endpoint_passes_custom_attributes(runtime: "object") -> None:
    response = runtime.invoke_endpoint(  # type: ignore[attr-defined]
        EndpointName="news",
        ContentType="text/csv",
        Accept="application/jsonlines",
        CustomAttributes="text_column=body",
        Body=f"body\n{TEXT.replace(',', '')}\n",
    )
    assert json.loads(response["Body"].read())["label"] == "sport"


def test_invoke_endpoint_raises_on_a_refusal(runtime: "object") -> None:
    with pytest.raises(ClientError) as raised:
        runtime.invoke_endpoint(  # type: ignore[attr-defined]
            EndpointName="news", ContentType="application/json", Body="{"
        )
    assert raised.value.response["ResponseMetadata"]["HTTPStatusCode"] == 400


def test_metrics_count_requests_rows_and_batches(server: Server) -> None:
    before = server.metric('batchclf_rows_total{outcome="labelled"}')
    failed = server.metric('batchclf_rows_total{outcome="failed"}')
    server.invoke([{"text": TEXT}, {"text": ""}])
    assert server.metric('batchclf_rows_total{outcome="labelled"}') == before + 1
    assert server.metric('batchclf_rows_total{outcome="failed"}') == failed + 1
    assert server.metric("batchclf_batch_rows_count") > 0
    assert server.metric("batchclf_ready") == 1


def test_the_access_log_tells_everything_but_the_text(server: Server) -> None:
    secret = "zanzibar quokka"
    server.invoke({"text": f"{secret} {TEXT}"})
    server.invoke(f'{{"text": "{secret}'.encode())
    server.ask("GET", f"/{secret.replace(' ', '/')}?text={secret.replace(' ', '+')}")
    wait_until(
        lambda: server.log_lines()[-1].get("status") == 404, "the last line of the access log"
    )
    line = next(line for line in reversed(server.log_lines()) if line.get("rows") == 1)
    assert line["route"] == "/invocations"
    assert line["status"] == 200
    assert line["tokens"] > 0
    assert line["bytes_in"] > 0
    assert line["bytes_out"] > 0
    assert line["ms"] > 0
    assert len(line["request_id"]) == 16
    assert "zanzibar" not in server.log_text()
    assert "quokka" not in server.log_text()


def test_a_token_is_asked_for_and_never_logged(model: Path, tmp_path: Path) -> None:
    token = "s3cret-token-of-this-test"
    env = {"BATCHCLF_SERVE_TOKEN": token}
    with running(tmp_path / "log", "--model", model, env=env) as server:
        for path in ("/metrics", "/model"):
            assert server.ask("GET", path).status == 401
        for wrong in ("", "Bearer", "Bearer nothing", f"Basic {token}", f"Bearer {token}x"):
            answer = server.invoke({"text": TEXT}, Authorization=wrong)
            assert (answer.status, answer.code) == (401, "unauthorized")
            assert answer.headers["WWW-Authenticate"] == "Bearer"
        assert server.invoke({"text": TEXT}, Authorization=f"Bearer {token}").status == 200
        assert server.ask("GET", "/ping").status == 200
        assert server.ask("GET", "/").status == 200
        assert server.stop() == 0
        assert token not in server.log_text()


def test_it_listens_on_this_machine_alone_unless_told_otherwise(server: Server) -> None:
    ready = next(line for line in server.log_lines() if "url" in line)
    assert ready["url"] == server.url


def test_min_score_withholds_the_label_and_not_the_probabilities(
    model: Path, tmp_path: Path
) -> None:
    with running(tmp_path / "log", "--model", model, "--min-score", "1") as server:
        row = server.invoke([{"text": TEXT}]).json[0]
        assert row["label"] is None
        assert 0 < row["score"] < 1
        assert row["error"] is None


def test_it_starts_with_the_bare_argument_and_settings_from_the_environment(
    model: Path, run_batchclf: "RunBatchclf", server: Server
) -> None:
    # the port of the other server is taken, which tells that both settings were read
    env = {"BATCHCLF_SERVE_MODEL": str(model), "SAGEMAKER_BIND_TO_PORT": str(server.port)}
    result = run_batchclf("serve", env=env)
    assert result.returncode == 64
    assert f"cannot listen on 127.0.0.1 port {server.port}" in result.stderr


def test_it_starts_with_the_bare_argument_where_sagemaker_puts_the_model(
    model: Path, tmp_path: Path
) -> None:
    place = "mount -t tmpfs none /opt && mkdir -p /opt/ml/model && mount --bind"
    script = f'{place} {shlex.quote(str(model))} /opt/ml/model && exec "$@"'
    unshare = shutil.which("unshare") or "/nowhere/unshare"
    apart = [unshare, "--mount", "--map-root-user", "sh", "-ec", script, "sh"]
    if subprocess.run(["sh", "-c", '"$@"', "sh", *apart, "true"], check=False).returncode:
        pytest.skip("no mounts of our own are allowed here")
    port = free_port()
    command = [*apart, servers.script("batchclf"), "serve"]
    env = {"SAGEMAKER_BIND_TO_PORT": str(port)}
    with starting_command(command, tmp_path / "log", port, env) as server:
        wait_until(lambda: is_ready(server), "a healthy /ping", 60)
        assert next(iter(server.invoke({"text": TEXT}).json)) == "sport"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--model", "/nowhere"], "/nowhere"),
        (["--model", "MODEL", "--host", "192.0.2.1"], "cannot listen on 192.0.2.1"),
        (["--model", "MODEL", "--token", "with space"], "token"),
        (["--model", "MODEL", "--text-column", "a", "--text-column", "a"], "named twice"),
        (["--model", "MODEL", "--max-length", "9999"], "9999"),
        ([], "Missing option '--model'"),
    ],
)
def test_a_wrong_setting_ends_it_with_64_and_the_reason(
    run_batchclf: "RunBatchclf", model: Path, options: list[str], reason: str
) -> None:
    given = [str(model) if option == "MODEL" else option for option in options]
    result = run_batchclf("serve", "--port", "0", *given)
    assert result.returncode == 64, result.stderr
    assert reason in result.stderr
