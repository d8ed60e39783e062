#!/usr/bin/env bash
# Train on Cloud TPU VMs, requested as a queued resource: one slice or several.
#
#     NAME=v3 ZONE=us-east5-a TYPE=v5p-1024 IMAGE=REGION-docker.pkg.dev/PROJECT/REPO/dsjax \
#         deploy/tpu-vm.sh run CONFIG [section.key=value ...]
#
# run     request TPUs, wait for them, and train until the run is done. The run is a detached
#         container, `dsjax`, on every host: when ssh or this script ends it goes on, and the same
#         command attaches to it again. Lost TPUs are requested anew; then, or when a process was
#         lost, all hosts start again, and the run goes on from its newest checkpoint.
# stop    let the run save and leave
# delete  give the TPUs back
#
# `run` leaves with the run's exit code: 0 done, 2 wrong input, 1 failed, 143 stopped.
#
# TYPE counts cores for v5p (v5p-1024 is 8x8x8, 512 chips), chips for v5litepod and v6e.
# SLICES=2          several slices of TYPE, joined over the data center's network; set mesh.dcn too
# SPOT=1            cheaper TPUs, which may be taken away at any time
# RUNTIME=...       software of the VMs, by default that of TYPE
# PROJECT=... NETWORK=... SUBNETWORK=... SERVICE_ACCOUNT=...   by default gcloud's and the project's
# CREATE_FLAGS=...  more flags of `gcloud compute tpus queued-resources create`, such as --reserved
# SSH_FLAGS=...     more flags of `gcloud compute tpus queued-resources ssh`: --tunnel-through-iap
# LOST_SECONDS=600  silence of a host after which its slice is given back, and another requested
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=checks.sh
. "$(dirname "$0")/checks.sh"

say() {
  echo "$NAME: $*" >&2
}

pause() {
  sleep "${POLL_SECONDS:-30}"
}

tpus() {
  gcloud compute tpus "$@" --zone="$ZONE" ${PROJECT:+--project="$PROJECT"}
}

queued() {
  tpus queued-resources "$1" "$NAME" "${@:2}"
}

# ssh notices within two minutes that a host is gone. gcloud repeats the command up to ten times
# when ssh fails, and takes 64 hosts at a time: so each command may be repeated, and returns soon.
on_hosts() {
  # shellcheck disable=SC2086  # several flags
  queued ssh --quiet --node="$1" --worker="$2" ${SSH_FLAGS:-} \
    --ssh-flag='-o ConnectTimeout=30 -o ServerAliveInterval=30' --command="$3"
}

# -- The TPUs ------------------------------------------------------------------------------------

# The request's state; MISSING without one, UNKNOWN while gcloud cannot tell.
state() {
  local found
  found=$(tpus queued-resources list --filter="name~/queuedResources/$NAME\$" \
    --format='value(state.state)') || found=UNKNOWN
  echo "${found:-MISSING}"
}

# Sets `condition`: READY when all slices are, LOST when one is and will not come back, else the
# request's or a slice's state. Sets `hosts`, the number of hosts.
survey() {
  local found status count ready=0
  condition=$(state)
  [[ "$condition" == ACTIVE ]] || return 0
  found=$(tpus tpu-vm list --filter="name~/nodes/$NAME(-[0-9]+)?\$" \
    --format='value(state,networkEndpoints.len())') || found=UNKNOWN
  hosts=0
  while read -r status count; do
    case "$status" in
      READY) hosts=$((hosts + count)) ready=$((ready + 1)) ;;
      PREEMPTED | TERMINATED) condition=LOST ;;
      *) [[ "$condition" == LOST ]] || condition=${status:-ACTIVE} ;; # REPAIRING, RESTARTING, ...
    esac
  done <<<"$found"
  ((ready < ${SLICES:-1} || hosts == 0)) || condition=READY
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
  # shellcheck disable=SC2086  # several flags
  queued create "${nodes[@]}" --accelerator-type="$TYPE" --runtime-version="$version" \
    ${SPOT:+--spot} ${NETWORK:+--network="$NETWORK"} ${SUBNETWORK:+--subnetwork="$SUBNETWORK"} \
    ${SERVICE_ACCOUNT:+--service-account="$SERVICE_ACCOUNT"} ${CREATE_FLAGS:-} ||
    die "the request for $TYPE was refused; gcloud says why above"
}

# Requests the TPUs, again when they were taken away, and waits until all slices are ready.
acquire() {
  local before=''
  while true; do
    survey
    [[ "$condition" == "$before" || "$condition" == READY ]] || say "$condition"
    before=$condition
    case "$condition" in
      READY) return ;;
      MISSING) request ;;
      SUSPENDED | LOST) replace ;;
      FAILED) die "$NAME: the request failed; gcloud compute tpus queued-resources describe $NAME" ;;
      # ACCEPTED, WAITING_FOR_RESOURCES, PROVISIONING, SUSPENDING, DELETING, REPAIRING, ...
      *) pause ;;
    esac
  done
}

