#!/bin/bash
# User data of an EC2 instance with Amazon Linux 2023: `batchclf serve` in its container, kept
# running by systemd. Set the four lines below; README.md says what the instance's role must allow.
set -euo pipefail

IMAGE=ACCOUNT.dkr.ecr.REGION.amazonaws.com/batchclf:0.1.0
MODEL=s3://BUCKET/models/bbc         # a folder with the model directory
PUBLISH=127.0.0.1:8080               # 0.0.0.0:8080 for every network: then set a token, too
TOKEN_PARAMETER=                     # name of a SecureString in Parameter Store; empty: no token

dnf install --assumeyes docker
systemctl enable --now docker

# No secrets here: user data can be read by everyone on the instance.
mkdir --parents /opt/batchclf
aws s3 sync --delete --only-show-errors "$MODEL" /opt/batchclf/model
chmod --recursive a+rX /opt/batchclf/model

REGISTRY=${IMAGE%%/*}
if [[ $REGISTRY == *.dkr.ecr.*.amazonaws.com ]]; then
    REGION=$(cut --delimiter . --fields 4 <<<"$REGISTRY")
    aws ecr get-login-password --region "$REGION" \
        | docker login --username AWS --password-stdin "$REGISTRY"
fi
docker pull "$IMAGE"

install --mode 600 /dev/null /etc/batchclf-serve.env
{
    echo "IMAGE=$IMAGE"
    echo "PUBLISH=$PUBLISH"
    if [[ -n $TOKEN_PARAMETER ]]; then
        TOKEN=$(aws ssm get-parameter --name "$TOKEN_PARAMETER" --with-decryption \
            --query Parameter.Value --output text)
        echo "BATCHCLF_SERVE_TOKEN=$TOKEN"
    fi
} >/etc/batchclf-serve.env

cat >/etc/systemd/system/batchclf-serve.service <<'UNIT'
[Unit]
Description=batchclf serve: label news articles over HTTP
Wants=network-online.target
After=network-online.target docker.service
Requires=docker.service

[Service]
EnvironmentFile=/etc/batchclf-serve.env
ExecStartPre=-/usr/bin/docker rm --force batchclf-serve
ExecStart=/usr/bin/docker run --name batchclf-serve --rm \
    --read-only --tmpfs /tmp --cap-drop ALL --security-opt no-new-privileges \
    --pids-limit 512 --ulimit nofile=20000:20000 \
    --env-file /etc/batchclf-serve.env \
    --volume /opt/batchclf/model:/opt/ml/model:ro \
    --publish ${PUBLISH}:8080 \
    ${IMAGE} serve --log-format json
# `serve` finishes what it accepted within 20 s of SIGTERM.
ExecStop=/usr/bin/docker stop --time 30 batchclf-serve
TimeoutStopSec=45
TimeoutStartSec=300
Restart=always
RestartSec=5

[Install]
WantedBy=multi-user.target
UNIT

systemctl daemon-reload
systemctl enable --now batchclf-serve.service
