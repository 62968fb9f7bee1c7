#!/usr/bin/env bash
# A search on a SLURM cluster without Ray: drivers on two nodes (one works, one stands by) and any number of workers.
# Fill in what is in <angle brackets>, then: sbatch slurm.sh
#SBATCH --job-name=sparse-nas
#SBATCH --time=24:00:00
#SBATCH --ntasks=<drivers and workers, e.g. 34>
#SBATCH --cpus-per-task=<CPUs per trial, e.g. 4>
#SBATCH --signal=TERM@60
#SBATCH --requeue
set -euo pipefail
. <checkout>/.venv/bin/activate

# The password is in ~/.pgpass (mode 0600): host:port:database:user:password
export NAS_STORAGE=postgresql+psycopg://<user>@<host>:5432/<database>
config=<run file>.toml
run=<folder on the shared file system>/runs/<name>

# Two drivers on two nodes: the second waits, and takes over when the first dies.
srun --ntasks=2 --nodes=2 --ntasks-per-node=1 --exact \
    nas search "$config" --executor workers --standby --out "$run" &
driver=$!

# The workers: each takes one trial at a time, gives it back when it is preempted, and ends with the run.
srun --ntasks=$((SLURM_NTASKS - 2)) --exact --kill-on-bad-exit=0 --no-kill \
    nas worker "$run" --threads "$SLURM_CPUS_PER_TASK" &

wait "$driver"
