# Functions shared by the scripts of this folder, which source this file.
# shellcheck shell=bash
# shellcheck disable=SC2034  # The scripts read variables that are set here.

# The root of the repository, also if a script is called through a symbolic link.
root=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.." && pwd)
dry_run=0
subcommand=
arguments=()

fail() {
  echo "error: $*" >&2
  exit 2
}

# Prints words quoted, so that a shell reads them back unchanged.
quote() {
  local word separator=
  for word in "$@"; do
    printf '%s' "$separator"
    case $word in
      *\'*) printf "'%s'" "$(printf '%s' "$word" | sed "s/'/'\\\\''/g")" ;;
      '' | *[!A-Za-z0-9_@%+=:,./-]*) printf "'%s'" "$word" ;;
      *) printf '%s' "$word" ;;
    esac
    separator=' '
  done
}

# Runs a command; in a dry run, prints it.
execute() {
  if ((dry_run)); then
    quote "$@"
    echo
  else
    "$@"
  fi
}

# Sets dry_run, subcommand and arguments from the words of a command line.
read_words() {
  local word
  for word in "$@"; do
    case $word in
      --dry-run) dry_run=1 ;;
      --help | -h)
        usage
        exit 0
        ;;
      *)
        if [[ -z $subcommand ]]; then
          subcommand=$word
        else
          arguments+=("$word")
        fi
        ;;
    esac
  done
}

require_config() {
  if ! [[ -f $root/${CONFIG%%:*} ]]; then
    fail "CONFIG = $CONFIG: there is no such file in the repository; give one such as" \
      "CONFIG=configs/toybox_dpo.py"
  fi
}

require_venv() {
  if ! [[ -x $VENV/bin/python ]]; then
    fail "VENV = $VENV: there is no virtual environment; make it by VENV=$VENV" \
      "launch/single_gpu.sh install"
  fi
}
