#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# The table of docs/performance-placement.md, from the traces in a folder with own/ and external/
# inside. Each row trains on two thirds of the requests without one domain, and scores the rest:
#   scripts/placement-table.sh TRACES [--seeds n] [more options of nep-place compare]
# nep-place is taken from build/bin, or from NEP_PLACE.
set -eu
traces=${1:?usage: scripts/placement-table.sh TRACES [options of nep-place compare]}
shift
tool=${NEP_PLACE:-$(dirname "$0")/../build/bin/nep-place}
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
row() { # trace, domain left out of train, nodes, replicas; then options
    file=$1 domain=$2 nodes=$3 replicas=$4
    shift 4
    "$tool" slice --trace "$traces/$file" --part train --leave-out "$domain" --seed 3 \
        -o "$dir/train.nept" >/dev/null
    "$tool" slice --trace "$traces/$file" --part test --seed 3 -o "$dir/test.nept" >/dev/null
    echo "== $file, $nodes nodes, $replicas % replicas, train without $domain"
    "$tool" compare --train "$dir/train.nept" --test "$dir/test.nept" --nodes "$nodes" \
        --replicas "$replicas" --online "$@"
}
for nodes in 4 8; do
    row own/small256.nept math-word $nodes 12.5 "$@"
    row own/small128.nept math-word $nodes 12.5 "$@"
    row external/dsv2lite.nept summary $nodes 12.5 "$@"
done
row external/gptoss20b.nept gpqa 4 12.5 "$@"
row external/gptoss20b.nept gpqa 8 25 "$@"
row own/small256.nept math-word 4 25 "$@"
row external/gptoss20b.nept gpqa 4 25 "$@"
