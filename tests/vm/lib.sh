# SPDX-License-Identifier: Apache-2.0
# Sourced by the scripts of tests/vm: counts checks and prints one closing line.
num_checks=0
num_failed=0

check() { # check WHAT EXPECTED GOT
    num_checks=$((num_checks + 1))
    if [ "$2" = "$3" ]; then
        echo "ok    $1"
    else
        num_failed=$((num_failed + 1))
        echo "WRONG $1: expected '$2', got '$3'"
    fi
}

qps_left() { # in a guest: connected QPs, once the kernel has taken those of ended processes away
    waited=0
    while left=$(rdma resource show qp 2>/dev/null | grep -c 'type RC') && [ $waited -lt 300 ]; do
        sleep 0.1
        waited=$((waited + 1))
    done
    echo "$left"
}

finish() { # ends the script with the closing line
    echo "$num_checks checks, $num_failed wrong"
    [ "$num_failed" -eq 0 ] && [ "$num_checks" -gt 0 ]
    exit $?
}

vm_or_refusal() { # returns where a guest can be started; else tests that nep-vm says so, and ends
    if missing=$("$here/nep-vm" --check 2>&1); then
        "$here/nep-vm" --build && return
        echo "the guest's image cannot be built"
        exit 1
    fi
    echo "$missing"
    "$here/nep-vm" -- true >/dev/null 2>&1
    check "nep-vm refuses with status 125 and names the packages" 125 $?
    finish
}
