#!/usr/bin/env bash
# Trains on one GPU of this machine. --help lists subcommands and variables.
set -euo pipefail

# Variables; the environment overrides them.
GPU=${GPU:-0}                                 # Index or UUID of the GPU (nvidia-smi -L).
VENV=${VENV:-}                                # Default: .venv of the repository.
PYTHON=${PYTHON:-python3}                     # Python >= 3.11 that creates VENV.
JAX_EXTRA=${JAX_EXTRA:-cuda12}                # CUDA version to install: cuda12 or cuda13.
CONFIG=${CONFIG:-configs/toybox_dpo.py}       # Relative to the root of the repository.
WORKDIR=${WORKDIR:-}                          # Run folder; default: that of main.

usage() {
  cat <<'EOF'
Usage: [VARIABLE=value ...] launch/single_gpu.sh [--dry-run] SUBCOMMAND [flags for main]

  install   creates the virtual environment VENV with this package, JAX and CUDA
  run       trains in the foreground; if repeated, training resumes

  --dry-run prints the commands, and runs none
  --help    prints this

Flags for main (run), such as --config.beta=500, are added to
    python -m focusdpo_jax.main --config=CONFIG --workdir=WORKDIR

Variables (default):
  GPU (0)                          index or UUID of the GPU, as listed by nvidia-smi -L
  VENV (.venv of the repository)   virtual environment
  PYTHON (python3)                 Python >= 3.11 that creates VENV
  JAX_EXTRA (cuda12)               cuda12, or cuda13 with a recent driver
  CONFIG (configs/toybox_dpo.py)   configuration file in the repository
  WORKDIR (runs/<config name>)     folder of the run

Example:
  launch/single_gpu.sh install && WORKDIR=runs/dpo launch/single_gpu.sh run --config.steps=200
EOF
}

# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/common.sh"

install() {
  if ! ((dry_run)) &&
    ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    fail "PYTHON = $PYTHON: give a Python >= 3.11, such as PYTHON=python3.12"
  fi
  execute "$PYTHON" -m venv "$VENV"
  execute "$VENV/bin/python" -m pip install -e "$root" "jax[$JAX_EXTRA]"
}

run() {
  if ! ((dry_run)); then
    require_venv
  fi
  # With cuda among the platforms, JAX fails if it finds no GPU, instead of using the CPU.
  if ((dry_run)); then
    echo "cd $(quote "$root")"
    echo "export CUDA_VISIBLE_DEVICES=$(quote "$GPU") JAX_PLATFORMS=cuda,cpu"
    echo "export PATH=$(quote "$VENV/bin"):\"\$PATH\""
    echo "exec $(quote "${job[@]}")"
  else
    cd "$root"
    export CUDA_VISIBLE_DEVICES="$GPU" JAX_PLATFORMS=cuda,cpu PATH="$VENV/bin:$PATH"
    exec "${job[@]}" # Replaces this shell, so that signals reach it.
  fi
}

read_words "$@"
VENV=${VENV:-$root/.venv}
case $VENV in
  /*) ;;
  *) VENV=$PWD/$VENV ;;
esac
case $subcommand in
  install | run) ;;
  '') fail "no subcommand: give install or run (--help)" ;;
  *) fail "$subcommand is no subcommand: give install or run (--help)" ;;
esac
if ((${#arguments[@]})) && [[ $subcommand != run ]]; then
  fail "$subcommand takes no flags: ${arguments[*]}"
fi
if [[ $GPU == *,* ]]; then
  fail "GPU = $GPU: give one GPU; several are for launch/slurm.sh"
fi
case $JAX_EXTRA in
  cuda12 | cuda13) ;;
  *) fail "JAX_EXTRA = $JAX_EXTRA: give cuda12 or cuda13" ;;
esac
require_config
job=(python -m focusdpo_jax.main --config="$CONFIG")
if [[ -n $WORKDIR ]]; then
  if [[ $WORKDIR != /* && $WORKDIR != *://* ]]; then
    WORKDIR=$PWD/$WORKDIR
  fi
  job+=(--workdir="$WORKDIR")
fi
job+=(${arguments[@]+"${arguments[@]}"})
"$subcommand"
