#!/bin/sh
# Installs Debian from packages onto an empty disk, as root of a guest of ours: see images/debian_full_build.py.
#
# /dev/vda is the root disk to be, an empty ext4. /dev/vdb, which is mounted on /mnt/pack, has the packages (debs/essential,
# debs/others) and the files that a recipe adds (root/). dpkg's own lines on standard output say how far it is.
set -eu

target=/mnt/target pack=/mnt/pack

mkdir -p $target
mount -t ext4 -o noatime,nobarrier /dev/vda $target

# With these, what packages put into /bin lands in /usr/bin: the layout of every Debian since 12 (its base-files and
# usrmerge expect it to be there before them).
for name in bin sbin lib lib64; do
    mkdir -p $target/usr/$name
    ln -s usr/$name $target/$name
done
# Before the packages: dpkg reads there which files to leave out.
cp -R $pack/root/. $target/
for deb in $pack/debs/essential/*.deb; do
    dpkg-deb -x "$deb" $target
done

mkdir -p $target/mnt/pack
mount -t devtmpfs devtmpfs $target/dev
mkdir -p $target/dev/pts
mount -t devpts devpts $target/dev/pts
mount -t proc proc $target/proc
mount -t sysfs sysfs $target/sys
mount -t tmpfs tmpfs $target/run
mount -o bind $pack $target/mnt/pack
# Nothing is started while it is installed: invoke-rc.d(8).
printf '#!/bin/sh\nexit 101\n' > $target/usr/sbin/policy-rc.d
chmod 755 $target/usr/sbin/policy-rc.d

inside() {
    chroot $target /usr/bin/env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8 \
        DEBIAN_FRONTEND=noninteractive DEBCONF_NONINTERACTIVE_SEEN=true "$@"
}
# The disk is made anew when the machine stops halfway: dpkg need not wait for it. Names may be patterns.
package() { inside sh -c "dpkg --force-depends --force-confold --force-unsafe-io $*"; }

# base-passwd and base-files first: the others name users, and expect the directories.
essential=/mnt/pack/debs/essential
: > $target/var/lib/dpkg/status
package --install "$essential/base-passwd_*.deb"
package --install "$essential/base-files_*.deb"
package --install "$essential/*.deb"
package --unpack "/mnt/pack/debs/others/*.deb"
package --configure --pending
sh $pack/finish.sh $target
rm -f $target/usr/sbin/policy-rc.d
for name in mnt/pack run sys proc dev/pts dev; do
    umount $target/$name
done
rmdir $target/mnt/pack
inside /sbin/fstrim / 2>/dev/null || true
umount $target
sync
