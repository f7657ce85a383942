#!/usr/bin/env bash
# Trains on a Cloud TPU slice, allocated by a queued resource. --help lists the variables.
set -euo pipefail

# Variables; the environment overrides them.
TPU_NAME=${TPU_NAME:-focusdpo}                # Name of the slice and of its queued resource.
ZONE=${ZONE:-}                                # Required, such as us-west4-a.
PROJECT=${PROJECT:-}                          # Default: that of gcloud.
ACCELERATOR=${ACCELERATOR:-v5litepod-16}      # Type and size of the slice.
RUNTIME=${RUNTIME:-}                          # Default: by ACCELERATOR.
PROVISIONING=${PROVISIONING:-spot}            # spot, on-demand or reserved.
CREATE_FLAGS=${CREATE_FLAGS:-}                # More flags for create, separated by blanks.
CONFIG=${CONFIG:-configs/toybox_dpo.py}       # Relative to the root of the repository.
WORKDIR=${WORKDIR:-}                          # Run folder, gs://...; for run and watch.
WORKER=${WORKER:-0}                           # Host whose log is shown; all: every host.
POLL_SECONDS=${POLL_SECONDS:-60}              # Seconds between two checks by watch.
MAX_FAILURES=${MAX_FAILURES:-3}               # Failures in a row that watch tolerates.
DELETE_WHEN_DONE=${DELETE_WHEN_DONE:-0}       # 1: watch deletes the slice after the run.

