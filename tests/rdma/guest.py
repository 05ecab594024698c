#!/usr/bin/env python3
"""RDMA where the machine's own kernel has none: Debian's kernel with soft-RoCE, run by QEMU without KVM, in it the
unit tests of the fabric transport over libfabric's verbs.

    guest.py BUILD [SECONDS]     BUILD: a build folder with its unit tests. SECONDS: until the guest is given up

Prints a line for each test: "ok NAME", "FAIL NAME: why" or "skip NAME: why"; what the guest said of it goes before the
line. Exit status 0: all that ran passed; 1: not so; 77: this can't be done here, with a line that says why.

The kernel is kept in FLEXKV_CACHE_DIR (default: flexkv in $XDG_CACHE_HOME or ~/.cache), 20 MB; while it is made 700 MB.
Its package is taken apart, not installed. What the guest does is in the script init beside this file.
"""
import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
MODULES = ["crc32_generic", "crc32c_generic", "veth", "rdma_rxe", "rdma_ucm"]   # and what these need
PROGRAMS = ["qemu-system-x86_64", "busybox", "cpio", "apt-get", "dpkg-deb", "modinfo", "ldd", "ip", "rdma",
            "ibv_rc_pingpong"]
LIBRARIES = ["libfabric.so.1", "librdmacm.so.1"]        # which are loaded at run time
MEMORY_MB = 3000


class Cannot(Exception):
    """There can be no guest here."""


