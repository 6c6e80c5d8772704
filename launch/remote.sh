#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# What a host of a pod does when launch/tpu_pod.sh asks it to; it runs on the host, in the copy of
# the repository.
#
#   launch/remote.sh install [EXTRA]       an environment in .venv with the package (EXTRA: tpu)
#   launch/remote.sh start NAME FLAGS...   start train in the background, once; a second start while
#                                          it runs changes nothing
#   launch/remote.sh follow NAME           print its log until it ends; exits with its exit code
#   launch/remote.sh code NAME             print its exit code, or "running"
#   launch/remote.sh stop NAME             ask it to save and to end, and wait for that
#
# A run's files lie in runs/.launch/NAME: pid, log, code (written when it has ended).
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
cd "$REPOSITORY"

action=${1:-} name=${2:-}
[[ $action != -h && $action != --help ]] || { usage; exit 0; }
[[ -n $action ]] || die "say what to do: install, start, follow, code or stop"
folder=runs/.launch/$name

alive() { [[ -f $folder/pid ]] && kill -0 "$(cat "$folder/pid")" 2>/dev/null; }

install() {
  if [[ ! -x .venv/bin/python ]]; then
    local candidate found=""
    for candidate in python3.13 python3.12 python3.11 python3; do
      if "$candidate" -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        found=$candidate
        break
      fi
    done
    if [[ -z $found ]]; then
      run sudo apt-get update -q
      run sudo apt-get install -q -y python3.11 python3.11-venv
      found=python3.11
    fi
    run "$found" -m venv .venv
  fi
  run .venv/bin/python -m pip install -q -e ".[${1:-tpu}]"
}

start() {
  if alive; then
    say "$name is running already"
    return
  fi
  mkdir -p "$folder"
  rm -f "$folder/code"
  # A session of its own: a lost connection does not end it.
  # shellcheck disable=SC2016  # expanded by the inner shell
  setsid nohup bash -c '
    folder=$1; shift
    code=0
    .venv/bin/python -m vlm2vec_jax.train "$@" || code=$?
    echo "$code" > "$folder/code.part" && mv "$folder/code.part" "$folder/code"
  ' launch "$folder" "$@" >>"$folder/log" 2>&1 </dev/null &
  echo "$!" >"$folder/pid"
  say "started $name"
}

follow() {
  [[ -f $folder/pid ]] || die "no run $name was started here"
  tail -n +1 --pid="$(cat "$folder/pid")" -F "$folder/log" 2>/dev/null || true
  [[ -f $folder/code ]] || die "$name ended without a word: it was killed, or the host restarted"
  return "$(cat "$folder/code")"
}

code() {
  if [[ -f $folder/code ]]; then cat "$folder/code"; elif alive; then echo running; else echo 1; fi
}

stop() {
  alive || return 0
  # The whole session: train is a child of the shell that notes its exit code.
  pkill -TERM --session "$(cat "$folder/pid")" python || true
  local waited
  for ((waited = 0; waited < ${STOP_SECONDS:-600}; waited++)); do
    alive || return 0
    sleep 1
  done
  die "$name did not end within ${STOP_SECONDS:-600} s"
}

case $action in
  install) install "${2:-tpu}" ;;
  start | follow | code | stop)
    [[ $name =~ ^[A-Za-z0-9][A-Za-z0-9._-]*$ ]] || die "a run needs a name of letters, digits, . _ -"
    shift 2
    "$action" "$@"
    ;;
  *) die "unknown action $action; known: install, start, follow, code, stop" ;;
esac
