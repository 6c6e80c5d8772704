#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Train on GKE: render the JobSet of launch/gke/ with the values of one file, and apply it.
#
#   launch/gke/gke.sh ACTION --kind tpu|gpu --values FILE [--dry_run]
#
# Actions:
#   render    print the manifest                 apply     create the JobSet, or find it there
#   logs      stream the first pod's log         status    what the JobSet and its pods do
#   delete    remove it (checkpoints stay where the output is)
#
# The cluster needs the JobSet controller; kubectl must point to the cluster.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

action=${1:-} kind="" values=""
case $action in
  render | apply | logs | status | delete) shift ;;
  -h | --help) usage; exit 0 ;;
  *) die "the first word must be render, apply, logs, status or delete" ;;
esac
while [[ $# -gt 0 ]]; do
  case $1 in
    --kind) kind=$(value_of "$@"); shift 2 ;;
    --values) values=$(value_of "$@"); shift 2 ;;
    --dry_run) DRY_RUN=1; shift ;;
    -h | --help) usage; exit 0 ;;
    *) die "unknown option $1" ;;
  esac
done
[[ $kind == tpu || $kind == gpu ]] || die "--kind must be tpu or gpu"
[[ -f $values ]] || die "--values ${values:-is missing}: there is no such file; copy launch/gke/values.env"

declare -A value
while IFS= read -r line || [[ -n $line ]]; do
  [[ $line =~ ^[[:space:]]*(#|$) ]] && continue
  [[ $line =~ ^([A-Z_]+)=(.*)$ ]] || die "$values: not a NAME=VALUE line: $line"
  value[${BASH_REMATCH[1]}]=${BASH_REMATCH[2]}
done <"$values"

# shellcheck disable=SC2016  # the names in the template are looked for, not expanded
names() { grep -o '\${[A-Z_]*}' "$1" | tr -d '${}' | sort -u; }

template=$(dirname "$SCRIPT")/jobset-$kind.yaml
manifest=$(<"$template")
missing=()
while IFS= read -r name; do
  if [[ -z ${value[$name]:-} ]]; then
    missing+=("$name")
  else
    manifest=${manifest//"\${$name}"/"${value[$name]}"}
  fi
done < <(names "$template")
[[ ${#missing[@]} == 0 ]] || die "$values does not say: ${missing[*]}"

kube() { run kubectl --namespace "${value[NAMESPACE]}" "$@"; }

[[ $action == render || $DRY_RUN == 1 ]] || need kubectl
case $action in
  render) printf '%s\n' "$manifest" ;;
  apply)
    if [[ $DRY_RUN != 1 ]] && kubectl --namespace "${value[NAMESPACE]}" get jobset "${value[NAME]}" \
      >/dev/null 2>&1; then
      say "${value[NAME]} is there already; delete it first to start it with other values"
      exit 0
    fi
    [[ $DRY_RUN != 1 ]] || printf '%s\n' "$manifest"
    printf '%s\n' "$manifest" | kube apply -f -
    ;;
  logs)
    kube logs --follow --max-log-requests 1 --selector \
      "jobset.sigs.k8s.io/jobset-name=${value[NAME]},batch.kubernetes.io/job-completion-index=0"
    ;;
  status) kube get jobset,job,pod --selector "jobset.sigs.k8s.io/jobset-name=${value[NAME]}" ;;
  delete) kube delete jobset "${value[NAME]}" --ignore-not-found ;;
esac
