#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# usage: emu.sh KERNELS.cu > KERNELS.cpp: launches and shared memory of a launch's size, as emu.h
# has them. Everything else is C++ as it stands.
exec awk -v file="$1" 'BEGIN { RS = "\001"; print "#line 1 \"" file "\"" } {
    text = $0
    out = ""
    while (match(text, /[A-Za-z_][A-Za-z_0-9]*<<</)) {
        name = substr(text, RSTART, RLENGTH - 3)
        out = out substr(text, 1, RSTART - 1) "emu::launch(" name ", "
        text = substr(text, RSTART + RLENGTH)
        end = index(text, ">>>")
        out = out substr(text, 1, end - 1) ")"
        text = substr(text, end + 3)
    }
    out = out text
    gsub(/extern __shared__ uint32_t [a-z_]+\[\];/, "&@", out)
    while (match(out, /extern __shared__ uint32_t [a-z_]+\[\];@/)) {
        name = substr(out, RSTART + 27, RLENGTH - 27 - 4)
        sub(/.*[^a-z_]/, "", name)
        out = substr(out, 1, RSTART - 1) "uint32_t *" name " = (uint32_t *)emu::dynamic_shared();" \
            substr(out, RSTART + RLENGTH)
    }
    printf "%s", out
}' "$1"