usage() {
  cat <<'EOF'
Usage: [VARIABLE=value ...] launch/tpu_pod.sh [--dry-run] SUBCOMMAND [flags for main]

Trains on a Cloud TPU slice of any number of hosts. Needs gcloud, signed in.

  create    requests the slice; the request waits in a queue
  install   copies the last commit of this checkout to all hosts and installs it there
  run       starts training on all hosts and returns; if repeated, training resumes
  watch     does all of the above as needed until the run is finished; restarts it after a
            preemption (on a new slice) or a failure
  status    prints the state of the request, and of the run on each host
  logs      prints the output of host WORKER as it is written
  stop      ends the run: SIGTERM, and SIGKILL after a minute (end a watch first, or it
            restarts the run)
  delete    deletes the slice and its request; until then it costs money

  --dry-run prints the commands, and runs none
  --help    prints this

Flags for main (run and watch), such as --config.beta=500, are added to
    python -m focusdpo_jax.main --config=CONFIG --workdir=WORKDIR

Variables (default):
  TPU_NAME (focusdpo)              name of the slice
  ZONE                             required, such as us-west4-a
  PROJECT (gcloud's)               Google Cloud project
  ACCELERATOR (v5litepod-16)       such as v5litepod-16, v5p-16, v6e-8
  RUNTIME (by ACCELERATOR)         software of the hosts
  PROVISIONING (spot)              spot, on-demand or reserved
  CREATE_FLAGS                     more flags for create, such as --service-account=...
  CONFIG (configs/toybox_dpo.py)   configuration file in the repository
  WORKDIR                          folder of the run, gs://...; required for run and watch
  WORKER (0)                       host whose log is shown
  POLL_SECONDS (60)                seconds between two checks by watch
  MAX_FAILURES (3)                 failures in a row that watch tolerates; at the next it gives up
  DELETE_WHEN_DONE (0)             1: watch deletes the slice when the run is finished

Example:
  ZONE=us-west4-a WORKDIR=gs://my-bucket/runs/dpo launch/tpu_pod.sh watch
EOF
}

# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/common.sh"

say() {
  echo "$(date '+%F %T') $*"
}

# Scripts that run on the hosts. Files are in the home folder: focusdpo_jax/ is the code,
# focusdpo_jax.{log,pid,status} are the output, process and exit status of the run.

remote_running() {
  cat <<'EOF'
running() {
  pid=$(cat ~/focusdpo_jax.pid 2>/dev/null) && grep -qs focusdpo_jax "/proc/$pid/cmdline"
}
EOF
}

remote_install() {
  remote_running
  cat <<'EOF'
if running; then echo "error: a run is going on; stop it first" >&2; exit 1; fi
set -e
rm -rf ~/focusdpo_jax ~/focusdpo_jax.pid ~/focusdpo_jax.status
mkdir ~/focusdpo_jax
cd ~/focusdpo_jax
tar -xzf ~/focusdpo_jax.tar.gz
# The Python of the images is too old for the package; uv installs a newer one.
PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --user --quiet --upgrade uv
python3 -m uv venv --quiet --python 3.12 .venv
python3 -m uv pip install --quiet --python .venv/bin/python -e . "jax[tpu]"
touch .venv/installed
EOF
}

remote_run() {
  remote_running
  cat <<EOF
if running; then echo "already running"; exit 0; fi
cat > ~/focusdpo_jax.job <<'END_OF_JOB'
cd ~/focusdpo_jax || exit 1
export PATH="\$HOME/focusdpo_jax/.venv/bin:\$PATH" JAX_PLATFORMS=tpu,cpu
# Ignores the SIGTERM that training also receives, to record its exit status.
trap : TERM
$(quote "${job[@]}")
echo "\$?" > ~/focusdpo_jax.status
END_OF_JOB
rm -f ~/focusdpo_jax.status
setsid nohup bash ~/focusdpo_jax.job >> ~/focusdpo_jax.log 2>&1 < /dev/null &
echo "\$!" > ~/focusdpo_jax.pid
EOF
}

# State of a host. If a job line is given, files of an earlier run with another line are ignored.
remote_status() {
  remote_running
  if (($#)); then
    echo "other() { ! grep -qxF -- $(quote "$1") ~/focusdpo_jax.job; }"
  else
    echo 'other() { false; }'
  fi
  cat <<'EOF'
if running; then state=running
elif [ -e ~/focusdpo_jax/.venv/installed ] && [ -e ~/focusdpo_jax.pid ] && other; then
  state=not-started
elif [ -e ~/focusdpo_jax.status ]; then state="exited $(cat ~/focusdpo_jax.status)"
elif [ -e ~/focusdpo_jax.pid ]; then state="exited 137"
elif [ -e ~/focusdpo_jax/.venv/installed ]; then state=not-started
else state=not-installed
fi
echo "$(hostname) focusdpo_jax $state"
EOF
}

remote_stop() {
  remote_running
  cat <<'EOF'
if running; then
  kill -TERM -- "-$pid"
  for _ in $(seq 60); do running || exit 0; sleep 1; done
  kill -KILL -- "-$pid"
fi
exit 0
EOF
}

on_hosts() { # hosts, script
  execute gcloud compute tpus tpu-vm ssh "$TPU_NAME" "${location[@]}" --quiet \
    --worker="$1" --command="$2"
}

create() {
  local flags=() more=()
  case $PROVISIONING in
    spot) flags=(--spot) ;;
    reserved) flags=(--reserved) ;;
  esac
  read -r -a more <<<"$CREATE_FLAGS"
  execute gcloud compute tpus queued-resources create "$TPU_NAME" --node-id="$TPU_NAME" \
    "${location[@]}" --accelerator-type="$ACCELERATOR" --runtime-version="$RUNTIME" \
    ${flags[@]+"${flags[@]}"} ${more[@]+"${more[@]}"}
}

install() {
  local folder=${XDG_CACHE_HOME:-$HOME/.cache}/focusdpo_jax/$TPU_NAME
  if ! ((dry_run)) && ! git -C "$root" diff --quiet HEAD --; then
    say "note: changes that are not committed are not installed"
  fi
  execute mkdir -p "$folder" || return
  execute git -C "$root" archive --format=tar.gz --output="$folder/focusdpo_jax.tar.gz" HEAD ||
    return
  execute gcloud compute tpus tpu-vm scp "$folder/focusdpo_jax.tar.gz" "$TPU_NAME:" \
    "${location[@]}" --quiet --worker=all || return
  on_hosts all "$(remote_install)"
}

run() {
  on_hosts all "$(remote_run)"
}

stop() {
  on_hosts all "$(remote_stop)"
}

delete() {
  execute gcloud compute tpus queued-resources delete "$TPU_NAME" "${location[@]}" --force --quiet
}

describe() {
  execute gcloud compute tpus queued-resources describe "$TPU_NAME" "${location[@]}" \
    --format='value(state.state)'
}

describe_slice() {
  execute gcloud compute tpus tpu-vm describe "$TPU_NAME" "${location[@]}" --format='value(state)'
}

# State of the request; that of the slice, if it exists; or MISSING or UNKNOWN.
slice_state() {
  local state
  if ! state=$(describe 2>&1); then
    case $state in
      *NOT_FOUND*) echo MISSING ;;
      *)
        echo "$state" >&2
        echo UNKNOWN
        ;;
    esac
    return
  fi
  state=$(tail -n 1 <<<"$state")
  # The slice can be shown as preempted before its request is.
  if [[ $state == ACTIVE ]]; then
    case $(describe_slice 2>/dev/null || true) in
      *PREEMPTED) state=PREEMPTED ;;
      *TERMINATED) state=TERMINATED ;;
    esac
  fi
  echo "$state"
}

