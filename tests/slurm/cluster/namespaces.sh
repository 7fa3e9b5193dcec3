#!/usr/bin/env bash
# namespaces.sh FOLDER up|down|run COMMAND…: the same cluster with every node in namespaces of its own (network, host
# name, processes, /dev/shm), as on real machines: n1's 127.0.0.1 is not n2's. Needs root. The addresses, 127.77.0.0/24,
# are on a bridge that exists inside a private network namespace; the host's own network is left as it is.
set -euo pipefail
self=$(readlink -f "$0")
export CLUSTER=$1 SLURM_CONF=$1/slurm.conf NET=127.77.0
source "$(dirname "$self")/slurm_conf.sh"

child_of() { # the process inside the namespaces that `unshare` (process $1) has made
    local child
    while child=$(cat /proc/"$1"/task/"$1"/children 2>/dev/null); [ -z "$child" ] && kill -0 "$1"; do sleep 0.02; done
    echo "${child%% *}"
}
own_loopback() { # 127.77.0.0/24 becomes an ordinary network here; 127.0.0.1 stays this node's own
    sysctl -qw net.ipv4.conf.all.route_localnet=1
    ip link set lo up; ip addr flush dev lo; ip addr add 127.0.0.1/32 dev lo
}
case $2 in
up)
    mkdir -p "$CLUSTER"/{ctld,log,pid}
    more=; echo "127.0.0.1 localhost
$NET.254 login" > "$CLUSTER/hosts"
    for i in 1 2 3 4; do
        echo "$NET.$i n$i" >> "$CLUSTER/hosts"
        mkdir -p "$CLUSTER/spool.n$i" "$CLUSTER/tmp.n$i"
        more+="
NodeName=n$i NodeHostname=n$i NodeAddr=$NET.$i CPUs=4 Sockets=1 CoresPerSocket=4 ThreadsPerCore=1 RealMemory=2000"
    done
    slurm_conf "login($NET.254)" "$more" > "$SLURM_CONF"
    echo "CgroupAutomount=no" > "$CLUSTER/cgroup.conf"
    setsid unshare -m -n -u -p -f --mount-proc --kill-child "$self" "$CLUSTER" _hub > "$CLUSTER/log/hub" 2>&1 < /dev/null &
    echo $! > "$CLUSTER/pid/hub"
    for _ in $(seq 1 300); do
        idle=$("$self" "$CLUSTER" run sinfo -h -r -N -t idle -o %N 2>/dev/null | sort -u | wc -l) || idle=0
        [ "$idle" -eq 4 ] && exit 0
        sleep 0.2
    done
    echo "the cluster did not come up; see $CLUSTER/log" >&2
    exit 1 ;;
_hub)
    hostname login; mount --bind "$CLUSTER/hosts" /etc/hosts; own_loopback
    ip link add br0 type bridge forward_delay 0; ip link set br0 up; ip addr add $NET.254/24 dev br0 scope global
    slurmctld
    for i in 1 2 3 4; do
        unshare -m -n -u -i -p -f --mount-proc --kill-child "$self" "$CLUSTER" _node "n$i" > "$CLUSTER/log/n$i" 2>&1 < /dev/null &
        node=$(child_of $!)
        ip link add "v$i" type veth peer name eth0 netns "$node"; ip link set "v$i" master br0 up
    done
    while :; do sleep 1000 & wait $! || true; done ;;
_node)
    hostname "$3"; mount --bind "$CLUSTER/hosts" /etc/hosts; mount -t tmpfs tmpfs /dev/shm
    # MPICH takes machines with the same boot id for one, and then looks for shared memory that is not there.
    cat /proc/sys/kernel/random/uuid > "$CLUSTER/boot_id.$3"
    mount --bind "$CLUSTER/boot_id.$3" /proc/sys/kernel/random/boot_id
    own_loopback
    until ip link show eth0 > /dev/null 2>&1; do sleep 0.02; done
    ip link set eth0 up; ip addr add "$NET.${3#n}/24" dev eth0 scope global
    slurmd -D -N "$3" & wait $! ;;
run)
    shift 2
    inside=$(child_of "$(cat "$CLUSTER/pid/hub")")
    exec nsenter -t "$inside" -m -n -u -p --wd="$PWD" -- "$@" ;;
down)
    hub=$(cat "$CLUSTER/pid/hub"); kill -9 "$hub"
    for _ in $(seq 1 50); do kill -0 "$hub" 2>/dev/null || break; sleep 0.1; done ;;
esac
