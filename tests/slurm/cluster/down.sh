#!/usr/bin/env bash
# down.sh FOLDER: ends the jobs and the daemons that up.sh started, by the pids in their pid files, and only those.
export SLURM_CONF=$1/slurm.conf
scancel --quiet --user="$(id -un)" 2>/dev/null
for _ in $(seq 1 50); do [ -z "$(squeue -h 2>/dev/null)" ] && break; sleep 0.2; done
pids=$(cat "$1"/pid/* 2>/dev/null)
[ -z "$pids" ] || kill $pids 2>/dev/null
for _ in $(seq 1 50); do
    alive=; for p in $pids; do kill -0 "$p" 2>/dev/null && alive="$alive $p"; done
    [ -z "$alive" ] && exit 0
    sleep 0.1
done
kill -9 $alive 2>/dev/null
exit 0
