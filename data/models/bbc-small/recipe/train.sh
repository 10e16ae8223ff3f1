#!/usr/bin/env bash
# How this model was made. BBC is a folder with train.csv and val.csv (columns text, category): the
# split of https://github.com/haocai1992/GPT2-News-Classifier.
#   BBC=... data/models/bbc-small/recipe/train.sh
# One thread: another number adds up in another order, and gives other weights.
set -euo pipefail
export OMP_NUM_THREADS=1
cd "$(dirname "$0")/.."
batchclf train --train "$BBC/train.csv" --val "$BBC/val.csv" --drop-leaked \
    --base-model recipe/config.json --vocab-size 8000 --max-length 256 --normalise lower+collapse \
    --epochs 25 --average 0.998 --batch-tokens 4096 --learning-rate 0.001 --weight-decay 0.05 \
    --label-smoothing 0.1 --crop-share 0.8 --noise-share 0.3 --seed 0 --precision float32 \
    --weights float16 --output new
rm -rf new/report  # it quotes articles of the corpus
mv new/* .
rmdir new
