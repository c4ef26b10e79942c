#!/bin/sh
# The last touches on a system that install.sh has installed below $1: what no package and no file of ours says.
set -eu
target=$1

# The serial console is where the machine belongs to who started it: root gets in there without a password. sshd refuses
# empty ones, and a seed that makes a user locks root (usr/lib/ringzero/seed).
sed -i 's/^root:[^:]*:/root::/' "$target/etc/shadow"
# Made at the first boot, so that two machines from one image are not the same machine.
: > "$target/etc/machine-id"
rm -f "$target"/etc/ssh/ssh_host_*_key* "$target/var/lib/systemd/random-seed" "$target/var/lib/dbus/machine-id"
rm -rf "$target"/var/lib/apt/lists/* "$target"/var/cache/apt/* "$target"/var/cache/debconf/*-old "$target"/var/log/*.log \
    "$target"/var/log/apt "$target"/var/lib/dpkg/*-old
# Off while the packages were installed, so that the kernel's own initramfs is the one that is made.
echo update_initramfs=yes > "$target/etc/initramfs-tools/update-initramfs.conf"
ln -sf ../run/systemd/resolve/stub-resolv.conf "$target/etc/resolv.conf"
for unit in systemd-networkd systemd-resolved ssh-host-keys ssh ringzero-seed ringzero-user-data; do
    chroot "$target" systemctl --quiet enable $unit.service
done
