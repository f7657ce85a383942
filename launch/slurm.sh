#!/usr/bin/env bash
# Trains on GPUs of a Slurm cluster, one process per GPU. --help lists the variables.
set -euo pipefail

# Variables; the environment overrides them.
JOB_NAME=${JOB_NAME:-focusdpo}
NODES=${NODES:-1}
GPUS_PER_NODE=${GPUS_PER_NODE:-8}
CPUS_PER_GPU=${CPUS_PER_GPU:-8}
TIME=${TIME:-24:00:00}                        # Limit of one start; then the job is queued again.
PARTITION=${PARTITION:-}                      # Default: that of the cluster.
ACCOUNT=${ACCOUNT:-}                          # Default: that of the user.
VENV=${VENV:-}                                # Default: .venv of the repository.
CONFIG=${CONFIG:-configs/toybox_dpo.py}       # Relative to the root of the repository.
WORKDIR=${WORKDIR:-}                          # Run folder; required.

usage() {
  cat <<'EOF'
Usage: [VARIABLE=value ...] launch/slurm.sh [--dry-run] [flags for main]

Submits a training job to Slurm: one process per GPU, on any number of nodes. The job returns to
the queue when it is preempted, when a node fails and at its time limit, and resumes when it
starts again. If training itself fails, the job ends. All nodes must see this checkout, VENV and
WORKDIR under the same paths.

  --dry-run prints the command and the batch script, and submits nothing
  --help    prints this

Flags for main, such as --config.beta=500, are added to
    python -m focusdpo_jax.main --config=CONFIG --workdir=WORKDIR

Variables (default):
  JOB_NAME (focusdpo)              name of the job; its output goes to JOB_NAME-<job id>.log
  NODES (1)                        number of nodes
  GPUS_PER_NODE (8)                number of GPUs of a node; the job takes whole nodes
  CPUS_PER_GPU (8)                 CPU cores of each process
  TIME (24:00:00)                  time limit of one start; then the job is queued again
  PARTITION, ACCOUNT               as for sbatch
  VENV (.venv of the repository)   virtual environment; launch/single_gpu.sh install makes it
  CONFIG (configs/toybox_dpo.py)   configuration file in the repository
  WORKDIR                          folder of the run, shared by the nodes; required
Slurm's own SBATCH_... variables set everything else, such as SBATCH_QOS.

Example:
  NODES=2 PARTITION=gpu WORKDIR=/shared/runs/dpo launch/slurm.sh
EOF
}

# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/common.sh"

# Signals of the batch script:
# - USR1 arrives before the time limit, and at a preemption if the cluster sends it. Only then does
#   the script itself queue the job again.
# - SIGTERM is a scancel, or a preemption after which Slurm queues the job again (--requeue). The
#   script waits for Slurm, so that scancel ends the job for good.
# The script sends SIGTERM to the processes by scancel, since srun would kill them if it received
# the signal itself. --kill-on-bad-exit=0 gives them time to save.
batch_script() {
  cat <<EOF
#!/bin/bash
set -uo pipefail
cd $(quote "$root") || exit 1
export PATH=$(quote "$VENV/bin"):"\$PATH" JAX_PLATFORMS=cuda,cpu
echo "start \$((\${SLURM_RESTART_COUNT:-0} + 1)) on \$SLURM_JOB_NODELIST"
again=''
terminated=''
trap 'again=yes; signalled=yes; scancel --signal=TERM "\$SLURM_JOB_ID"' USR1
trap 'terminated=yes; signalled=yes' TERM
srun --kill-on-bad-exit=0 --wait=600 --cpus-per-task=$CPUS_PER_GPU \\
  $(quote "${job[@]}") &
step=\$!
# A signal interrupts wait; the job step goes on.
signalled=yes
while [ -n "\$signalled" ]; do
  signalled=''
  status=0
  wait "\$step" || status=\$?
done
if [ "\$status" -ne 0 ] && [ -n "\$again" ]; then
  echo "interrupted with status \$status; queued again"
  scontrol requeue "\$SLURM_JOB_ID"
elif [ "\$status" -ne 0 ] && [ -n "\$terminated" ]; then
  echo "interrupted with status \$status; Slurm ends the job or queues it again"
  sleep 600
fi
exit "\$status"
EOF
}

for argument in "$@"; do
  case $argument in
    --dry-run) dry_run=1 ;;
    --help | -h)
      usage
      exit 0
      ;;
    --*) arguments+=("$argument") ;;
    *) fail "unexpected argument $argument: flags for main are written --name=value (--help)" ;;
  esac
done

VENV=${VENV:-$root/.venv}
if [[ -z $WORKDIR ]]; then
  fail "WORKDIR is not set: give a folder that all nodes see, such as WORKDIR=/shared/runs/dpo"
fi
if [[ $WORKDIR != /* && $WORKDIR != *://* ]]; then
  WORKDIR=$PWD/$WORKDIR
fi
require_config
for name in NODES GPUS_PER_NODE CPUS_PER_GPU; do
  if ! [[ ${!name} =~ ^[1-9][0-9]*$ ]]; then
    fail "$name = ${!name}: give a whole number >= 1"
  fi
done
if ! ((dry_run)); then
  require_venv
  if ! command -v sbatch >/dev/null; then
    fail "sbatch is not installed: submit from a login node of a Slurm cluster"
  fi
fi

job=(python -m focusdpo_jax.main --config="$CONFIG" --workdir="$WORKDIR"
  ${arguments[@]+"${arguments[@]}"})
# JAX expects that every process sees all GPUs of its node, and uses the one of its local index:
# so GPUs are requested per node, not per task.
submit=(sbatch --job-name="$JOB_NAME" --nodes="$NODES" --ntasks-per-node="$GPUS_PER_NODE"
  --gres=gpu:"$GPUS_PER_NODE" --cpus-per-task="$CPUS_PER_GPU" --time="$TIME"
  --requeue --signal=B:USR1@180 --open-mode=append --output="$JOB_NAME-%j.log")
if [[ -n $PARTITION ]]; then
  submit+=(--partition="$PARTITION")
fi
if [[ -n $ACCOUNT ]]; then
  submit+=(--account="$ACCOUNT")
fi
if ((dry_run)); then
  echo "$(quote "${submit[@]}") <<'END_OF_SCRIPT'"
  batch_script
  echo END_OF_SCRIPT
else
  batch_script | "${submit[@]}"
fi
