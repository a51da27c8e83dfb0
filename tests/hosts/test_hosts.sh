#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# hosts.sh itself: hosts are told apart as machines are, reach each other by the wire alone, at its
# rate, and nothing is left behind, also after a failure.
. "$(dirname "$0")/lib.sh"

left_behind() {
    ip netns list | grep "^$HOSTS_GROUP-" || true
    ls -d "/run/nearep-hosts-$HOSTS_GROUP" 2> /dev/null || true
}

hosts up 2 1gbit
for what in 'hostname' 'readlink /proc/self/ns/ipc' 'readlink /proc/self/ns/net' \
    'stat -c %d /dev/shm'; do
    one=$(hosts exec 0 sh -c "$what")
    two=$(hosts exec 1 sh -c "$what")
    again=$(hosts exec 0 sh -c "$what")
    [ "$one" != "$two" ] || fail "two hosts have the same $what: $one"
    [ "$one" = "$again" ] || fail "one host has two answers to $what: $one, $again"
done
echo "hosts differ in name, IPC, network and /dev/shm"

hosts exec 1 sh -c 'exit 7' && fail "the status of a command is lost"
[ "$(hosts run 2 sh -c 'echo $NEP_RANK of $NEP_RANKS' | sort | xargs)" = \
    "0 of 4 1 of 4 2 of 4 3 of 4" ] || fail "run numbers ranks in another way"
# shellcheck disable=SC2016 # expanded on the host
hosts run 1 sh -c 'exit $NEP_RANK' && fail "run hides that rank 1 failed"

# What goes over the wire is counted, and only that.
read -r before _ <<< "$(hosts counters)"
hosts exec 0 python3 - "$(hosts exec 1 sh -c 'echo $HOSTS_ADDRESS')" <<'PY'
import socket, sys
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
for _ in range(100):
    udp.sendto(bytes(8000), (sys.argv[1], 9))
PY
read -r after _ <<< "$(hosts counters)"
[ $((after - before)) -ge 800000 ] || fail "100 datagrams of 8000 bytes count as $((after - before))"
[ $((after - before)) -le 860000 ] || fail "100 datagrams of 8000 bytes count as $((after - before))"

"$here/hosts.sh" exec 0 sleep 1000 &
sleeper=$!
is_asleep() { [ "$(cat "/proc/$sleeper/comm")" = sleep ]; }
within 10 is_asleep
hosts down
[ -z "$(left_behind)" ] || fail "down leaves $(left_behind)"
wait $sleeper 2> /dev/null && fail "a command outlives its host"

hosts up 2 no-such-rate 2> /dev/null && fail "a rate that does not exist was taken"
[ -z "$(left_behind)" ] || fail "a failed up leaves $(left_behind)"
echo "hosts come and go without a trace"
