#!/usr/bin/env bash
# Makes Toybox's small generators from nothing, stage by stage (docs/toybox.md).
#
#   experiments/toybox_base.sh [SECONDS] [--config.FIELD=VALUE ...]
#
# With SECONDS it saves and stops after so long. Run the same line again to go on, on any machine that has
# the folder runs/. Finished stages are skipped. The learning curve of a stage is in its run folder:
# metrics.jsonl, and for the generators validation.jsonl.
set -eu
cd "$(dirname "$0")/.."
limit=0
if [[ ${1:-} =~ ^[0-9]+$ ]]; then
    limit=$1
    shift
fi
for stage in autoencoder image_encoder probe generator confusion; do
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
    # 0 is no limit.
    timeout --preserve-status --signal=TERM $((limit ? left : 0)) \
        python -m focusdpo_jax.main --config=configs/toybox_base.py:$stage --workdir=$workdir "$@" || status=$?
    if ((status == 143)); then
        echo "$stage: stopped after $SECONDS s; run the same line again to go on"
        exit 0
    fi
    if ((status)); then
        exit $status
    fi
done
