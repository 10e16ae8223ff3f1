#!/usr/bin/env bash
# The path of somebody who is new here, with the time of each step: clone, demo, train on a CSV of
# their own, plan and label another, prove it, look at the report. Needs a package index for the
# demo.
#
#   tests/newcomer.sh [REPOSITORY [FOLDER]]      a git address, and where to (default: a new one)
set -euo pipefail

repository=${1:-$(cd "$(dirname "$0")/.." && pwd)}
folder=${2:-$(mktemp -d)}/batchclf

step() {
    local began=$SECONDS
    printf '\n== %s\n' "$*"
    "$@"
    printf -- '-- %s s\n' "$((SECONDS - began))"
}

step git clone --quiet "$repository" "$folder"
cd "$folder"
step make demo
# What `make demo` made, as README.md has it.
source .venv/bin/activate

# Files of their own: what a spreadsheet exports.
python - <<'END'
import pyarrow as pa
import pyarrow.csv as csv
import pyarrow.parquet as pq

one = csv.read_csv("data/sample/news-2.csv", parse_options=csv.ParseOptions(newlines_in_values=True))
two = pq.read_table("data/sample/news-1.parquet")
csv.write_csv(two, "train.csv")
csv.write_csv(one.slice(0, 15), "val.csv")
csv.write_csv(one.slice(15).drop_columns("category"), "mine.csv")
END

step batchclf train --train train.csv --val val.csv --base-model data/models/bbc-small \
    --output my-model --epochs 2
step batchclf plan mine.csv --model my-model
step batchclf classify mine.csv --model my-model --output labelled --keep-columns title
step batchclf verify labelled mine.csv
step batchclf report labelled
printf '\nLook at %s\n' "$folder/my-model/report/report.html" "$folder/batchclf-report.html"
