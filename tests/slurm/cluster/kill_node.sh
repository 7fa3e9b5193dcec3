#!/usr/bin/env bash
# kill_node.sh FOLDER NODE: as if the node lost power: kill -9 its slurmd, its job steps and all their processes.
# A step's daemon is known by the socket it listens on in the node's spool folder; the rest are its descendants.
set -uo pipefail
daemon=$(cat "$1/pid/slurmd.$2")
steps=$(ss -Hxlp | grep -F "$1/spool.$2/" | grep -o 'pid=[0-9]*' | cut -d= -f2 | sort -u)
family() { local p; for p in "$@"; do echo "$p"; family $(cat /proc/"$p"/task/*/children 2>/dev/null); done; }
kill -9 $(family $daemon $steps | sort -un)
rm -f "$1/pid/slurmd.$2"
