#!/usr/bin/env bash
# Run `lpo train` on the GPUs of a Slurm cluster: one process for each GPU, on one host or several.
#
#   sbatch deploy/slurm.sh configs/math_8b.yaml --output=/shared/runs/math_8b
#   sbatch --nodes=2 deploy/slurm.sh configs/polaris_14b.yaml --output=/shared/runs/polaris_14b
#
# Submit it from the checkout, where .venv has the extra [cuda]. Checkout and output must be on disks that all hosts
# share. Options of sbatch override the lines below; --ntasks-per-node must stay the number of GPUs of a host.
#
# Before the time limit, and when the job is preempted, the processes receive SIGTERM, save their position together and
# exit with status 130; then the job is queued again and resumes. It is not queued again after an error.
#SBATCH --job-name=lpo
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=lpo-%j.log
set -euo pipefail

STOPPED=130 # exit status of a run that has saved its position because of a signal

if (($# == 0)); then
  echo "slurm.sh: usage: sbatch [OPTION...] deploy/slurm.sh CONFIG [--a.b=value...]" >&2
  exit 2
fi
if [[ ! ${SLURM_JOB_ID:-} ]]; then
  echo "slurm.sh: this is not a Slurm job; submit it with sbatch" >&2
  exit 2
fi
cd "$SLURM_SUBMIT_DIR"
if [[ ! -x .venv/bin/lpo ]]; then
  echo "slurm.sh: $PWD/.venv/bin/lpo is missing; submit from the checkout, after 'make .venv/installed EXTRAS=cuda'" >&2
  exit 2
fi

# JAX takes the address of the first process and the GPU of each from Slurm's variables. Every process must see all GPUs
# of its host, because it picks its own by its number, and GPUs of one host communicate directly.
status=0
srun --gpu-bind=none --kill-on-bad-exit=0 .venv/bin/lpo train "$1" --resume "${@:2}" || status=$?
if ((status == STOPPED)); then
  echo "slurm.sh: the run was stopped and has saved its position; queueing the job again"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
