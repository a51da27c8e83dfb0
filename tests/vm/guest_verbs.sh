#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Inside the guest: the verbs transport alone: its contract, nep-perf put, every fault that
# Soft-RoCE can have, nep-info. usage: guest_verbs.sh BUILD_BIN
set -u
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=tests/vm/lib.sh
. "$here/lib.sh"
bin=$1
export NEP_VERBS_ACK_TIMEOUT=16 NEP_VERBS_RETRY=3 NEP_TIMEOUT=60s

run() { # run NAME COMMAND...: succeeds; its output is shown where it does not
    name=$1
    shift
    timeout 200 "$@" >/run/run.out 2>&1
    status=$?
    check "$name" 0 $status
    [ $status = 0 ] || tail -n 20 /run/run.out
}

said() { # the sentence that the last run printed
    sed -n 's/^\(verbs: \|Soft-RoCE\)/      &/p' /run/run.out | head -n 1
}

run "contract: 3 processes on 2 nodes" "$bin/verbs_contract" 2 1
run "contract: two paths, pieces of 1 MiB" \
    env NEP_VERBS_PATHS=2 NEP_VERBS_CHUNK=1M "$bin/verbs_contract" 1 1
run "contract: six QPs on two paths, short queues" \
    env NEP_VERBS_PATHS=2 NEP_VERBS_QPS=3 NEP_VERBS_DEPTH=8 "$bin/verbs_contract" 1 1
for mode in "" --write-imm "--paths=2 --qps=2"; do
    # shellcheck disable=SC2086
    run "nep-perf put --bw $mode" "$bin/nep-perf" put --ranks 2 --transport verbs --iters 50 \
        --depth 16 --verify $mode
done
run "nep-perf put --lat" "$bin/nep-perf" put --ranks 2 --transport verbs --lat --iters 200 --verify
run "nep-perf put --lat --write-imm" \
    "$bin/nep-perf" put --ranks 2 --transport verbs --lat --iters 200 --verify --write-imm

for fault in rkey slot owner gone srq cut refused memlock dmabuf; do
    run "fault: $fault" "$bin/verbs_faults" $fault
    said
done
run "registering" "$bin/verbs_faults" registering
sed -n 's/^registering/      &/p' /run/run.out
run "fault: rnr" "$bin/verbs_faults" rnr
tail -n 1 /run/run.out | sed 's/^/      /'
# patient: 100 ms may last for seconds where the machine is busy
run "fault: port" env NEP_VERBS_ACK_TIMEOUT=18 NEP_VERBS_RETRY=6 "$bin/verbs_faults" port
run "fault: path" "$bin/verbs_faults" path
grep -h 'sent again' /run/run.out | sed 's/^/      /'
up() { # up N: cable N is back, and its port says so
    ip link set "p$1" up
    waited=0
    until grep -q ACTIVE "/sys/class/infiniband/rxe$1/ports/1/state" || [ $waited -gt 600 ]; do
        sleep 0.1
        waited=$((waited + 1))
    done
}
up 1
up 2
run "reconnect: the path is back" "$bin/verbs_faults" again
grep -h 'connected again' /run/run.out | sed 's/^/      /'

for fault in back backs; do
    run "revival: $fault" "$bin/verbs_faults" $fault
    grep -h 'live again' /run/run.out | sed 's/^/      /'
done

NEP_TIMEOUT=3s timeout 100 "$bin/nep-perf" put --transport verbs 10.9.0.1 >/run/run.out 2>&1
check "connection refused: no server" 1 $?
grep -h 10.9.0.1 /run/run.out | head -n 1 | sed 's/^/      /'
check "  and named" yes "$(grep -q '10.9.0.1' /run/run.out && echo yes)"
check "no QP is left behind" 0 "$(qps_left)"

# Who uses what: over all ranks at once, or as a file says.
printed() { # printed: the port of each rank's path 0 and 1, in order
    sed -n 's/.*verbs: rank \([0-9]\) path \([0-9]\): \(rxe[0-9]\) port.*/\1.\2=\3/p' /run/run.out |
        sort | tr '\n' ' '
}
run "assignment: two ranks, two paths each" env NEP_LOG=info "$bin/nep-perf" put --ranks 2 \
    --transport verbs --iters 10 --depth 4 --paths 2
check "  no port twice while another is idle" "0.0=rxe0 0.1=rxe1 1.0=rxe2 1.1=rxe3 " "$(printed)"
printf '# local rank, devices\n0 rxe3\n* rxe1:1\n' >/run/devices
run "override file" env NEP_LOG=info NEP_VERBS_DEVICES=/run/devices "$bin/nep-perf" put --ranks 2 \
    --transport verbs --iters 10 --depth 4
check "  decides" 0.0=rxe3 "$(printed | cut -d' ' -f1)"
printf 'rxe3 0\n' >/run/devices
NEP_VERBS_DEVICES=/run/devices timeout 100 "$bin/nep-perf" put --ranks 2 --transport verbs \
    >/run/run.out 2>&1
check "override file with a bad line" 1 $?
check "  and its line is named" yes "$(grep -q '/run/devices line 1 is not' /run/run.out && echo yes)"
env NEP_VERBS_DEVICES=rxe9 timeout 100 "$bin/nep-perf" put --ranks 2 --transport verbs \
    >/run/run.out 2>&1
check "a device that does not exist is refused" 1 $?
check "  and named" yes "$(grep -q 'named in rxe9' /run/run.out && echo yes)"
run "nep-info --check" "$bin/nep-info" --check
grep -E 'rxe0|GID' /run/run.out | head -n 3 | sed 's/^ */      /'
finish
