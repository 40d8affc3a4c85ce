"""What do machines with an emulated RDMA device boot? A kernel and an initrd made from Debian's own packages.

`image.py` makes them, once, in .venvs/rdma.
"""

from __future__ import annotations

import dataclasses
import hashlib
import lzma
import os
import pathlib
import platform
import re
import shutil
import sys

import environment
from environment import CannotMake

HERE = pathlib.Path(__file__).resolve().parent
FOLDER = environment.VENVS / "rdma"
# What is needed of Debian, by the file that shows that it is there.
PACKAGES = {
    "qemu-system-x86": "/usr/bin/qemu-system-x86_64",
    "busybox-static": "/bin/busybox",
    "cpio": "/usr/bin/cpio",
    "kmod": "/sbin/depmod",
    "iproute2": "/sbin/ip",
    "gcc": "/usr/bin/gcc",
    "libibverbs-dev": "/usr/include/infiniband/verbs.h",
    "ibverbs-providers": "/etc/libibverbs.d/rxe.driver",
}
# Disks and networks of a virtual machine, its shared folder and what is laid over it, and RDMA.
MODULES = "virtio_pci virtio_net virtio_console 9pnet_virtio 9p overlay crc32c_generic crc32_generic rdma_rxe ib_uverbs"
# The root of the machine is this machine's, read-only, with a memory file system over it.
INIT = """\
#!/bin/busybox sh
PATH=/bin
/bin/busybox --install -s /bin
mkdir /proc /sys /dev /host /over /guest
mount -t proc proc /proc
mount -t devtmpfs dev /dev
for module in $(cat /modules/in-order); do insmod /modules/$module; done
mount -t 9p -o trans=virtio,version=9p2000.L,ro,msize=512000,cache=loose host /host
mount -t tmpfs over /over
mkdir /over/upper /over/work
mount -t overlay -o lowerdir=/host,upperdir=/over/upper,workdir=/over/work overlay /guest
mount -t proc proc /guest/proc
mount -t sysfs sys /guest/sys
mount -t devtmpfs dev /guest/dev
mkdir -p /guest/dev/shm
mount -t tmpfs shm /guest/dev/shm
mount -t tmpfs run /guest/run
exec chroot /guest $(sed 's/.* -- //' /proc/cmdline)
"""


@dataclasses.dataclass(frozen=True)
class Image:
    """What a machine boots, and what the processes in it preload."""

    kernel: pathlib.Path = FOLDER / "vmlinuz"
    initrd: pathlib.Path = FOLDER / "initrd"
    preload: pathlib.Path = FOLDER / "finite_retries.so"

    def release(self) -> str:
        """The kernel's release."""
        return (FOLDER / "release").read_text()


def image() -> Image:
    """Makes the image unless it is there already. Raises CannotMake with the reason if that is not possible here."""
    if platform.machine() != "x86_64" or not shutil.which("apt-get"):
        raise CannotMake("machines with RDMA are made from Debian's packages for amd64")
    _need_packages()
    recipe = hashlib.sha256(b"".join(file.read_bytes() for file in (HERE / "image.py", HERE / "finite_retries.c")))
    stamp = FOLDER / environment.STAMP
    with environment.locked("rdma"):
        if not stamp.exists() or stamp.read_text() != recipe.hexdigest():
            environment.say("making the kernel and the initrd of machines with RDMA; download: 70 MB, on disk: 20 MB")
            shutil.rmtree(FOLDER, ignore_errors=True)
            FOLDER.mkdir(parents=True)
            _make()
            stamp.write_text(recipe.hexdigest())
    return Image()


def _need_packages() -> None:
    missing = _missing_packages()
    if missing and os.geteuid() == 0:
        environment.say(f"installing Debian packages: {' '.join(missing)}")
        environment.run(["apt-get", "update"])
        install = ["apt-get", "install", "-y", "--no-install-recommends", *missing]
        environment.run(install, DEBIAN_FRONTEND="noninteractive")
        missing = _missing_packages()
    if missing:
        raise CannotMake(f"machines with RDMA need: apt-get install {' '.join(missing)}")


def _missing_packages() -> list[str]:
    return [package for package, file in PACKAGES.items() if not pathlib.Path(file).exists()]


def _make() -> None:
    unpacked = FOLDER / "kernel"
    depends = _run("apt-cache", "depends", "linux-image-amd64")
    package = re.search(r"Depends: (linux-image-\S+)", depends)
    if not package:
        raise CannotMake("apt knows no kernel package, linux-image-amd64")
    _run("apt-get", "download", package[1])
    (downloaded,) = FOLDER.glob("linux-image-*.deb")
    _run("dpkg", "-x", downloaded.name, str(unpacked))
    downloaded.unlink()
    (kernel,) = (unpacked / "boot").glob("vmlinuz-*")
    release = kernel.name.removeprefix("vmlinuz-")
    (FOLDER / "release").write_text(release)
    kernel.rename(FOLDER / "vmlinuz")
    _make_initrd(unpacked, release)
    source = str(HERE / "finite_retries.c")
    _run("gcc", "-shared", "-fPIC", "-o", "finite_retries.so", source, "-Wl,--no-as-needed", "-libverbs")
    shutil.rmtree(unpacked)


def _make_initrd(unpacked: pathlib.Path, release: str) -> None:
    root = FOLDER / "initrd.root"
    (root / "bin").mkdir(parents=True)
    (root / "modules").mkdir()
    shutil.copy("/bin/busybox", root / "bin")
    init = root / "init"
    init.write_text(INIT)
    init.chmod(0o755)
    in_order = []
    for file in _modules_in_order(unpacked, release):
        content = lzma.decompress(file.read_bytes()) if file.suffix == ".xz" else file.read_bytes()
        in_order.append(file.name.removesuffix(".xz"))
        (root / "modules" / in_order[-1]).write_bytes(content)
    (root / "modules" / "in-order").write_text("\n".join(in_order))
    _run("sh", "-c", "cd initrd.root && find . | cpio --quiet -o -H newc > ../initrd")
    shutil.rmtree(root)


def _modules_in_order(unpacked: pathlib.Path, release: str) -> list[pathlib.Path]:
    """Each module after those that it depends on. What is built into the kernel has no file."""
    _run("/sbin/depmod", "-b", str(unpacked), release)
    folder = unpacked / "lib" / "modules" / release
    depends = dict(line.split(":") for line in (folder / "modules.dep").read_text().splitlines())
    by_name = {pathlib.Path(file).name.partition(".")[0].replace("-", "_"): file for file in depends}
    wanted = [by_name[name] for name in MODULES.split() if name in by_name]
    in_order = [file for module in wanted for file in (*reversed(depends[module].split()), module)]
    return [folder / file for file in dict.fromkeys(in_order)]


def _run(*command: str) -> str:
    """Runs a command in the image's folder and gives what it printed; raises CannotMake if it fails."""
    done = environment.run(["env", "-C", str(FOLDER), *command])
    if done.returncode:
        raise CannotMake(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}")
    return done.stdout


if __name__ == "__main__":
    try:
        print(image())
    except CannotMake as why:
        sys.exit(str(why))
