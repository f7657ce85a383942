#!/usr/bin/env bash
# Trains Toybox's small generators from scratch, stage by stage (docs/toybox.md).
#
#   experiments/toybox_base.sh [SECONDS] [--config.FIELD=VALUE ...]
#
# With SECONDS, saves and stops after that time. Run the same command again to resume, on any
# machine that has the folder runs/. Finished stages are skipped. The learning curve of a stage is
# in its run folder: metrics.jsonl, and for the generators validation.jsonl.
set -eu
cd "$(dirname "$0")/.."
limit=0
if [[ ${1:-} =~ ^[0-9]+$ ]]; then
    limit=$1
    shift
fi
for stage in autoencoder image_encoder probe generator generated_probe confusion; do
    workdir=runs/toybox_base_$stage
    if [[ -e $workdir/model/model.json ]]; then
        echo "$stage: finished"
        continue
    fi
    left=$((limit - SECONDS))
    if ((limit && left <= 0)); then
        exit 0
    fi
    echo "$stage: $workdir"
    status=0
    # For timeout, 0 means no limit.
    timeout --preserve-status --signal=TERM $((limit ? left : 0)) \
        python -m focusdpo_jax.main --config=configs/toybox_base.py:$stage \
        --workdir=$workdir "$@" || status=$?
    if ((status == 143)); then
        echo "$stage: stopped after $SECONDS s; run the same command again to resume"
        exit 0
    fi
    if ((status)); then
        exit $status
    fi
done
