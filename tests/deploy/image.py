#!/usr/bin/env python3
"""Goes through deploy/docker/Dockerfile without Docker: its stages become folders, its RUN steps run there by chroot, from what
debootstrap makes of Debian 12. At last its daemon is started as the image would start it, and asked for its health.

    image.py FOLDER      where it works, 2 GB; FOLDER/base, if it is there, is taken for debian:12-slim

As root, with debootstrap and network; takes some minutes, so it is not part of `make test`. What it can't show: that Docker
makes an image of it, layers, namespaces, its seccomp profile.
"""
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import dockerfile  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
# So that apt and pip reach what they reach outside. Files are copied: packages' scripts write to /etc, and nothing of the
# machine's own may be written to from in there.
COPIED = {"/etc/resolv.conf": "/etc/resolv.conf", "/etc/pip.conf": "/etc/pip.conf",
          "/etc/ssl/certs/ca-certificates.crt": "/etc/outside-ca.crt"}
READ_ONLY = ["/opt/wheels", "/opt/pypi", "/opt/pypi-more"]      # where pip.conf may point to
DEVICES = ["null", "zero", "full", "random", "urandom", "tty"]
PASSED_ON = {v: os.environ[v] for v in os.environ if v.upper().startswith("PIP_") or v.lower().endswith("_proxy")}
PASSED_ON |= {"PIP_CERT": "/etc/outside-ca.crt"} if os.path.exists("/etc/ssl/certs/ca-certificates.crt") else {}


def say(text):
    print(text, flush=True)


def in_chroot(root, command, env, cwd, user="0:0"):
    """The words of a command that runs in a chroot, with mounts that go with it."""
    script = f"mount -t proc proc {root}/proc; mount -t tmpfs tmpfs {root}/tmp; mount -t tmpfs -o mode=755 tmpfs {root}/dev; "
    for device in DEVICES:
        script += f"touch {root}/dev/{device}; mount --bind /dev/{device} {root}/dev/{device}; "
    script += f"ln -s /proc/self/fd {root}/dev/fd; mkdir {root}/dev/shm; mount -t tmpfs tmpfs {root}/dev/shm; "
    for path in filter(os.path.exists, READ_ONLY):
        script += f"mkdir -p {root}{path}; mount --bind {path} {root}{path}; mount -o remount,bind,ro {root}{path}; "
    script += f'exec chroot --userspec={user} {root} sh -c \'cd "$1" && shift && exec "$@"\' sh "$@"'
    return ["unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child", "sh", "-ec", script, "sh",
            cwd, "env", "-i", *(f"{k}={v}" for k, v in env.items()), *command]


class Stage:
    def __init__(self, name, folder):
        self.name, self.root = name, folder / name
        self.env = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
        self.args, self.cwd, self.user, self.last = {}, "/", "0:0", {}

    def expand(self, text):
        for name, value in {**self.env, **self.args}.items():
            text = text.replace(f"${name}", value)
        return text

    def step(self, word, rest, stages):
        if word == "ARG":
            name, _, value = rest.partition("=")
            self.args[name] = value
        elif word == "ENV":
            self.env.update(dockerfile.environment(self.expand(rest)))
        elif word == "WORKDIR":
            self.cwd = rest
            (self.root / rest.lstrip("/")).mkdir(parents=True, exist_ok=True)
        elif word == "USER":
            self.user = self.expand(rest)
        elif word == "COPY":
            self.copy(*dockerfile.copy(rest), stages)
        elif word == "RUN":
            env = {**self.env, **self.args, **PASSED_ON}
            subprocess.run(in_chroot(self.root, ["sh", "-c", rest], env, self.cwd, self.user), check=True, timeout=1800)
        else:
            self.last[word] = rest

    def copy(self, stage, sources, destination, stages):
        to = self.root / os.path.join(self.cwd, destination).lstrip("/")
        for source in sources:
            at = stages[stage].root / source.lstrip("/") if stage else ROOT / source
            if stage is None and at.is_dir():
                context(at, to)
            elif at.is_dir():
                shutil.copytree(at, to, symlinks=True, dirs_exist_ok=True)
            else:
                to.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(at, to)


def context(at, to):
    """What Docker would be given of the checkout."""
    ignore = dockerfile.Ignore((ROOT / "deploy/docker/Dockerfile.dockerignore").read_text())
    for path in subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=at, capture_output=True, text=True,
                               check=True, timeout=60).stdout.splitlines():
        if ignore.keeps(path) and (at / path).is_file():
            (to / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(at / path, to / path)


def base(folder):
    made = folder / "base"
    if not made.exists():
        say("debootstrap")
        subprocess.run(["debootstrap", "--variant=minbase", "bookworm", f"{made}.tmp"], check=True, timeout=900,
                       stdout=subprocess.DEVNULL)
        made.with_name("base.tmp").rename(made)
    return made


def healthy(stage):
    """Starts the daemon as the image says, and asks for its health as the image says."""
    env = {**stage.env, "FLEXKV_CPU_CACHE_GB": "64M"}
    words = dockerfile.command(stage.last["ENTRYPOINT"]) + dockerfile.command(stage.last["CMD"])
    check = dockerfile.command(stage.last["HEALTHCHECK"])
    daemon = subprocess.Popen(in_chroot(stage.root, words, env, stage.cwd, stage.user))
    try:
        end = time.monotonic() + 20
        while time.monotonic() < end and daemon.poll() is None:
            asked = subprocess.run(in_chroot(stage.root, check, env, stage.cwd, stage.user), capture_output=True, text=True,
                                   timeout=10)
            if asked.returncode == 0:
                say(asked.stdout)
                return True
            time.sleep(0.2)
        return False
    finally:
        daemon.kill()           # unshare passes no other signal on; --kill-child ends the daemon with it
        daemon.wait(30)


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    folder, stages = Path(sys.argv[1]).resolve(), {}
    folder.mkdir(parents=True, exist_ok=True)
    for name, (image, steps) in dockerfile.stages((ROOT / "deploy/docker/Dockerfile").read_text()).items():
        stages[name] = stage = Stage(name, folder)
        shutil.rmtree(stage.root, ignore_errors=True)
        if image == "scratch":
            stage.root.mkdir()
        elif image == "debian:12-slim":
            subprocess.run(["cp", "-a", base(folder), stage.root], check=True, timeout=300)
            for here, there in COPIED.items():
                if os.path.exists(here):
                    (stage.root / there.lstrip("/")).unlink(missing_ok=True)
                    shutil.copy(here, stage.root / there.lstrip("/"))
        else:
            sys.exit(f"image.py: no base {image}")
        for word, rest in steps:
            say(f"[{name}] {word} {rest}")
            stage.step(word, rest, stages)
    wheels = [p.name for p in stages["wheel"].root.iterdir()]
    say(f"wheel: {' '.join(wheels)}")
    ok = healthy(stages["node"]) and any(w.endswith(".whl") for w in wheels)
    say("all steps of the Dockerfile ran, and the daemon is healthy" if ok else "FAILED: the daemon is not healthy")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
