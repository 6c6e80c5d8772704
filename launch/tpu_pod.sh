#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Train on a TPU slice of Google Cloud: create or reuse it, copy this repository's commit, install,
# start on all hosts, stream the logs, go on after a preemption, delete it.
#
#   launch/tpu_pod.sh [ACTION] --name NAME --zone ZONE --type v5litepod-64 [options] \
#       -- --config configs/mmeb.py:lora,v5e-64 --config.output=/mnt/shared/runs/mmeb
#
# Actions:
#   all       up, copy, install, then run with restarts (the default)
#   up        create the slice, or find it ready
#   copy      send the current commit to all hosts        install   the environment on all hosts
#   run       start (or find running) and stream the logs; the exit code is train's
#   stop      save and end the run on all hosts           down      delete the slice
#
# Options:
#   --project P      default: gcloud's own                --spot            preemptible, cheaper
#   --version V      the hosts' image (by --type)         --restarts N      after preemptions (20)
#   --setup COMMAND  runs on every host after the installation: mount the shared storage here
#   --delete         delete the slice when the run has ended well
#   --dry_run        print the exact commands and run nothing
#
# Every action may be repeated: what is there is used again. Model, data and output must lie on
# storage that all hosts see (a mounted bucket or file store); a slice's own disks go away with it.
# shellcheck disable=SC2329  # actions are called by name
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
cd "$REPOSITORY"

action=all name="" zone="" type="" project="" version="" setup="" restarts=20 spot=0 delete=0
case ${1:-} in
  all | up | copy | install | run | stop | down) action=$1; shift ;;
esac
while [[ $# -gt 0 ]]; do
  case $1 in
    --name) name=$(value_of "$@"); shift 2 ;;
    --zone) zone=$(value_of "$@"); shift 2 ;;
    --type) type=$(value_of "$@"); shift 2 ;;
    --project) project=$(value_of "$@"); shift 2 ;;
    --version) version=$(value_of "$@"); shift 2 ;;
    --setup) setup=$(value_of "$@"); shift 2 ;;
    --restarts) restarts=$(value_of "$@"); shift 2 ;;
    --spot) spot=1; shift ;;
    --delete) delete=1; shift ;;
    --dry_run) DRY_RUN=1; shift ;;
    -h | --help) usage; exit 0 ;;
    --) shift; break ;;
    *) die "unknown option $1; what train shall see stands behind --" ;;
  esac
done
[[ -n $name ]] || die "--name is missing"
[[ -n $zone ]] || die "--zone is missing, such as --zone us-central2-b"
whole_number --restarts "$restarts"
case $action in
  all | up)
    [[ -n $type ]] || die "--type is missing, such as --type v5litepod-64" ;;
esac
case $action in
  all | run)
    [[ $# -gt 0 ]] || die "nothing to train: give train's flags behind --" ;;
esac
if [[ -z $version ]]; then
  case $type in
    v5litepod-*) version=v2-alpha-tpuv5-lite ;;
    v5p-*) version=v2-alpha-tpuv5 ;;
    v6e-*) version=v2-alpha-tpuv6e ;;
    *) version=tpu-ubuntu2204-base ;;
  esac
fi
need git
[[ $DRY_RUN == 1 ]] || need gcloud
train_flags=("$@")
readonly folder=vlm2vec_jax

where=(--zone "$zone")
[[ -z $project ]] || where+=(--project "$project")

tpu() {
  local verb=$1
  shift
  run gcloud compute tpus tpu-vm "$verb" "$name" "${where[@]}" "$@"
}

# READY, CREATING, PREEMPTED, ... ; "absent" where there is none.
state() {
  if [[ $DRY_RUN == 1 ]]; then
    echo absent
    return
  fi
  local words
  if words=$(gcloud compute tpus tpu-vm describe "$name" "${where[@]}" --format='value(state)' 2>&1); then
    echo "$words"
  elif [[ $words == *NOT_FOUND* || $words == *"not found"* ]]; then
    echo absent
  else
    die "cannot ask for $name: $words"
  fi
}

everywhere() { tpu ssh --worker=all --command "$1"; }

# These are called where bash does not stop at an error by itself, hence each `|| return`.
up() {
  local now
  now=$(state) || return
  case $now in
    READY) say "$name is there and ready"; return ;;
    absent) ;;
    PREEMPTED | TERMINATED | STOPPED) down || return ;;
    *) die "$name is $now: wait, or choose another name" ;;
  esac
  local options=(--accelerator-type "$type" --version "$version")
  [[ $spot == 0 ]] || options+=(--spot)
  tpu create "${options[@]}"
}

copy() {
  local archive=launch/.$folder.tar.gz code=0
  [[ -z $(git status --porcelain) ]] || say "note: changes that are not committed are not copied"
  run git archive --format=tar.gz --output "$archive" HEAD || return
  run gcloud compute tpus tpu-vm scp "$archive" "$name:$folder.tar.gz" "${where[@]}" \
    --worker=all || code=$?
  rm -f "$archive"
  [[ $code == 0 ]] || return "$code"
  everywhere "mkdir -p $folder && tar -xzf $folder.tar.gz -C $folder"
}

install() {
  everywhere "bash $folder/launch/remote.sh install tpu" || return
  [[ -z $setup ]] || everywhere "$setup"
}

start() { everywhere "bash $folder/launch/remote.sh start $name --distributed $(quoted "${train_flags[@]}")"; }

follow() { everywhere "bash $folder/launch/remote.sh follow $name"; }

# The exit code of train on host 0, or "running"; the one of ssh may be anybody's.
code_of_train() {
  gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker=0 \
    --command "bash $folder/launch/remote.sh code $name"
}

# Start and stream. A slice that is gone afterwards was preempted: RESTART_CODE.
train() {
  local now code
  start || return
  while ! follow; do
    now=$(state) || return
    case $now in
      PREEMPTED | TERMINATED | STOPPED | absent)
        say "$name is $now"
        return "$RESTART_CODE" ;;
    esac
    code=$(code_of_train) || return
    [[ $code == running ]] || return "$code"
    say "the connection was lost, the run goes on: following again"
    sleep "${FOLLOW_SECONDS:-10}"
  done
}

whole() { up && copy && install && train; }

stop() { everywhere "bash $folder/launch/remote.sh stop $name"; }

down() {
  if [[ $DRY_RUN != 1 && $(state) == absent ]]; then
    say "$name is not there"
    return
  fi
  tpu delete --quiet
}

code=0
case $action in
  all) restarting "$restarts" whole || code=$? ;;
  run) restarting "$restarts" train || code=$? ;;
  *) "$action" || code=$? ;;
esac
[[ $code != 0 || $delete == 0 || $action == down ]] || down
exit "$code"
