#!/usr/bin/env bash
# A run on a GKE cluster that XPK made: XPK turns it into a JobSet in the cluster's queue.
#
#     CLUSTER=tpus ZONE=us-east5-a TYPE=v5p-1024 IMAGE=REGION-docker.pkg.dev/PROJECT/REPO/dsjax \
#         deploy/xpk.sh v3 v3-671b-v5p-512 run_dir=gs://BUCKET/runs/v3
#
# The first word names the workload. SLICES=2 takes several slices of TYPE; set mesh.dcn too.
set -euo pipefail

die() {
  echo "error: $*" >&2
  exit 2
}

for variable in CLUSTER ZONE TYPE IMAGE; do
  [[ -n "${!variable:-}" ]] || die "$variable is not set; the first lines of $0 say how"
done
(($# > 1)) || die "expected WORKLOAD CONFIG [section.key=value ...]"

# A run that is interrupted goes on from its newest checkpoint; so it may be, often.
xpk workload create \
  --cluster="$CLUSTER" --zone="$ZONE" \
  --workload="$1" \
  --tpu-type="$TYPE" --num-slices="${SLICES:-1}" \
  --docker-image="$IMAGE" \
  --max-restarts=100 \
  --command="python train.py$(printf ' %q' "${@:2}")"
