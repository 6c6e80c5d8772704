# SPDX-License-Identifier: Apache-2.0
# shellcheck shell=bash
# What the launch scripts share: words, commands that can be shown instead of run, restarts.
# To be sourced after `set -euo pipefail`.

# The exit code of `train` for "saved, start me again" (docs/resuming.md); anything else that is
# not 0 is a mistake or a defect, which a restart would only repeat.
readonly RESTART_CODE=75
DRY_RUN=${DRY_RUN:-0}
SCRIPT=$(realpath "${BASH_SOURCE[1]}")
REPOSITORY=$(realpath "$(dirname "${BASH_SOURCE[0]}")/..")
readonly SCRIPT REPOSITORY
export REPOSITORY

say() { printf '%s\n' "$*" >&2; }

die() {
  say "error: $*"
  exit 2
}

# The comment at the head of the script.
usage() {
  sed -n '3,/^set -euo/{/^set/d;/^# shellcheck/d;s/^# \{0,1\}//;p}' "$SCRIPT"
}

# The command as one could type it.
quoted() {
  local word text=""
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]] || word=${word@Q}
    text+="$word "
  done
  printf '%s' "${text% }"
}

# Print the command, and run it unless this is a dry run.
run() {
  say "+ $(quoted "$@")"
  [[ $DRY_RUN == 1 ]] || "$@"
}

need() {
  local program
  for program in "$@"; do
    command -v "$program" >/dev/null || die "$program is not on the PATH; $0 needs it"
  done
}

# The value of an option: fails in words where it is missing.
value_of() {
  [[ $# -ge 2 && -n $2 && $2 != --* ]] || die "$1 needs a value"
  printf '%s' "$2"
}

whole_number() {
  [[ $2 =~ ^[0-9]+$ ]] || die "$1 must be a whole number, not '$2'"
}

# `restarting N COMMAND...`: run it again, at most N times, as long as it exits with RESTART_CODE.
restarting() {
  local most=$1 again=0 code
  shift
  while :; do
    code=0
    "$@" || code=$?
    [[ $code == "$RESTART_CODE" ]] || return "$code"
    if [[ $again -ge $most ]]; then
      say "interrupted, and restarted $again times already: giving up. The same command goes on."
      return "$code"
    fi
    again=$((again + 1))
    say "interrupted: restart $again of at most $most"
  done
}