status() {
  if ((dry_run)); then
    describe
    describe_slice
    on_hosts all "$(remote_status)"
    return
  fi
  local state
  state=$(slice_state)
  echo "$TPU_NAME $state"
  if [[ $state == ACTIVE ]]; then
    on_hosts all "$(remote_status)"
  fi
}

# Counts a failure; exits after too many.
count_failure() {
  failures=$((failures + 1))
  if ((failures > MAX_FAILURES)); then
    say "giving up: $1, $failures times in a row (MAX_FAILURES=$MAX_FAILURES);" \
      "the slice is still there: see logs, then watch again or delete" >&2
    exit 1
  fi
  say "$1 ($failures of at most $MAX_FAILURES failures in a row)"
}

# One check of the hosts of an active slice: installs, starts, or ends the watch.
tend() {
  local states
  states=$(on_hosts all "$(remote_status "$(quote "${job[@]}")")") || states=
  states=$(sed -n 's/^.* focusdpo_jax //p' <<<"$states")
  if [[ -z $states ]]; then
    say "the hosts cannot be reached; trying again"
    return
  fi
  case $'\n'$states$'\n' in
    *$'\n'not-installed$'\n'*)
      say "installing"
      if ! install; then
        count_failure "installing failed"
      fi
      return
      ;;
    *$'\n'"exited 2"$'\n'*)
      say "the run was refused: its flags or configuration are wrong, see logs" >&2
      exit 2
      ;;
    *$'\n'exited\ [1-9]*)
      if [[ $states == *running* ]]; then
        say "a host failed; stopping the others"
        stop || say "stopping failed"
      fi
      count_failure "the run ended with a failure; starting it again"
      ;;
    *$'\n'not-started$'\n'*) say "starting the run" ;;
    *$'\n'running$'\n'*)
      # The run has lasted from one check to the next.
      if ((was_running)); then
        failures=0
      fi
      was_running=1
      return
      ;;
    *)
      say "the run is finished"
      if [[ $DELETE_WHEN_DONE == 1 ]]; then
        say "deleting the slice"
        delete
      else
        say "the slice is still there and costs money; delete it with: $0 delete"
      fi
      exit 0
      ;;
  esac
  was_running=0
  run || say "starting failed; trying again"
}

dry_watch() {
  echo "# Every $POLL_SECONDS seconds: state of the request and of the slice"
  describe
  describe_slice
  echo "# At first, and after a preemption when the old request is deleted:"
  create
  echo "# If the request was preempted, suspended or failed:"
  delete
  echo "# If the slice exists: state of the run"
  on_hosts all "$(remote_status "$(quote "${job[@]}")")"
  echo "# If the package is not installed:"
  install
  echo "# If the run has not started, or has ended with a failure:"
  run
  echo "# If some hosts run while others have failed:"
  stop
  if [[ $DELETE_WHEN_DONE == 1 ]]; then
    echo "# When the run is finished:"
    delete
  fi
}

