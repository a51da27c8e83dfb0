# SPDX-License-Identifier: Apache-2.0
# Sourced: nep_need PACKAGE... installs what is missing, on Debian and Ubuntu, as root or with sudo.
# Elsewhere it names the packages and goes on: the build then says what it does not find.

nep_missing() {
    local name
    for name in "$@"; do
        if [ "$(dpkg-query -W -f='${db:Status-Status}' "$name" 2>/dev/null)" != installed ]; then
            echo "$name"
        fi
    done
}

# apt's own lock time-out: another apt may be at work when a machine has just started.
nep_apt() {
    local as=()
    [ "$(id -u)" = 0 ] || as=(sudo)
    "${as[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 -qq "$@" \
        < /dev/null
}

nep_need() {
    local missing
    if ! command -v dpkg-query > /dev/null || ! command -v apt-get > /dev/null; then
        echo "packages: no apt here; make sure that these are installed: $*" >&2
        return 0
    fi
    mapfile -t missing < <(nep_missing "$@")
    [ ${#missing[@]} = 0 ] && return 0
    echo "packages: installing ${missing[*]}"
    if [ "$(id -u)" != 0 ] && ! command -v sudo > /dev/null; then
        echo "packages: not root and no sudo; install them yourself: ${missing[*]}" >&2
        return 1
    fi
    if [ -z "${NEAREP_APT_UPDATED:-}" ]; then
        nep_apt update || echo "packages: apt-get update failed; trying with the lists at hand" >&2
        export NEAREP_APT_UPDATED=1
    fi
    nep_apt install -y --no-install-recommends "${missing[@]}" > /tmp/nearep-apt.$$ 2>&1 || {
        cat /tmp/nearep-apt.$$ >&2
        rm -f /tmp/nearep-apt.$$
        echo "packages: could not install ${missing[*]}" >&2
        return 1
    }
    rm -f /tmp/nearep-apt.$$
}

# nep_need_lists PACKAGE...: apt knows one of these; a machine may come without apt's lists.
nep_need_lists() {
    local name
    command -v apt-cache > /dev/null || return 0
    for name in "$@"; do
        [ -z "$(apt-cache depends "$name" 2>/dev/null)" ] || return 0
    done
    nep_apt update || true
}

# Package lists are text files, one name a line, # starts a comment.
nep_list() {
    sed -e 's/#.*//' -e '/^[[:space:]]*$/d' "$@" 2>/dev/null
}
