"""Reads a Dockerfile as far as ours goes; what it does not know is an error. For test_deploy.py and image.py."""
import json
import re

KNOWN = {"FROM", "ARG", "ENV", "WORKDIR", "COPY", "RUN", "USER", "VOLUME", "HEALTHCHECK", "STOPSIGNAL", "ENTRYPOINT", "CMD"}


def steps(text):
    """[(instruction, rest)], with lines joined and comments left out."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n", " ", "\n".join(lines))
    out = []
    for line in filter(str.strip, joined.splitlines()):
        word, _, rest = line.strip().partition(" ")
        if word not in KNOWN:
            raise ValueError(f"unknown instruction: {line}")
        out.append((word, rest.strip()))
    return out


def stages(text):
    """{name: (base, [(instruction, rest)])} in order."""
    out, current = {}, None
    for word, rest in steps(text):
        if word == "FROM":
            base, name = re.fullmatch(r"(\S+) AS (\S+)", rest).groups()
            out[name] = (base, current := [])
        elif current is None:
            raise ValueError(f"{word} before FROM")
        else:
            current.append((word, rest))
    return out


def copy(rest):
    """(stage or None, sources, destination)"""
    words = rest.split()
    stage = words.pop(0).removeprefix("--from=") if words[0].startswith("--from=") else None
    if words[0].startswith("--"):
        raise ValueError(f"unknown option: COPY {rest}")
    return stage, words[:-1], words[-1]


def environment(rest):
    return dict(re.findall(r"(\w+)=(\S+)", rest))


def command(rest):
    """The words of an exec form."""
    return json.loads(rest[rest.index("["):])


class Ignore:
    """A .dockerignore file: the last pattern that fits counts."""

    def __init__(self, text):
        self.patterns = []
        for line in filter(None, (s.split("#")[0].strip() for s in text.splitlines())):
            keep = line.startswith("!")
            pattern = re.escape(line.lstrip("!")).replace(r"\*\*/", "(?:.*/)?").replace(r"\*", "[^/]*")
            self.patterns.append((re.compile(pattern + "(?:/.*)?"), keep))

    def keeps(self, path):
        keep = True
        for pattern, wanted in self.patterns:
            if pattern.fullmatch(path):
                keep = wanted
        return keep
