#!/usr/bin/env bash
# A run of nicecp on a cluster with Slurm: one rank for each socket's worth of cores, the cluster's own MPI.
#
#   sbatch examples/slurm.sh big.h5 big-run.h5 --preset tabular --batch-size 4096
#
# The first two arguments are the data and where the best model goes; the others are options of `nicecp train`. The job
# may be sent again after it has reached its time limit: it goes on where it was, with as many ranks as it gets then.
#SBATCH --job-name=nicecp
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --signal=TERM@180
#SBATCH --open-mode=append
set -euo pipefail

data=$1 out=$2
shift 2

# What your cluster calls them. mpi4py must have been installed with this MPI: pip install --no-binary mpi4py mpi4py
# module load gcc openmpi python
# source "$HOME/nicecp/bin/activate"

# Slurm sends SIGTERM to all ranks three minutes before the end (--signal): the step is finished, the run is saved by
# rank 0, and every rank leaves with exit code 143.
if [ -e "${out%.h5}.state.h5" ]; then
    work=(--resume "$out" "$@")
else
    work=(--data "$data" --out "$out" "$@")
fi
srun --cpu-bind=cores nicecp train "${work[@]}" --threads "$SLURM_CPUS_PER_TASK" --checkpoint-every 10min
