#!/usr/bin/env bash
# Train on GPU nodes under Slurm: one node or many, one process a node.
#
#     sbatch --nodes=1 deploy/slurm.sh v2-lite-16b-h100-8 run_dir=/shared/runs/v2-lite
#     sbatch --nodes=4 deploy/slurm.sh v2-lite-16b-h100-8 run_dir=/shared/runs/v2-lite \
#         mesh.dcn.data=4 training.microbatch_size=128
#
# Partition, account and time are sbatch's own options. `python` must find dsjax on every node; or,
# where the nodes have enroot and pyxis, a container runs it:
#
# IMAGE=...    a squashfs file that all nodes see, or USER@REGISTRY#IMAGE:TAG
# MOUNTS=...   folders that the container sees, by default /shared: run directory, data, checkpoints
#              and cache. Several are separated by commas; SRC:DST shows one under another name.
#SBATCH --job-name=dsjax
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
# Ten minutes before the time is over the processes get SIGTERM, save, and leave with 143.
#SBATCH --signal=TERM@600
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

die() {
  echo "error: $*" >&2
  exit 2
}

(($#)) || die "expected CONFIG [section.key=value ...]"

# Processes leave by themselves: all when one is lost, each when its part is saved. A process gets
# all cores of its node.
options=(--kill-on-bad-exit=0)
[[ -z "${SLURM_CPUS_ON_NODE:-}" ]] || options+=(--cpus-per-task="$SLURM_CPUS_ON_NODE")
if [[ -n "${IMAGE:-}" ]]; then
  mounts=
  IFS=, read -ra folders <<<"${MOUNTS:-/shared}"
  for folder in "${folders[@]}"; do
    # Where a folder is missing, pyxis says so only after minutes, once for every node.
    [[ -e "${folder%%:*}" ]] || die "${folder%%:*} is not there; MOUNTS lists what to mount"
    [[ "$folder" == *:* ]] || folder=$folder:$folder
    mounts+=${mounts:+,}$folder
  done
  # pyxis hands all exported variables on, the image's own excepted. Packages in the user's home
  # would come before the image's.
  options+=(--container-image="$IMAGE" --container-mounts="$mounts" --container-workdir=/dsjax
    --no-container-mount-home)
fi

code=0
srun "${options[@]}" python train.py "$@" || code=$?
# 143: SIGTERM, after saving. 75: a process was lost. Other codes from 128 on: one was killed. Then
# the run goes on from its newest checkpoint. After 1, a fault, and 2, wrong input, it would not.
if ((code == 75 || (code >= 128 && code != 130))) && ((${SLURM_RESTART_COUNT:-0} < 100)); then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
