#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Builds the guest's kernel and initial file system in a cache directory: image.sh CACHE
#
# The distribution's own kernel package is downloaded and unpacked, never installed. Its ELF image
# is taken out of the compressed one here, because an emulated CPU unpacks slowly and PVH boots ELF
# directly. The initial file system holds busybox, the modules in load order and guest-init; the
# rest of the guest's files are this machine's, by 9p, so nothing else is copied.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
cache=$1
modules="virtio_pci virtio_console 9pnet_virtio 9p overlay virtio_net veth bridge dummy
         crc32_generic rdma_rxe rdma_ucm sch_netem sch_tbf"

fail() { echo "nep-vm: $*" >&2; exit 125; }

kernel_packages() { # names of the packages that hold the kernel and its modules
    if image=$(apt-cache depends linux-image-amd64 2>/dev/null |
            awk '/Depends: linux-image-[0-9]/ { print $2; exit }') && [ -n "$image" ]; then
        echo "$image"
    elif image=$(apt-cache depends linux-image-generic 2>/dev/null |
            awk '/Depends: linux-image-[0-9]/ { print $2; exit }') && [ -n "$image" ]; then
        version=${image#linux-image-}
        echo "$image linux-modules-$version linux-modules-extra-$version"
    else
        fail "apt knows no kernel package (linux-image-amd64, linux-image-generic): run apt-get update"
    fi
}

unpack_elf() { # unpack_elf VMLINUZ OUT: the ELF inside, or the file as it is where none is found
    for kind in 'xz \xfd7zXZ\x00' 'zstd \x28\xb5\x2f\xfd' 'gzip \x1f\x8b\x08'; do
        magic=${kind#* }
        for at in $(LC_ALL=C grep -obUaP "$magic" "$1" | cut -d: -f1 | head -n 4); do
            case $kind in
                xz*) tail -c +$((at + 1)) "$1" | xz -dc --single-stream 2>/dev/null >"$2" || : ;;
                zstd*) tail -c +$((at + 1)) "$1" | zstd -dc 2>/dev/null >"$2" || : ;;
                gzip*) tail -c +$((at + 1)) "$1" | gzip -dc 2>/dev/null >"$2" || : ;;
            esac
            [ "$(head -c 4 "$2" | tail -c 3)" = ELF ] && return 0
        done
    done
    cp "$1" "$2"
}

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$cache" "$work/kernel"
for package in $(kernel_packages); do
    echo "nep-vm: fetching $package" >&2
    (cd "$work" && apt-get -o APT::Sandbox::User=root download -q "$package" >&2) ||
        fail "apt-get download $package failed"
    dpkg-deb -x "$work/$package"_*.deb "$work/kernel"
done
image=$(echo "$work"/kernel/boot/vmlinuz-*)
version=${image##*/vmlinuz-}
tree=$work/kernel/lib/modules
[ -d "$tree" ] || tree=$work/kernel/usr/lib/modules
base=${tree%/lib/modules}
find "$tree" -name '*.ko.zst' -exec zstd -dq --rm {} + 2>/dev/null || :
find "$tree" -name '*.ko.xz' -exec xz -d {} + 2>/dev/null || :
depmod -b "$base" "$version"

root=$work/root
mkdir -p "$root/bin" "$root/proc" "$root/sys" "$root/dev" "$root/modules" "$root/new"
cp "$(command -v busybox)" "$root/bin/busybox"
for module in $modules; do
    modprobe -n --show-depends -d "$base" -S "$version" "$module" ||
        fail "kernel $version has no module $module"
done | awk '$1 == "insmod" && !seen[$2]++ { print $2 }' >"$work/order"
while read -r file; do
    cp "$file" "$root/modules/"
    basename "$file" >>"$root/modules/order"
done <"$work/order"
install -m 755 "$here/guest-init" "$root/init"
(cd "$root" && find . | cpio -o -H newc --quiet) >"$cache/base.cpio"
unpack_elf "$image" "$cache/kernel"
echo "$version" >"$cache/version"
cksum "$here/image.sh" "$here/guest-init" | awk '{ print $1 }' >"$cache/stamp"
