# shellcheck shell=bash disable=SC2034  # slurm/submit and the jobs read these.
# The settings of this cluster: the only file here to edit. HRGAN_SITE=FILE slurm/submit ... takes another one.

# Options of sbatch, one a word: for every job, then for each kind. Options given to slurm/submit come after these and win.
SBATCH_ALL=(
    # --account=NAME
    # --partition=NAME
)
SBATCH_TRAIN=(--gpus-per-node=8 --cpus-per-task=64 --mem=0 --time=24:00:00)
SBATCH_EVAL=(--gpus-per-node=1 --cpus-per-task=8 --mem=64G --time=24:00:00)
SBATCH_DATA=(--cpus-per-task=16 --mem=32G --time=12:00:00)

# Training processes on each node; empty: one for each GPU that SLURM gave.
PROCESSES_PER_NODE=

# Accelerate's configuration: a name in launch/ (nodes-zero2) or a file; empty: DDP. --launch NAME wins.
LAUNCH=

# What a job's shell needs before anything runs in it: modules, a virtual environment, variables (NCCL_SOCKET_IFNAME, ...).
site_setup() {
    . "$ROOT/.venv/bin/activate"
}

# What goes before each command on a node, for example (apptainer exec --nv --bind /scratch hrgan.sif); empty: nothing.
CONTAINER=()

# How long before the time limit a training is told to save and stop: more than a save, an evaluation and a step take.
MARGIN_SECONDS=600

# requeue: a job that the time limit or a preemption ended goes back into the queue. singleton: where requeueing is
# forbidden, each job queues the next one, which waits for it to end.
CHAIN=requeue

# How many times one submission may run.
MAX_ATTEMPTS=50
