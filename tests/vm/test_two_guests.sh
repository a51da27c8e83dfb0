#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Two guests, two kernels, one wire: the doctor, alone and with its peer, then nep-perf put and ep
# between them. The working directory is the build tree.
set -u
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=tests/vm/lib.sh
. "$here/lib.sh"
vm_or_refusal
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
# The commands of the README for two machines, with what a launcher sets in place of mpirun.
cat >"$out/both" <<TEXT
set -e
rank=\$1 server=\$2
export NEP_VERBS_ACK_TIMEOUT=18 NEP_TIMEOUT=100s
put="$PWD/bin/nep-perf put --transport verbs --size 4096 --iters 100 --depth 4 --verify --write-imm"
[ "\$rank" = 1 ] || server=
$PWD/bin/nep-info --check >/run/doctor
grep rxe_link /run/doctor | head -n 1
\$put \$server
export NEP_RANK=\$rank NEP_RANKS=2 NEP_RENDEZVOUS=10.8.0.1:29600 NEP_INTER=verbs
$PWD/bin/nep-info --check >/run/doctor || { cat /run/doctor; exit 1; }
grep -i 'rank [01]' /run/doctor || cat /run/doctor
$PWD/bin/nep-perf ep --verify --tokens 4 --hidden 256 --experts 16 --top-k 4 --iters 3 --warmup 1
TEXT
guest() { # guest NUMBER
    "$here/nep-vm" -n 0 -s 1 -m 1G -t 170 -L "$out/wire" -i "$1" -- \
        sh "$out/both" $(($1 - 1)) 10.8.0.1
}

guest 1 >"$out/server" 2>&1 &
server=$!
waited=0
while [ ! -S "$out/wire" ] && [ $waited -lt 600 ]; do
    sleep 0.1
    waited=$((waited + 1))
done
guest 2 >"$out/client" 2>&1
check "client guest" 0 $?
wait $server
check "server guest" 0 $?
check "all bytes are right" 1 "$(grep -c 'verified: 262144 bytes of 64 messages, 0 wrong' "$out/client")"
check "the doctor reaches its peer over verbs" 1 "$(grep -c 'peers .*reach rank 0 over verbs' "$out/server")"
check "dispatch and combine between the guests" 1 "$(grep -c 'dispatch and combine, 0 wrong' "$out/server")"
[ "$num_failed" -eq 0 ] || cat "$out/server" "$out/client"
finish
