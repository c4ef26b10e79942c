"""What a disk's boot loader would start, from configurations as distributions write them."""

import pytest

from ringzero.images.bootloader import Entry, entry_of_grub, entry_of_kernels, newest_entry

DEBIAN = """
set default="0"
function load_video {
  insmod all_video
}
menuentry 'Debian GNU/Linux' --class debian $menuentry_id_option 'gnulinux-simple-1' {
\tsearch --no-floppy --fs-uuid --set=root 3c52ed65
\techo\t'Loading Linux 6.1.0-28-cloud-amd64 ...'
\tlinux\t/boot/vmlinuz-6.1.0-28-cloud-amd64 root=PARTUUID=ef21 ro console=tty0 console=ttyS0 earlyprintk=ttyS0 quiet
\tinitrd\t/boot/initrd.img-6.1.0-28-cloud-amd64
}
submenu 'Advanced options' {
\tmenuentry 'Recovery' {
\t\tlinux\t/boot/vmlinuz-6.1.0-27-cloud-amd64 root=PARTUUID=ef21 ro single
\t\tinitrd\t/boot/initrd.img-6.1.0-27-cloud-amd64
\t}
}
"""
UBUNTU = """
menuentry 'Ubuntu' --class ubuntu {
    if [ "${initrdfail}" = 1 ]; then
      linux  /vmlinuz-5.15.0-1 root=LABEL=cloudimg-rootfs ro "name=with space" $vt_handoff
      initrd /microcode.img /initrd.img-5.15.0-1
    else
      linux  /vmlinuz-5.15.0-1 root=PARTUUID=77 ro panic=-1
    fi
}
"""
FEDORA = """title Fedora Linux 40
version {version}
linux /vmlinuz-{version}
initrd /initramfs-{version}.img $tuned_initrd
options root=UUID=5 ro rootflags=subvol=root $kernelopts console=hvc0
"""


def test_debians_first_entry_without_its_consoles() -> None:
    entry = entry_of_grub(DEBIAN)
    assert entry is not None
    assert (entry.kernel, entry.initrds) == (
        "/boot/vmlinuz-6.1.0-28-cloud-amd64",
        ("/boot/initrd.img-6.1.0-28-cloud-amd64",),
    )
    assert entry.command_line == "root=PARTUUID=ef21 ro quiet"
    assert entry.has_root


def test_the_first_of_several_ways_with_all_its_archives_and_no_variables() -> None:
    entry = entry_of_grub(UBUNTU)
    assert entry is not None
    assert entry.initrds == ("/microcode.img", "/initrd.img-5.15.0-1")
    assert entry.words == ("root=LABEL=cloudimg-rootfs", "ro", "name=with space")


def test_the_newest_entry_that_is_no_rescue() -> None:
    versions = ("6.8.5-301", "6.10.2-200", "0-rescue-a1b2")
    entry = newest_entry(FEDORA.format(version=version) for version in versions)
    assert entry is not None
    assert (entry.kernel, entry.initrds) == ("/vmlinuz-6.10.2-200", ("/initramfs-6.10.2-200.img",))
    assert entry.command_line == "root=UUID=5 ro rootflags=subvol=root"


def test_the_newest_kernel_where_nothing_else_is_said() -> None:
    names = ["vmlinuz-6.9.1", "vmlinuz-6.12.3", "initrd.img-6.9.1", "initramfs-6.12.3.img", "config-6.13"]
    assert entry_of_kernels("/boot", names) == Entry("/boot/vmlinuz-6.12.3", ("/boot/initramfs-6.12.3.img",))
    assert entry_of_kernels("", ["vmlinuz", "initrd.img"]) == Entry("/vmlinuz", ("/initrd.img",))
    assert entry_of_kernels("/boot", ["initrd.img-6.9.1"]) is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "menuentry {",
        "linux",
        "linux\t",
        "initrd /x",
        "linux 'a",
        "blscfg\n",
        "\0\n" * 9,
        "linux $kernel x",
    ],
)
def test_what_is_no_configuration_has_no_entry_or_a_harmless_one(text: str) -> None:
    for entry in (entry_of_grub(text), newest_entry([text])):
        assert entry is None or (entry.kernel.startswith("/") and "$" not in entry.kernel)


def test_a_device_before_a_path_is_left_out() -> None:
    entry = entry_of_grub("linux (hd0,gpt2)/boot/vmlinuz root=/dev/sda2\ninitrd ($root)/boot/initrd.img")
    assert entry == Entry("/boot/vmlinuz", (), ("root=/dev/sda2",))
