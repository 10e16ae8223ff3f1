import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import click

from batchclf.cli import options
from batchclf.config import ModelSettings, ReadSettings
from batchclf.errors import ConfigError
from batchclf.log import LogFormat, configure
from batchclf.serve.settings import MIB, Limits, ServeSettings

# https://docs.aws.amazon.com/sagemaker/latest/dg/your-algorithms-inference-code.html
_CONTAINER_MODEL = "/opt/ml/model"
_CONTAINER_PORT = 8080


def _limits(
    max_wait_ms: float,
    max_queue_rows: int,
    max_body_mib: int,
    max_rows: int,
    max_connections: int,
    client_timeout: float,
) -> Limits:
    return Limits(
        max_wait_ms / 1000,
        max_queue_rows,
        max_body_mib * MIB,
        max_rows,
        max_connections,
        client_timeout,
    )


_limit_options = options.group(
    "limits",
    _limits,
    click.option(
        "--max-wait-ms",
        type=click.FloatRange(min=0),
        default=Limits.max_wait_s * 1000,
        show_default=True,
        metavar="MS",
        help="How long a request may wait for others to share its batch, where that saves as much.",
    ),
    click.option(
        "--max-queue-rows",
        type=click.IntRange(min=1),
        default=Limits.max_queue_rows,
        show_default=True,
        metavar="N",
        help="Rows that may wait for the model; more are refused with 429.",
    ),
    click.option(
        "--max-body-mib",
        type=click.IntRange(min=1),
        default=Limits.max_body_bytes // MIB,
        show_default=True,
        metavar="MIB",
        help="Largest body of a request; larger ones are refused with 413.",
    ),
    click.option(
        "--max-rows",
        type=click.IntRange(min=1),
        default=Limits.max_rows,
        show_default=True,
        metavar="N",
        help="Most rows of a request; more are refused with 413.",
    ),
    click.option(
        "--max-connections",
        type=click.IntRange(min=1),
        default=Limits.max_connections,
        show_default=True,
        metavar="N",
        help="Open connections; one more is refused with 503.",
    ),
    click.option(
        "--client-timeout",
        type=click.FloatRange(min=0, min_open=True),
        default=Limits.client_timeout_s,
        show_default=True,
        metavar="S",
        help="Seconds that a client may take for headers, body or reading an answer.",
    ),
)


@click.command(short_help="Answer over HTTP, with a page to try the model.")
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    metavar="ADDRESS",
    help="Where to listen; 0.0.0.0 for every network.",
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    metavar="PORT",
    help="0 takes a free one. [default: SAGEMAKER_BIND_TO_PORT, else 8080]",
)
@options.model_options
@options.text_column_option
@options.delimiter_option
@options.min_score_option
@_limit_options
@click.option(
    "--token",
    metavar="TOKEN",
    help="Ask for it as `Authorization: Bearer TOKEN`. Others see options: better set "
    "BATCHCLF_SERVE_TOKEN.",
)
@options.log_options
@options.endpoint_option
def serve(
    host: str,
    port: int | None,
    model: ModelSettings,
    text_columns: tuple[str, ...],
    delimiter: str,
    min_score: float,
    limits: Limits,
    token: str | None,
    log_format: LogFormat,
    endpoint_url: str | None,
) -> int:
    """Answer over HTTP: SageMaker's container contract, and a page to try the model.

    \b
    batchclf serve --model model
    curl -H 'Content-Type: application/json' -d '{"text": "..."}' \\
        http://127.0.0.1:8080/invocations

    Bodies are JSON, JSON lines, CSV or Parquet; so are answers, by Accept. SIGTERM and SIGINT
    finish what was accepted and exit 0.
    """
    configure(log_format)
    settings = ServeSettings(
        model,
        host,
        _container_port(os.environ) if port is None else port,
        ReadSettings(text_columns, delimiter=options.unescape_delimiter(delimiter)),
        _for_transform(limits, os.environ),
        min_score,
        token,
        endpoint_url,
    )
    try:
        import starlette  # noqa: F401 - whether the extra is installed
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"`serve` needs {error.name}; install it: pip install 'batchclf[serve]'"
        ) from error

    from batchclf.serve.server import serve as run

    return run(settings)


for _option in serve.params:
    if isinstance(_option, click.Option) and _option.name == "model":
        _option.help = f"{_option.help} [default: {_CONTAINER_MODEL}, where it is]"
        if Path(_CONTAINER_MODEL).is_dir():
            _option.default = _CONTAINER_MODEL


def _container_port(environment: Mapping[str, str]) -> int:
    """The port that SageMaker asks for, where it does."""
    value = environment.get("SAGEMAKER_BIND_TO_PORT") or str(_CONTAINER_PORT)
    if not value.isdecimal():
        raise ConfigError(f"SAGEMAKER_BIND_TO_PORT={value!r} is not a port; set --port")
    return int(value)


def _for_transform(limits: Limits, environment: Mapping[str, str]) -> Limits:
    """Room for the bodies that a Batch Transform job says it will send."""
    value = environment.get("SAGEMAKER_MAX_PAYLOAD_IN_MB", "")
    most = int(value) * MIB if value.isdecimal() else 0
    return replace(limits, max_body_bytes=max(limits.max_body_bytes, most))
