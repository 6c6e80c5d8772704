#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Train on this machine, in one process or in several that talk over the loopback address.
#
#   launch/local.sh [options] -- --config configs/mmeb.py [--config.field=value ...]
#
#   --processes N   how many processes (1). One drives all cards, which is what a machine with
#                   one or eight GPUs wants; several are for trying out what a cluster would do.
#   --devices N     devices of each process: simulated ones on a CPU, N cards each on a GPU machine
#   --port N        of the processes' meeting point (29500)
#   --restarts N    how often to go on after an interruption that has saved (10)
#   --logs DIR      what processes 1, 2, ... print goes here (launch-logs); process 0 prints here
#   --python PATH   the interpreter (.venv/bin/python if there, else python3)
#   --dry_run       print the exact commands and run nothing
#
# Ctrl-C and SIGTERM are handed on: the processes save, stop, and the same command goes on later.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
cd "$REPOSITORY"

processes=1 devices=0 port=29500 restarts=10 logs=launch-logs python=""
while [[ $# -gt 0 ]]; do
  case $1 in
    --processes) processes=$(value_of "$@"); shift 2 ;;
    --devices) devices=$(value_of "$@"); shift 2 ;;
    --port) port=$(value_of "$@"); shift 2 ;;
    --restarts) restarts=$(value_of "$@"); shift 2 ;;
    --logs) logs=$(value_of "$@"); shift 2 ;;
    --python) python=$(value_of "$@"); shift 2 ;;
    --dry_run) DRY_RUN=1; shift ;;
    -h | --help) usage; exit 0 ;;
    --) shift; break ;;
    *) die "unknown option $1; what train shall see stands behind --" ;;
  esac
done
[[ $# -gt 0 ]] || die "nothing to train: give train's flags behind --, such as -- --config configs/mini.py"
for option in processes devices port restarts; do whole_number "--$option" "${!option}"; done
[[ $processes -ge 1 ]] || die "--processes must be at least 1"
if [[ -z $python ]]; then
  python=python3
  [[ ! -x .venv/bin/python ]] || python=.venv/bin/python
fi
need "$python"

# The environment of process $1, as NAME=VALUE arguments of env.
surroundings() {
  local rank=$1 first cards
  [[ $devices != 0 ]] || return 0
  if command -v nvidia-smi >/dev/null && [[ ${JAX_PLATFORMS:-} != cpu ]]; then
    first=$((rank * devices))
    cards=$(seq -s, "$first" $((first + devices - 1)))
    printf '%s\n' "CUDA_VISIBLE_DEVICES=$cards"
  else
    printf '%s\n' "JAX_PLATFORMS=cpu" "JAX_CPU_COLLECTIVES_IMPLEMENTATION=gloo" \
      "XLA_FLAGS=${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=$devices"
  fi
}

children=()
hand_on() {
  local child
  for child in "${children[@]}"; do kill -s "$1" "$child" 2>/dev/null || true; done
}
trap 'hand_on TERM' TERM
trap 'hand_on INT' INT

# All processes once; the exit code is that of the first that failed, and the others are ended.
attempt() {
  local rank command code=0 settings
  children=()
  for ((rank = 0; rank < processes; rank++)); do
    mapfile -t settings < <(surroundings "$rank")
    command=("$python" -m vlm2vec_jax.train "${train_flags[@]}")
    [[ ${#settings[@]} == 0 ]] || command=(env "${settings[@]}" "${command[@]}")
    if [[ $processes -gt 1 ]]; then
      command+=(--coordinator "127.0.0.1:$port" --num_processes "$processes" --process_id "$rank")
    fi
    say "+ $(quoted "${command[@]}")"
    [[ $DRY_RUN != 1 ]] || continue
    if [[ $rank == 0 ]]; then
      "${command[@]}" &
    else
      mkdir -p "$logs"
      "${command[@]}" >"$logs/process-$rank.log" 2>&1 &
    fi
    children+=("$!")
  done
  wait_for_all || code=$?
  return "$code"
}

# `wait -n` returns early when a signal was handed on, so each child is asked for until it is gone.
wait_for_all() {
  local code worst=0 left=${#children[@]} gone
  while [[ $left -gt 0 ]]; do
    code=0 gone=""
    wait -n -p gone "${children[@]}" || code=$?
    [[ -n ${gone:-} ]] || continue
    left=$((left - 1))
    remove_child "$gone"
    if [[ $code != 0 && $worst == 0 ]]; then
      worst=$code
      # The others would wait for it for minutes. After a save they end by themselves.
      [[ $code == "$RESTART_CODE" ]] || hand_on TERM
    fi
  done
  if [[ $worst != 0 && $worst != "$RESTART_CODE" && $processes -gt 1 ]]; then
    say "a process failed with code $worst; see above and $logs/"
  fi
  return "$worst"
}

remove_child() {
  local child kept=()
  for child in "${children[@]}"; do [[ $child == "$1" ]] || kept+=("$child"); done
  children=("${kept[@]}")
}

train_flags=("$@")
restarting "$restarts" attempt
