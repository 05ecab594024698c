#!/usr/bin/env python3
"""NVIDIA Dynamo with FlexKV on this machine's CPU: starts it, sends the request of the README, shows
what the KV router says about a prompt that is new, that the engine has, that only FlexKV's CPU tier
has, and that only its SSD has; stops it and leaves nothing behind. Called by start.sh.
"""
import argparse
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from deployment import BLOCK, MODEL, Answer, Deployment, Options, Trouble, ended_by_signals, marked

PROMPT = 10 * BLOCK + 5         # tokens: ten blocks and a bit
FILLER = 30 * BLOCK + 5
ENGINE_BLOCKS = 48              # so few that two fillers push a prompt out of the engine
CPU_BLOCKS = 96                 # and five out of FlexKV's CPU tier
BLOCK_KIB = 256


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, prog="start.sh")
    parser.add_argument("--form", choices=("etcd", "file"), default="etcd",
                        help="what workers and router meet by: nats-server and etcd, or files and ZMQ")
    parser.add_argument("--planes", choices=("", "nats"), default="",
                        help="nats: requests and events go by NATS (with --form etcd)")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--own-connector", action="store_true",
                        help="FlexKV's own connector class in place of the one that comes with vLLM")
    parser.add_argument("--keep", action="store_true",
                        help="goes on after that, until Ctrl-C or SIGTERM")
    parser.add_argument("--logs", type=Path, help="a folder to copy all logs to")
    return parser.parse_args()


class Demo:
    def __init__(self, d: Deployment) -> None:
        self.d = d
        self.random = random.Random(2026)

    def tokens(self, count: int) -> list[int]:
        return [self.random.randrange(300, 2000) for _ in range(count)]

    def settle(self) -> None:
        """Engines publish with their next step, and the router hears of it a moment later."""
        time.sleep(0.5)
        for worker in self.numbers:
            self.d.complete(self.tokens(8), 1, worker)
        time.sleep(0.7)

    def ask(self, what: str, prompt: list[int]) -> Answer:
        answer = self.d.complete(prompt)
        host, disk = (self.d.routed() or [(0, 0)])[-1]
        print(f"  {what:44} worker {self.numbers.index(answer.worker)}   hit rate {answer.hit_rate:.3f}   "
              f"CPU {host:2}  disk {disk:2}   reused {answer.cached_tokens:3} tokens")
        return answer

    def run(self) -> bool:
        self.numbers = [self.d.instance(n) for n in range(len(self.d.workers))]
        self.curl()
        print(f"\nThe router's view of a prompt of {PROMPT} tokens ({PROMPT // BLOCK} blocks and a bit). Hit rate: what the\n"
              "chosen worker is given credit for; a block in CPU memory counts 0.75, one on disk 0.25.\n")
        prompt = self.tokens(PROMPT)
        answers = [self.ask("new", prompt)]
        home = answers[0].worker
        self.settle()
        answers.append(self.ask("again", prompt))
        self.push_out(home, 2)
        answers.append(self.ask("pushed out of the engine", prompt))
        self.push_out(home, 5)
        answers.append(self.ask("pushed out of the engine and the CPU tier", prompt))
        return self.verdict(answers)

    def push_out(self, worker: int, fillers: int) -> None:
        for _ in range(fillers):
            self.d.complete(self.tokens(FILLER), 1, worker)
        self.settle()

    def curl(self) -> None:
        body = (f'{{"model": "{MODEL}", "messages": [{{"role": "user", "content": "Tell me a joke."}}], '
                '"stream": false, "max_tokens": 30}')
        url = f"localhost:{self.d.http}/v1/chat/completions"
        print(f"$ curl {url} -H 'Content-Type: application/json' -d '{body}'")
        if shutil.which("curl"):
            done = subprocess.run(["curl", "-sS", "--max-time", "60", url, "-H",
                                   "Content-Type: application/json", "-d", body],
                                  capture_output=True, text=True, timeout=90)
            if done.returncode or '"choices"' not in done.stdout:
                raise Trouble(f"curl: status {done.returncode}: {done.stdout}{done.stderr}")
            print(done.stdout)
        else:
            print(self.d.chat("Tell me a joke.").text)

    def verdict(self, answers: list[Answer]) -> bool:
        same_worker = len({a.worker for a in answers}) == 1
        same_text = len({a.text for a in answers}) == 1
        credit = all(a.hit_rate > 0 and a.cached_tokens == PROMPT // BLOCK * BLOCK for a in answers[1:])
        print(f"\nsame worker each time: {_yes(same_worker)}; same tokens: {_yes(same_text)}; "
              f"credit in every tier, and blocks reused: {_yes(credit)}")
        return same_worker and same_text and credit


def _yes(value: bool) -> str:
    return "yes" if value else "NO"


def serve(args: argparse.Namespace, folder: Path) -> bool:
    options = Options(form=args.form, planes=args.planes, workers=args.workers,
                      own_connectors=range(args.workers if args.own_connector else 0), engine_blocks=ENGINE_BLOCKS,
                      max_length=32 * BLOCK, cpu_cache=f"{CPU_BLOCKS * BLOCK_KIB // 1024}M", ssd_cache="256M")
    print(f"starting the front end and {args.workers} workers ({args.form}); each engine takes half a minute of CPU")
    began = time.monotonic()
    with Deployment(folder, options) as d:
        print(f"ready after {time.monotonic() - began:.0f} s\n")
        try:
            good = Demo(d).run()
            if args.keep:
                print(f"\nhttp://localhost:{d.http} goes on until Ctrl-C; logs are in {folder}")
                while True:
                    d.wait("", 3600, lambda: False, 1)
        finally:
            began = time.monotonic()
            if args.logs:
                args.logs.mkdir(parents=True, exist_ok=True)
                for log in folder.glob("*.log"):
                    shutil.copy(log, args.logs)
    print(f"stopped in {time.monotonic() - began:.0f} s; processes left: {len(marked(folder))}")
    return good


def main() -> int:
    args = arguments()
    # Short: sockets in it have at most 107 bytes.
    folder = Path(tempfile.mkdtemp(prefix="flexkv-dynamo."))
    try:
        with ended_by_signals():
            return 0 if serve(args, folder) else 1
    except Trouble as e:
        print(f"dynamo example: {e}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
