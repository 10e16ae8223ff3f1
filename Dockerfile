# batchclf in a container: for AWS Batch, ECS, SageMaker and any other host.
#
#   docker build -t batchclf .                                             for CPUs
#   docker build -t batchclf:cuda --build-arg TORCH_INDEX= .               for NVIDIA GPUs
#   docker run --rm --read-only --tmpfs /tmp -v "$PWD:/data" batchclf \
#       classify /data/news --model /data/model --output /data/labelled
#
# The host of the second needs the NVIDIA driver and container toolkit; CUDA comes with torch.

ARG BASE_IMAGE=python:3.12-slim-bookworm

FROM ${BASE_IMAGE} AS build
# Where torch comes from: by default its builds for CPUs, which are a tenth of the size. Empty: the
# usual index, whose builds for Linux bring CUDA.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# More options for pip, such as `--no-index --find-links /wheels` where there is no network.
ARG PIP_OPTIONS=
WORKDIR /src
COPY .ci/constraints.txt constraints.txt
RUN python3 -m venv /opt/batchclf \
    && /opt/batchclf/bin/pip install --no-cache-dir --disable-pip-version-check \
        --constraint constraints.txt ${PIP_OPTIONS} ${TORCH_INDEX:+--index-url ${TORCH_INDEX}} torch
COPY pyproject.toml README.md LICENSE ./
COPY batchclf batchclf
RUN /opt/batchclf/bin/pip install --no-cache-dir --disable-pip-version-check \
        --constraint constraints.txt ${PIP_OPTIONS} ".[serve]"

FROM ${BASE_IMAGE}
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="batchclf" \
      org.opencontainers.image.description="Label a news archive with a fine-tuned GPT-2 classifier" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
# The kernel drops signals that process 1 has no handler for, and Python has none until our modules
# are imported; tini passes them on.
RUN command -v tini >/dev/null \
    || { apt-get update && apt-get install -y --no-install-recommends tini \
         && rm -rf /var/lib/apt/lists/*; }
RUN useradd --uid 10001 --user-group --create-home batchclf
COPY --from=build /opt/batchclf /opt/batchclf
# `serve` listens for the host; scratch and caches, such as that of models from S3, go to /tmp, the
# one folder that must be writable.
ENV PATH=/opt/batchclf/bin:${PATH} \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    BATCHCLF_SERVE_HOST=0.0.0.0 \
    MPLCONFIGDIR=/tmp/matplotlib \
    XDG_CACHE_HOME=/tmp/cache \
    TMPDIR=/tmp
USER 10001
WORKDIR /home/batchclf
EXPOSE 8080
# Only `serve` can be asked; every other command is healthy as long as it runs.
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s \
    CMD grep -qz '^serve$' /proc/1/cmdline || exit 0; \
        python3 -c "import urllib.request as u; u.urlopen('http://127.0.0.1:8080/ping', timeout=4)"
ENTRYPOINT ["tini", "--", "batchclf"]
CMD ["--help"]
