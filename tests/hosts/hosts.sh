#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Several hosts on one machine: network namespaces joined by a switch that lives in one, too, so
# that nothing is added to the machine's own network and no route leaves. Each host has its own host
# name, System V IPC and /dev/shm, by which UCX, MPI and nearep tell machines apart; without them
# they find shared memory and never touch the wire. A sleeping process keeps a host alive between
# commands.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: hosts.sh check                     whether this machine permits it: 0, or 3 and the reason
       hosts.sh up N RATE|none            N hosts, each link limited to RATE both ways (1gbit)
       hosts.sh exec I COMMAND...         on host I; its address is in HOSTS_ADDRESS
       hosts.sh run RANKS COMMAND...      RANKS ranks on each host, with NEP_RANK, NEP_RANKS and
                                          NEP_RENDEZVOUS; ends with the first status that is not 0
       hosts.sh mpirun RANKS COMMAND...   the same by Open MPI's mpirun on host 0: TCP between hosts,
                                          shared memory inside; NEP_RENDEZVOUS is set
       hosts.sh counters                  a line for each host: bytes sent, packets dropped to and from
       hosts.sh link I up|down            pulls and plugs the cable of host I
       hosts.sh slow I none|QDISC...      what host I sends is late or lost (a queueing discipline of
                                          tc: netem delay 5ms loss 1%), until none
       hosts.sh down                      removes everything, running commands included

environment: HOSTS_GROUP  the name of the group, so that several can be up at once (nep)
             MTU        of all links (9000)
TEXT
}

group=${HOSTS_GROUP:-nep}
state=/run/nearep-hosts-$group
switch=$group-sw

address() { echo "198.18.7.$(($1 + 1))"; } # 198.18.0.0/15 is the range for benchmarks

check() {
    if [ "$(id -u)" -ne 0 ]; then
        echo "emulated hosts need root: network namespaces are not permitted to user $(id -un)"
        return 3
    fi
    local tool
    for tool in ip tc nsenter unshare; do
        if ! command -v "$tool" > /dev/null; then
            echo "emulated hosts need $tool (packages iproute2 and util-linux)"
            return 3
        fi
    done
    local why
    if ! why=$(unshare -n -i -u -m true 2>&1); then
        echo "emulated hosts are not permitted here: $why"
        return 3
    fi
    if ! why=$(ip netns add "$group-try" 2>&1 && ip -n "$group-try" link add try0 type veth 2>&1); then
        ip netns del "$group-try" 2> /dev/null || true
        echo "emulated hosts are not possible here: $why"
        return 3
    fi
    ip netns del "$group-try"
}

up() {
    local num=$1 rate=$2 mtu=${MTU:-9000} i queue=()
    down
    mkdir -p "$state"
    ip netns add "$switch"
    ip -n "$switch" link set lo up
    ip -n "$switch" link add br0 type bridge
    ip -n "$switch" link set br0 up
    for ((i = 0; i < num; i++)); do
        local host=$group-h$i
        ip netns add "$host"
        ip -n "$host" link set lo up
        ip link add name eth0 netns "$host" mtu "$mtu" type veth \
            peer name "p$i" mtu "$mtu" netns "$switch"
        ip -n "$switch" link set "p$i" mtu "$mtu" master br0 up
        ip -n "$host" addr add "$(address "$i")/24" dev eth0
        ip -n "$host" link set eth0 up
        queue=(pfifo limit 10000) # counts
        if [ "$rate" != none ]; then
            queue=(tbf rate "$rate" burst 256kb latency 20ms)
        fi
        ip netns exec "$host" tc qdisc add dev eth0 root "${queue[@]}"
        ip netns exec "$switch" tc qdisc add dev "p$i" root "${queue[@]}"
        # shellcheck disable=SC2016 # expanded on the host
        HOSTS_NAME=$host setsid ip netns exec "$host" unshare -u -i -m sh -c \
            'hostname "$HOSTS_NAME" && mount -t tmpfs -o size=8g tmpfs /dev/shm &&
             echo $$ > "$1.new" && mv "$1.new" "$1" && exec sleep infinity' \
            sh "$state/$i" < /dev/null > /dev/null 2>&1 &
    done
    for ((i = 0; i < num; i++)); do
        local tries=0
        while [ ! -s "$state/$i" ]; do
            sleep 0.02
            if [ $((tries += 1)) -gt 500 ]; then
                echo "hosts.sh: host $i did not start" >&2
                return 1
            fi
        done
    done
    echo "$num" > "$state/num"
    printf '%s\n' "${queue[@]}" > "$state/queue"
}

