#!/usr/bin/env bash
# A run on Cloud TPU VMs, asked for as a queued resource: one slice or several.
#
#     NAME=v3 ZONE=us-east5-a TYPE=v5p-1024 IMAGE=REGION-docker.pkg.dev/PROJECT/REPO/dsjax \
#         deploy/tpu-vm.sh run v3-671b-v5p-512 run_dir=gs://BUCKET/runs/v3
#
# `run` waits for the TPUs and trains until the run is done; where they are taken away, it asks for
# others and goes on from the newest checkpoint. `stop` lets the run save and leave, `delete` gives
# the TPUs back. TYPE counts cores for v5p (v5p-1024 is 8x8x8, 512 chips), chips for v5litepod and v6e.
#
# SLICES=2      several slices of TYPE, joined over the data center's network; set mesh.dcn too
# SPOT=1        cheaper TPUs, which may be taken away at any time
# RUNTIME=...   software of the VMs, by default that of TYPE
set -euo pipefail

die() {
  echo "error: $*" >&2
  exit 2
}

needs() {
  local variable
  for variable in "$@"; do
    [[ -n "${!variable:-}" ]] || die "$variable is not set; the first lines of $0 say how"
  done
}

tpus() {
  gcloud compute tpus queued-resources "$1" "$NAME" --zone="$ZONE" "${@:2}"
}

# On all workers of all slices, at once: a run starts when the last of them has.
workers() {
  tpus ssh --node=all --worker=all --batch-size=all --command="$1"
}

state() {
  tpus describe --format='value(state.state)' 2>/dev/null || echo UNKNOWN
}

runtime() {
  case "$TYPE" in
    v5p-*) echo v2-alpha-tpuv5 ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    *) die "TYPE=$TYPE: set RUNTIME to its software version" ;;
  esac
}

request() {
  local version nodes=(--node-id="$NAME")
  version=${RUNTIME:-$(runtime)}
  if ((${SLICES:-1} > 1)); then
    nodes=(--node-count="$SLICES" --node-prefix="$NAME")
  fi
  tpus create "${nodes[@]}" ${SPOT:+--spot} \
    --accelerator-type="$TYPE" --runtime-version="$version"
}

# Waits until the TPUs are there, or will not be; says which.
outcome() {
  local now before=
  while true; do
    now=$(state)
    case "$now" in
      ACTIVE | FAILED | SUSPEND*) echo "$now" && return ;;
    esac
    [[ "$now" == "$before" ]] || echo "$NAME: $now" >&2
    before=$now
    sleep "${POLL_SECONDS:-30}"
  done
}

train() {
  local words host=${IMAGE%%/*}
  words=$(printf ' %q' "$@")
  workers "sudo gcloud auth configure-docker $host --quiet && sudo docker pull --quiet $IMAGE \
&& sudo docker run --rm --name dsjax --privileged --network host \
--env TPU_ACCELERATOR_TYPE=$TYPE $IMAGE python train.py$words"
}

run() {
  local code
  needs TYPE IMAGE
  (($#)) || die "expected run CONFIG [section.key=value ...]"
  while true; do
    [[ "$(state)" != UNKNOWN ]] || request
    case "$(outcome)" in
      FAILED) die "$NAME: the request failed; gcloud compute tpus queued-resources describe $NAME" ;;
      ACTIVE)
        code=0
        train "$@" || code=$?
        ((code)) || exit 0
        # It takes a while until it is known that TPUs are gone. A run that fails while they are
        # there would fail again.
        sleep "${SETTLE_SECONDS:-120}"
        [[ "$(outcome)" != ACTIVE ]] || exit "$code"
        ;;
    esac
    echo "$NAME: the TPUs were taken away; asking for others"
    tpus delete --force --quiet
  done
}

needs NAME ZONE
case "${1:-}" in
  run) run "${@:2}" ;;
  stop) workers 'sudo docker stop -t 3600 dsjax' ;;
  delete) tpus delete --force --quiet ;;
  *) die "expected run CONFIG [section.key=value ...], stop or delete" ;;
esac
