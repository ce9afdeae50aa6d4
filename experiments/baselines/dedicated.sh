#!/usr/bin/env bash
# Fifteen dedicated networks, one after the other: dedicated.sh STORE [flags of pmixseg fit].
set -euo pipefail
cd "$(dirname "$0")/../.."
store=$1
shift
for combination in flair t1ce t1 t2 flair+t1ce flair+t1 flair+t2 t1ce+t1 t1ce+t2 t1+t2 \
  flair+t1ce+t1 flair+t1ce+t2 flair+t1+t2 t1ce+t1+t2 flair+t1ce+t1+t2; do
  pmixseg fit -c experiments/brats2018/data.yaml -c experiments/baselines/nnunet-dedicated.yaml \
    --model.combination="$combination" --data.store="$store" --run="runs/dedicated-$combination" "$@"
done
