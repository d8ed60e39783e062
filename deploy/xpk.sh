#!/usr/bin/env bash
# Train on a GKE cluster that XPK made: XPK turns the run into a JobSet in the cluster's queue.
#
#     CLUSTER=tpus ZONE=us-east5-a TYPE=v5p-1024 IMAGE=REGION-docker.pkg.dev/PROJECT/REPO/dsjax \
#         deploy/xpk.sh WORKLOAD CONFIG [section.key=value ...]
#
# WORKLOAD names the run for `xpk workload list` and `delete`.
# SLICES=2        several slices of TYPE; set mesh.dcn too
# PROJECT=...     by default gcloud's
# XPK_FLAGS=...   more flags of `xpk workload create`, such as --priority=high or --spot
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=checks.sh
. "$(dirname "$0")/checks.sh"

needs CLUSTER ZONE TYPE IMAGE
(($# > 1)) || die "expected WORKLOAD CONFIG [section.key=value ...]"
refuse_placeholders "${@:2}"

# A run that is interrupted goes on from its newest checkpoint; so it may be, often. XPK starts a
# workload again on exit codes 42 and 127 to 255, which are signals, and on those listed here: 75
# says that a process was lost. 1 and 2, a run that failed and wrong input, would fail again.
# exec: SIGTERM reaches Python, which saves.
# shellcheck disable=SC2086  # several flags
xpk workload create \
  --cluster="$CLUSTER" --zone="$ZONE" ${PROJECT:+--project="$PROJECT"} \
  --workload="$1" \
  --tpu-type="$TYPE" --num-slices="${SLICES:-1}" \
  --docker-image="$IMAGE" \
  --max-restarts=100 --restart-on-exit-codes=75 --termination-grace-period-seconds=600 \
  ${XPK_FLAGS:-} \
  --command="exec python train.py$(printf ' %q' "${@:2}")"