def where(program):
    found = shutil.which(program, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    if not found:
        raise Cannot(f"there is no {program}; tools/install-deps --rdma installs it")
    return found


# ---- the kernel ----

def package_name(update=True):
    out = subprocess.run(["apt-cache", "depends", "linux-image-amd64"], capture_output=True, text=True, timeout=60)
    found = re.search(r"Depends: (linux-image-\d\S*)", out.stdout)
    if not found and update and os.getuid() == 0:       # a machine that never asked for the lists
        subprocess.run(["apt-get", "update", "-q"], capture_output=True, timeout=600)
        return package_name(update=False)
    return found[1] if found else None


def kernel():
    """The folder with vmlinuz, the modules, and "order", in which they are loaded."""
    cache = Path(os.environ.get("FLEXKV_CACHE_DIR") or
                 Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flexkv")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        lock = open(cache / "rdma-kernel.lock", "w")
    except OSError as e:
        raise Cannot(f"can't write to {cache} ({e.strerror}); set FLEXKV_CACHE_DIR") from e
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        name = package_name()
        made = sorted(cache.glob("rdma-linux-image-*/order"), key=lambda p: p.stat().st_mtime)
        folder = cache / f"rdma-{name}" if name else made[-1].parent if made else None
        if not folder:
            raise Cannot("apt knows no linux-image-amd64; run apt-get update")
        wanted = " ".join(MODULES)
        if not (folder / "order").exists() or (folder / "wanted").read_text() != wanted:
            shutil.rmtree(folder, ignore_errors=True)
            with tempfile.TemporaryDirectory(dir=cache, prefix="rdma-") as tmp:
                take_apart(Path(tmp), name)
                (Path(tmp) / "kernel/wanted").write_text(wanted)
                (Path(tmp) / "kernel").rename(folder)
        return folder


def take_apart(tmp, name):
    def step(*args, again=None):
        done = subprocess.run(args, cwd=tmp, capture_output=True, text=True, timeout=900)
        if done.returncode and again and os.getuid() == 0:
            subprocess.run(again, capture_output=True, timeout=600)
            return step(*args)
        if done.returncode:
            raise Cannot(f"{' '.join(map(str, args))} failed: {(done.stderr.strip().splitlines() or ['?'])[-1]}")

    # The lists may be older than what the archive has now.
    step("apt-get", "download", "-q", name, again=["apt-get", "update", "-q"])
    step("dpkg-deb", "-x", next(tmp.glob("*.deb")), "all")
    files = {p.stem.replace("-", "_"): p for p in (tmp / "all/lib/modules").rglob("*.ko")}
    order = []

    def add(module):
        if module in order:
            return
        if module not in files:
            raise Cannot(f"{name} has no module {module}")
        needs = subprocess.run(["modinfo", "-F", "depends", files[module]], capture_output=True, text=True, check=True,
                               timeout=60)
        for need in filter(None, needs.stdout.strip().split(",")):
            add(need.replace("-", "_"))
        order.append(module)

    for module in MODULES:
        add(module)
    (tmp / "kernel").mkdir()
    for module in order:
        shutil.copy(files[module], tmp / "kernel" / f"{module}.ko")
    shutil.copy(next((tmp / "all/boot").glob("vmlinuz-*")), tmp / "kernel/vmlinuz")
    (tmp / "kernel/order").write_text("\n".join(order) + "\n")


# ---- the guest's files ----

def needs_of(file):
    """The shared libraries of a program or a library, with their full names."""
    out = subprocess.run(["ldd", file], capture_output=True, text=True, timeout=60).stdout
    return {Path(p) for p in re.findall(r"(/\S+) \(0x", out)}


def library(name):
    out = subprocess.run(["/sbin/ldconfig", "-p"], capture_output=True, text=True, timeout=60).stdout
    found = re.search(rf"^\s*{re.escape(name)} \(libc6,x86-64.*=> (\S+)", out, re.M)
    if not found:
        raise Cannot(f"there is no {name}; tools/install-deps --rdma installs it")
    return Path(found[1])


def initramfs(folder, build, out):
    """Everything that the guest has: busybox, ip, rdma, ibv_rc_pingpong, the tests, and all their libraries."""
    with tempfile.TemporaryDirectory(prefix="flexkv-rdma-") as tmp:
        root = Path(tmp)
        for d in ("bin", "dev", "proc", "sys", "tmp", "modules", "etc/libibverbs.d"):
            (root / d).mkdir(parents=True)
        programs = {name: Path(where(name)) for name in ("ip", "rdma", "ibv_rc_pingpong")}
        programs["test_transport"] = build / "tests/unit/test_transport"
        busybox = Path(where("busybox"))
        verbs = sorted(Path("/usr/lib/x86_64-linux-gnu/libibverbs").glob("librxe-*.so"))
        if not verbs:
            raise Cannot("libibverbs has no driver for rxe; tools/install-deps --rdma installs it")
        loaded = {library(name) for name in LIBRARIES} | set(verbs)
        for file in set().union(loaded, *(needs_of(f) for f in [*programs.values(), *loaded])):
            at = root / str(file).lstrip("/")
            at.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, at)
        for name, file in programs.items():
            shutil.copy(file, root / "bin" / name)
        shutil.copy(busybox, root / "bin/busybox")
        shutil.copy("/etc/libibverbs.d/rxe.driver", root / "etc/libibverbs.d/")
        for module in folder.glob("*.ko"):
            shutil.copy(module, root / "modules")
        shutil.copy(folder / "order", root / "modules/order")
        shutil.copy(HERE / "init", root / "init")
        (root / "init").chmod(0o755)
        with open(out, "wb") as f:      # not packed: unpacking is what an emulated machine is slow at
            names = "\n".join(str(p.relative_to(root)) for p in sorted(root.rglob("*")))
            subprocess.run(["cpio", "-o", "-H", "newc", "--quiet"], cwd=root, input=names.encode(), stdout=f,
                           check=True, timeout=120)


# ---- the guest ----

def boot(folder, image, seconds):
    """Runs it; its lines, as they come, and at last None if it was given up."""
    args = [where("qemu-system-x86_64"), "-accel", "tcg,thread=multi", "-smp", "2", "-cpu", "max", "-m", str(MEMORY_MB),
            "-kernel", folder / "vmlinuz", "-initrd", image, "-nographic", "-no-reboot", "-nic", "none",
            "-append", "console=ttyS0 quiet panic=-1"]
    qemu = subprocess.Popen(args, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            text=True, errors="replace", start_new_session=True)
    late = False

    def give_up(*_):
        nonlocal late
        late = True
        qemu.kill()

    signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    try:
        for line in qemu.stdout:
            yield line.rstrip()
        qemu.wait()
        if late:
            yield None
    finally:
        signal.alarm(0)
        qemu.kill()
        qemu.wait()


def results(lines, seconds):
    """Prints what the guest found out; how many tests passed and failed."""
    passed, failed, ended = 0, 0, False
    for line in lines:
        if line is None:
            print(f"FAIL guest: given up after {seconds} s", flush=True)
            return passed, failed + 1
        case = re.search(r"@@ (ok|FAIL|skip|end)\b ?(.*)", line)
        if not case:
            if "Booting from ROM" not in line and "SeaBIOS" not in line:
                print("    " + re.sub(r"\x1b\[[?0-9;]*[a-zA-Z]|\x1bc", "", line), flush=True)
        elif case[1] == "end":
            ended = True
        else:
            print(f"{case[1]} {case[2]}", flush=True)
            passed += case[1] == "ok"
            failed += case[1] == "FAIL"
    if not ended:
        print("FAIL guest: it ended before its tests had", flush=True)
    return passed, failed + (not ended)


def main():
    if not 2 <= len(sys.argv) <= 3:
        sys.exit(__doc__)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    build, seconds = Path(sys.argv[1]).resolve(), int(sys.argv[2]) if len(sys.argv) > 2 else 1200
    try:
        if os.uname().machine != "x86_64":
            raise Cannot("it is made for x86-64")
        if not (build / "tests/unit/test_transport").exists():
            raise Cannot(f"{build} has no tests/unit/test_transport; build it first (tools/test gcc)")
        for program in PROGRAMS:
            where(program)
        folder = kernel()
        with tempfile.TemporaryDirectory(prefix="flexkv-rdma-") as tmp:
            image = Path(tmp) / "initramfs"
            initramfs(folder, build, image)
            start = time.monotonic()
            passed, failed = results(boot(folder, image, seconds), seconds)
    except Cannot as e:
        print(f"no guest with RDMA: {e}")
        return 77
    print(f"{passed} passed, {failed} failed in {time.monotonic() - start:.0f} s", flush=True)
    return 1 if failed or not passed else 0


if __name__ == "__main__":
    sys.exit(main())
