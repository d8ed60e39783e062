#!/usr/bin/env bash
# A run on GPU nodes under Slurm: one node or many, one process a node.
#
#     sbatch --nodes=1 deploy/slurm.sh v2-lite-16b-h100-8 run_dir=/shared/runs/v2-lite
#     sbatch --nodes=4 deploy/slurm.sh v2-lite-16b-h100-8 run_dir=/shared/runs/v2-lite mesh.dcn.data=4
#
# Where the nodes have enroot and pyxis, IMAGE=REGISTRY/dsjax runs it in the container; else `python`
# must find dsjax on every node. Partition, account and time are sbatch's own options.
#SBATCH --job-name=dsjax
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
# Ten minutes before the time is over the processes are told, save, and leave with 143.
#SBATCH --signal=TERM@600
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

if (($# == 0)); then
  echo "error: expected CONFIG [section.key=value ...]" >&2
  exit 2
fi

# Processes leave by themselves: all when one is lost, each when its part is saved.
options=(--kill-on-bad-exit=0)
if [[ -n "${IMAGE:-}" ]]; then
  options+=(--container-image="$IMAGE" --container-workdir=/dsjax)
fi

code=0
srun "${options[@]}" python train.py "$@" || code=$?
if ((code == 143)); then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
