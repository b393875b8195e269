# shellcheck shell=bash
# Sourced by train.sbatch and eval.sbatch: the arguments that slurm/submit gave, and what a job does after its end.
# What SLURM sends when, and what it shows of a job then, was read off a real one (22.05); tests/test_slurm.py holds it.
ROOT=$1 SITE=$2 RUN=$4
attempt=$(($3 + ${SLURM_RESTART_COUNT:-0})) # Requeued jobs have the same arguments and a restart count.
# shellcheck source=slurm/site.sh
. "$SITE"
LAUNCH=$5
options=("${@:7:$6}") # Of sbatch, for the next job of a chain.
shift $((6 + $6))     # What is left are hrgan's words.
set +eu               # Modules and activation scripts are not written for these.
site_setup
set -eu
logs=$RUN/slurm
# shellcheck disable=SC2034  # Of the scripts that source this.
log=$logs/$SLURM_JOB_ID-$attempt.log
next='' # Number of the next job of the chain.

say() { echo "$(date +%FT%T) attempt $attempt of $MAX_ATTEMPTS: $*"; }

# field NAME: what SLURM knows of this job.
field() { scontrol -o show job "$SLURM_JOB_ID" | tr ' ' '\n' | sed -n "s/^$1=//p"; }

# The next job of the chain is queued first, so that not even the loss of this node breaks the chain.
queue_next() {
    [ "$CHAIN" = singleton ] && [ "$attempt" -lt "$MAX_ATTEMPTS" ] || return 0
    next=$(HRGAN_SITE="$SITE" "$ROOT/slurm/submit" "$1" --attempt $((attempt + 1)) ${LAUNCH:+"--launch=$LAUNCH"} "${options[@]}" -- "${@:2}")
    say "the next job is $next"
}

# end CODE LINE: no further attempt.
end() {
    say "$2"
    [ -z "$next" ] || scancel "$next"
    exit "$1"
}

# go_on LINE: one more attempt, unless that was the last.
go_on() {
    [ "$attempt" -lt "$MAX_ATTEMPTS" ] || end 3 "$1; MAX_ATTEMPTS are used up: submit it again to go on"
    say "$1; it goes on in the next attempt"
    if [ -z "$next" ]; then
        trap '' TERM # SLURM ends this script as it takes the job back.
        scontrol requeue "$SLURM_JOB_ID" || end 3 "requeueing is refused here: set CHAIN=singleton in $SITE, submit again"
    fi
    exit 3
}

# SLURM took the nodes away while the job was running; it says so with PreemptTime, which is None or missing otherwise.
preempted() { [[ $(field PreemptTime) == [0-9]* ]]; }

# After SIGTERM at the batch script itself: SLURM sends it when it has already decided about the job.
settle() {
    if [ "$(field Restarts)" -gt "${SLURM_RESTART_COUNT:-0}" ]; then # A lost node, a preemption, scontrol requeue.
        say "SLURM has put it back into the queue"
        exit 3
    fi
    if preempted; then go_on "preempted"; fi
    case $(field Reason) in
        NodeDown) go_on "a node was lost" ;;
        TimeLimit) go_on "the time limit came before everything was saved" ;;
    esac
    end 3 "cancelled; submit it again to go on"
}

mkdir -p "$logs"
[ "$attempt" -le "$MAX_ATTEMPTS" ] || end 3 "MAX_ATTEMPTS are used up: submit it again to go on"
