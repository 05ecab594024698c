"""Mooncake's own engine in a process of its own: told what to do by lines of JSON, answers by lines of JSON. Its
library keeps threads and global state, and may abort: no test shares a process with it."""
import ctypes
import json
import os
import sys

os.environ["MC_TCP_BIND_ADDRESS"] = "127.0.0.1"
os.environ.setdefault("MC_LOG_LEVEL", "ERROR")

from mooncake.engine import TransferEngine  # noqa: E402

SIZE = 8 << 20


def say(**what):
    sys.stdout.write("@" + json.dumps(what) + "\n")
    sys.stdout.flush()


def main():
    engine = TransferEngine()
    name, metadata = sys.argv[1:3]
    if engine.initialize(name, metadata, "tcp", ""):
        say(error="initialize")
        return
    memory = ctypes.create_string_buffer(SIZE)
    base = ctypes.addressof(memory)
    if engine.register_memory(base, SIZE):
        say(error="register_memory")
        return
    segment = name if metadata != "P2PHANDSHAKE" else f"127.0.0.1:{engine.get_rpc_port()}"
    say(segment=segment, base=base, size=SIZE)
    for line in sys.stdin:
        order = json.loads(line)
        if order["do"] == "fill":
            ctypes.memmove(base, bytes((i * 7 + (i >> 8)) & 255 for i in range(1 << 20)) * (SIZE >> 20), SIZE)
            say(rc=0)
        elif order["do"] == "read":
            ctypes.memset(base, 0, SIZE)
            rc = engine.transfer_sync_read(order["peer"], base, order["address"], order["bytes"])
            with open(order["into"], "wb") as f:
                f.write(ctypes.string_at(base, order["bytes"]))
            say(rc=rc)
        elif order["do"] == "batch":
            n, size = order["n"], order["bytes"]
            ctypes.memset(base, 0, SIZE)
            rc = engine.batch_transfer_sync_read(order["peer"], [base + i * size for i in range(n)],
                                                 [order["address"] + i * size for i in range(n)], [size] * n)
            with open(order["into"], "wb") as f:
                f.write(ctypes.string_at(base, n * size))
            say(rc=rc)
        elif order["do"] == "write":
            rc = engine.transfer_sync_write(order["peer"], base, order["address"], order["bytes"])
            say(rc=rc)


main()
sys.stdout.flush()
os._exit(0)