slow() { # I none|QDISC...
    local i=$1 queue=()
    shift
    if [ "$1" = none ]; then
        mapfile -t queue < "$state/queue"
    else
        queue=("$@")
    fi
    ip netns exec "$group-h$i" tc qdisc replace dev eth0 root "${queue[@]}"
}

num_hosts() {
    cat "$state/num" 2> /dev/null || { echo "hosts.sh: no hosts are up" >&2; return 1; }
}

on_host() { # I COMMAND...
    local i=$1 pid
    shift
    pid=$(cat "$state/$i") || { echo "hosts.sh: there is no host $i" >&2; return 2; }
    HOSTS_ADDRESS=$(address "$i") exec nsenter --wd="$PWD" -t "$pid" -n -u -i -m -- "$@"
}

run() { # RANKS COMMAND...
    local ranks=$1 num i status=0
    shift
    num=$(num_hosts)
    local port=$((20000 + RANDOM % 20000)) pids=()
    for ((i = 0; i < num * ranks; i++)); do
        NEP_RANK=$i NEP_RANKS=$((num * ranks)) NEP_RENDEZVOUS=$(address 0):$port \
            on_host $((i / ranks)) "$@" &
        pids+=($!)
    done
    for i in "${!pids[@]}"; do
        ended=0
        wait "${pids[$i]}" || ended=$?
        [ $status -ne 0 ] || status=$ended # the first that failed
    done
    return "$status"
}

# How mpirun starts its daemon on another host: AGENT [OPTIONS] nep-hI COMMAND...
remote_shell() {
    while [ "${1#-}" != "$1" ]; do
        [ "$1" != -l ] || shift
        shift
    done
    local i=${1##*-h}
    shift
    on_host "$i" sh -c "$*"
}

mpi() { # RANKS COMMAND...
    local ranks=$1 num i list=''
    shift
    num=$(num_hosts)
    for ((i = 0; i < num; i++)); do
        list+=,$group-h$i:$ranks
    done
    local self
    self=$(readlink -f "$0")
    NEP_RENDEZVOUS=$(address 0):$((20000 + RANDOM % 20000)) HOSTS_GROUP=$group \
        OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 \
        on_host 0 mpirun --mca plm_rsh_agent "$self rsh" --mca plm_rsh_no_tree_spawn 1 \
        --mca oob_tcp_if_include eth0 --mca pml ob1 --mca btl self,vader,tcp \
        --mca btl_tcp_if_include eth0 --mca mpi_yield_when_idle 1 --oversubscribe --bind-to none \
        -x NEP_RENDEZVOUS -x NEP_TIMEOUT -x HOSTS_GROUP -host "${list#,}" -n $((num * ranks)) \
        --map-by "ppr:$ranks:node" "$@"
}

# The queueing discipline counts each packet with its headers; the interface counts a large send that
# is cut into packets later as one. Dropped: on the host's way out and on the switch's way to it.
counters() {
    local num i text=''
    num=$(num_hosts)
    for ((i = 0; i < num; i++)); do
        text+=$({
            ip netns exec "$group-h$i" tc -s qdisc show dev eth0 root
            ip netns exec "$switch" tc -s qdisc show dev "p$i" root
        } | awk '/Sent/ { if (!lines++) sent = $2; sub(",", "", $7); dropped += $7 }
                 END { print sent, dropped }')$'\n'
    done
    printf '%s' "$text"
}

down() {
    local name pid
    for name in $(ip netns list 2> /dev/null | awk '{ print $1 }' | grep -E "^$group-(h[0-9]+|sw)\$"); do
        # What still runs there was started by exec or run: it goes with its host.
        for pid in $(ip netns pids "$name" 2> /dev/null); do
            kill -KILL "$pid" 2> /dev/null || true
        done
        ip netns del "$name"
    done
    rm -rf "$state"
}

case ${1:-} in
check) check ;;
up)
    [ $# -eq 3 ] || { usage >&2; exit 2; }
    trap '[ $? -eq 0 ] || down' EXIT # half a group is no use to anyone
    up "$2" "$3"
    ;;
exec) [ $# -ge 3 ] || { usage >&2; exit 2; }; shift; on_host "$@" ;;
run) [ $# -ge 3 ] || { usage >&2; exit 2; }; shift; run "$@" ;;
mpirun) [ $# -ge 3 ] || { usage >&2; exit 2; }; shift; mpi "$@" ;;
rsh) shift; remote_shell "$@" ;;
counters) counters ;;
link) [ $# -eq 3 ] || { usage >&2; exit 2; }; ip -n "$group-h$2" link set eth0 "$3" ;;
slow) [ $# -ge 3 ] || { usage >&2; exit 2; }; shift; slow "$@" ;;
down) down ;;
--help | -h) usage ;;
*) usage >&2; exit 2 ;;
esac
