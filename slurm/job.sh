# Sourced by the scripts of all jobs: reads the site's lines, and acts on the exit code of the ranks.
# A sweep's script (hydra_plugins/slurm_array.py) sources it too, so that one rule applies to all.

# Some sites start jobs, or the steps in them, without the environment they were submitted with.
export SLURM_EXPORT_ENV=ALL
if [ -n "${PALI_SITE-}" ]; then
    set +u # a site's files may use unset variables, as conda's activate does
    source "$PALI_SITE"
    status=$?
    set +e -u
    if [ "$status" != 0 ]; then
        # Without them the node would run another Python, or other code.
        echo "The site's file ($PALI_SITE) cannot be read, or ends with code $status; correct cluster.setup, or" \
            "submit again where the nodes see this file." >&2
        exit 2
    fi
fi
unset SLURM_CPUS_PER_TASK SLURM_TRES_PER_TASK # set for the whole node; srun >= 22.05 fails if its own value differs

# A rank that stops the job alone (disk full, out of memory) writes its exit code and sentence into a note
# (train/health/exit_note.py), because its peers, lost or killed, end with higher codes, and srun reports the highest.
# The note is made at its full size here, so that a full disk has room for it. A rank that still cannot write removes it.
expect_note() { # FOLDER, by default that of the site's file
    local folder=${1:-${SLURM_SUBMIT_DIR:-$PWD}} note
    [ -n "${1-}" ] || [ -z "${PALI_SITE-}" ] || folder=${PALI_SITE%/*}
    note=$folder/.note-${SLURM_JOB_ID:-0}
    if printf '%4095s\n' '' 2>/dev/null >"$note"; then
        export PALI_NOTE=$note
    else
        unset PALI_NOTE
        echo "$folder cannot be written to: if one rank stops the run alone, the job is still started again." >&2
    fi
}

read_note() { # sets code to that in the note, if a rank wrote one
    local first='' sentence=''
    [ -n "${PALI_NOTE-}" ] || return 0
    if [ -e "$PALI_NOTE" ]; then
        { read -r first && read -r sentence; } 2>/dev/null <"$PALI_NOTE"
        rm -f "$PALI_NOTE"
    elif [ "$code" != 0 ] && [ -w "${PALI_NOTE%/*}" ]; then # else the file system is unreachable: start again
        first=3 sentence="A rank stopped the run and could not write why (is the disk full?); its last output is above."
    fi
    if [ "$code" != 0 ] && { [ "$first" = 2 ] || [ "$first" = 3 ]; }; then
        echo "The ranks ended with exit code $code, because one stopped the run with $first: $sentence"
        code=$first
    fi
}

# Sets code to the exit code of the job; returns 0 where the job must be queued again.
# Final: done (0), a mistake in the configuration (2), a run that stopped itself (3), where a restart would end alike.
# All other codes are queued again, and the run continues from its last checkpoint: a signal or failing storage (75), a
# hang (4), a rank that died (1, or from 128). train/run/restarts.py stops a run that makes no progress; only ends
# before that check are counted here.
judge() { # CODE
    code=$1
    read_note
    case $code in 0 | 2 | 3) return 1 ;; 75) return 0 ;; esac
    local most=10 # a lost or killed rank may be a fault of the machine
    [ "$code" != 1 ] || most=3
    if [ "$SECONDS" -lt 120 ] && [ "${SLURM_RESTART_COUNT:-0}" -ge "$most" ]; then
        echo "The ranks ended with exit code $code within $SECONDS s, at restart $SLURM_RESTART_COUNT; the job is not" \
            "requeued again."
        return 1
    fi
}

# The controller may be busy, or be replaced by its backup.
queue_again() {
    local message='' wait
    echo "The ranks ended with exit code $code; the job is requeued."
    trap '' TERM # Slurm sends TERM to this script, and so to scontrol, once the job is queued
    for wait in 1 2 4 8 15 30 60 60 60 ''; do
        message=$(exec scontrol requeue "$SLURM_JOB_ID" 2>&1) && exit 0
        [ -z "$wait" ] || sleep "$wait"
    done
    echo "Slurm did not queue the job again ($message); submit it once more to continue from its last checkpoint."
    exit "$code"
}