watch() {
  local state before='' wanted=1
  failures=0
  was_running=0
  while true; do
    state=$(slice_state)
    if [[ $state != "$before" ]]; then
      say "$TPU_NAME is $state"
    fi
    before=$state
    case $state in
      MISSING)
        # The request was deleted by the user: do not make a new one.
        if ! ((wanted)); then
          say "$TPU_NAME has been deleted; the watch ends" >&2
          exit 1
        fi
        say "requesting $ACCELERATOR"
        if create; then
          wanted=0
        else
          count_failure "the request was refused; repeating it"
        fi
        ;;
      ACTIVE)
        wanted=0
        tend
        ;;
      SUSPENDED | PREEMPTED | TERMINATED | FAILED)
        if [[ $state == FAILED ]]; then
          count_failure "the request failed; repeating it"
        else
          say "requesting another slice"
        fi
        was_running=0
        if delete; then
          wanted=1
          continue
        fi
        say "deleting failed; trying again"
        ;;
      UNKNOWN) ;;
      *) wanted=0 ;;
    esac
    sleep "$POLL_SECONDS"
  done
}

read_words "$@"
case $subcommand in
  create | install | run | watch | status | logs | stop | delete) ;;
  '') fail "no subcommand: give create, install, run, watch, status, logs, stop or delete" \
    "(--help)" ;;
  *) fail "$subcommand is no subcommand: give create, install, run, watch, status, logs, stop or" \
    "delete (--help)" ;;
esac
if ((${#arguments[@]})) && [[ $subcommand != run && $subcommand != watch ]]; then
  fail "$subcommand takes no flags: ${arguments[*]}"
fi
if [[ -z $ZONE ]]; then
  fail "ZONE is not set: give the zone of the slice, such as ZONE=us-west4-a"
fi
if ! [[ $TPU_NAME =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]]; then
  fail "TPU_NAME = $TPU_NAME: give lower-case letters, digits and hyphens, a letter first"
fi
case $PROVISIONING in
  spot | on-demand | reserved) ;;
  *) fail "PROVISIONING = $PROVISIONING: give spot, on-demand or reserved" ;;
esac
if ! [[ $POLL_SECONDS =~ ^[0-9]+$ ]]; then
  fail "POLL_SECONDS = $POLL_SECONDS: give a whole number of seconds"
fi
if ! [[ $MAX_FAILURES =~ ^[0-9]+$ ]]; then
  fail "MAX_FAILURES = $MAX_FAILURES: give a whole number"
fi
if [[ -z $RUNTIME ]]; then
  case $ACCELERATOR in
    v6e-*) RUNTIME=v2-alpha-tpuv6e ;;
    v5p-*) RUNTIME=v2-alpha-tpuv5 ;;
    v5litepod-*) RUNTIME=v2-alpha-tpuv5-lite ;;
    v2-* | v3-* | v4-*) RUNTIME=tpu-ubuntu2204-base ;;
    *) fail "RUNTIME is not set, and there is no default for ACCELERATOR = $ACCELERATOR: give the" \
      "TPU software version, such as RUNTIME=v2-alpha-tpuv6e, or an ACCELERATOR such as v6e-8" ;;
  esac
fi
if [[ $subcommand == run || $subcommand == watch ]]; then
  if [[ $WORKDIR != gs://?* ]]; then
    fail "WORKDIR = ${WORKDIR:-(not set)}: give a folder that all hosts share and that outlives" \
      "them, such as WORKDIR=gs://my-bucket/runs/dpo"
  fi
  require_config
fi
if ! ((dry_run)) && ! command -v gcloud >/dev/null; then
  fail "gcloud is not installed: see https://cloud.google.com/sdk/docs/install"
fi
location=(--zone="$ZONE")
if [[ -n $PROJECT ]]; then
  location+=(--project="$PROJECT")
fi
job=(python -m focusdpo_jax.main --config="$CONFIG" --workdir="$WORKDIR"
  ${arguments[@]+"${arguments[@]}"})

case $subcommand in
  watch) if ((dry_run)); then dry_watch; else watch; fi ;;
  logs) on_hosts "$WORKER" 'tail -n 100 -F ~/focusdpo_jax.log' ;;
  *) "$subcommand" ;;
esac