replace() {
  say "the TPUs were taken away; asking for others"
  queued delete --force --quiet || pause
}

# -- The run -------------------------------------------------------------------------------------

# Asks all hosts for their container. Of each that answers a line: `STATUS CODE RUN`, or `missing`;
# and the file that `stop` leaves.
containers() {
  # shellcheck disable=SC2016  # the hosts' shells expand it
  on_hosts all all 'echo dsjax-is $(sudo docker inspect dsjax 2>/dev/null --format "{{.State.Status}} {{.State.ExitCode}} {{.Config.Labels.run}}" || echo missing) $(ls /run/dsjax-stop 2>/dev/null)' |
    sed -n 's/^dsjax-is //p' || true
}

launch() {
  local words
  words=$(printf ' %q' "$@")
  # Images first: processes that started would wait for those whose host still loads.
  on_hosts all all "sudo docker rm --force dsjax >/dev/null 2>&1; sudo rm -f /run/dsjax-stop; \
sudo gcloud auth configure-docker ${IMAGE%%/*} --quiet && sudo docker pull --quiet $IMAGE" &&
    on_hosts all all "sudo docker inspect dsjax >/dev/null 2>&1 || sudo docker run --detach --init \
--name dsjax --label run=$run --privileged --network host --env TPU_ACCELERATOR_TYPE=$TYPE \
$IMAGE python train.py$words" >/dev/null
}

# Starts the run on all hosts. Where a host is gone, or about to be, `follow` finds out.
start() {
  local code _
  for _ in 1 2 3; do
    say "starting on $hosts hosts"
    code=0
    launch "$@" || code=$?
    ((code != 0 && code != 255)) || return 0 # 255 is ssh's own
    pause
    survey
    [[ "$condition" == READY ]] || return 0
  done
  die "a host cannot start $IMAGE; docker says why above"
}

# Follows the run on all hosts until it ends. Sets `outcome`: the exit code to leave with; `again`
# when the run is to start again; `lost` when a host is gone.
follow() {
  local found answers since='--tail=100' heard=$SECONDS
  while true; do
    found=$(containers)
    answers=$(grep -c . <<<"$found" || true)
    ((answers == 0)) || answered=1
    ((answers < hosts)) || heard=$SECONDS
    if [[ "$found" == *running* ]]; then
      # Until the first host's container ends, or ssh does.
      on_hosts 0 0 "sudo docker logs --follow $since dsjax" || true
      since="--since=$(date -u +%Y-%m-%dT%H:%M:%SZ)"
    elif ((answers >= hosts)); then
      decide "$found"
      return
    else
      survey
      case "$condition" in
        READY) ;;
        UNKNOWN) heard=$SECONDS ;; # it is this machine's network
        *) outcome=again && return ;;
      esac
      if ((SECONDS - heard >= ${LOST_SECONDS:-600})); then
        say "$answers of $hosts hosts answer"
        [[ -n "$answered" ]] || die "no host answers ssh; docs/cloud-tpu.md has what it needs"
        outcome=lost
        return
      fi
    fi
    pause
  done
}

# From the lines of `containers`, all of them ended.
decide() {
  local codes
  codes=$(awk '{ print ($1 == "missing" ? $1 : $2) }' <<<"$1" | sort -u)
  outcome=again
  if [[ "$codes" == 0 ]]; then
    outcome=0
  elif grep -qx 2 <<<"$codes"; then
    outcome=2
  elif [[ "$1" == *dsjax-stop* ]]; then
    outcome=143
  # 75: another process is lost; 128 and above: a signal. Any other code of all hosts is the run's.
  elif [[ "$codes" =~ ^[0-9]+$ ]] && ((codes != 75 && codes < 128)); then
    outcome=$codes
  fi
}

run() {
  local run hosts=0 condition outcome found answered='' starts=1
  needs TYPE IMAGE
  (($#)) || die "expected run CONFIG [section.key=value ...]"
  refuse_placeholders "$@"
  run=$(cksum <<<"$IMAGE $*" | cut -d ' ' -f 1)
  acquire
  found=$(containers)
  if [[ "$found" == *running* ]]; then
    [[ "$found" == *" $run"* ]] || die "$NAME: another run is going on; stop it first"
    say "attaching to the run"
  else
    start "$@"
  fi
  while true; do
    follow
    case "$outcome" in
      again) pause ;;
      lost) replace ;;
      *) exit "$outcome" ;;
    esac
    ((++starts <= ${MAX_STARTS:-100})) || die "$NAME: gave up after $((starts - 1)) starts"
    acquire
    start "$@"
  done
}

needs NAME ZONE
case "${1:-}" in
  run) run "${@:2}" ;;
  stop) on_hosts all all 'sudo touch /run/dsjax-stop; sudo docker stop -t 3600 dsjax' ;;
  delete) queued delete --force --quiet ;;
  *) die "expected run CONFIG [section.key=value ...], stop or delete" ;;
esac
