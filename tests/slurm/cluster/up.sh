#!/usr/bin/env bash
# up.sh FOLDER PORT: a private Slurm cluster of 4 nodes on this machine, distinguished by port, on loopback only. Needs no
# root; nothing outside the folder is touched. cred_expire=5 makes a requeued job wait 6 seconds instead of 121.
set -euo pipefail
export CLUSTER=$1 SLURM_CONF=$1/slurm.conf; port=$2
source "$(dirname "$0")/slurm_conf.sh"
mkdir -p "$CLUSTER"/{ctld,log,pid}
cd "$CLUSTER"
more="SlurmctldPort=$port
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny"
for i in 1 2 3 4; do
    mkdir -p "spool.n$i" "tmp.n$i"
    more+="
NodeName=n$i NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=$((port + i)) CPUs=4 Sockets=1 CoresPerSocket=4 ThreadsPerCore=1 RealMemory=2000"
done
slurm_conf "$(hostname -s)(127.0.0.1)" "$more" > slurm.conf
echo "CgroupAutomount=no" > cgroup.conf
slurmctld
for i in 1 2 3 4; do slurmd -N "n$i"; done
for _ in $(seq 1 300); do
    idle=$(sinfo -h -r -N -t idle -o %N 2>/dev/null | sort -u | wc -l) || idle=0
    [ "$idle" -eq 4 ] && exit 0
    sleep 0.2
done
echo "the cluster did not come up; see $CLUSTER/log" >&2
exit 1
