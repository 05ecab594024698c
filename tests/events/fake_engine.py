"""An engine's KV event stream, for tests of `flexkv events`; run with a Python that has pyzmq and msgpack.

    fake_engine.py ENDPOINT REPLAY_ENDPOINT|-

Each line of standard input is {"events": [...], "rank": 0, "seq": n, "lose": false}: a batch, published under the
number n (default: one more than the last); answered with a line when it is sent. lose: kept for the replay only.
A line {"raw": [hex, ...]} is sent as it is. Asked at the replay endpoint, it sends what it kept."""
import json
import sys
import threading
import time

import msgpack
import zmq

context = zmq.Context()
pub = context.socket(zmq.PUB)
pub.setsockopt(zmq.SNDHWM, 0)
pub.bind(sys.argv[1])
kept, lock = [], threading.Lock()


def answer():
    router = context.socket(zmq.ROUTER)
    router.bind(sys.argv[2])
    while True:
        peer, *rest = router.recv_multipart()
        start = int.from_bytes(rest[-1], "big")
        with lock:
            batches = [b for b in kept if b[0] >= start]
        for seq, payload in batches:
            router.send_multipart([peer, b"", b"", seq.to_bytes(8, "big"), payload])
        router.send_multipart([peer, b"", b"", b"\xff" * 8, b""])


if sys.argv[2] != "-":
    threading.Thread(target=answer, daemon=True).start()
print("ready", flush=True)
next_seq = 0
for line in sys.stdin:
    request = json.loads(line)
    if "raw" in request:
        pub.send_multipart([bytes.fromhex(x) for x in request["raw"]])
    else:
        seq = request.get("seq", next_seq)
        next_seq = seq + 1
        payload = msgpack.packb([time.time(), request["events"], request.get("rank", 0)])
        with lock:
            kept.append((seq, payload))
        if not request.get("lose"):
            pub.send_multipart([b"", seq.to_bytes(8, "big"), payload])
    print("sent", flush=True)
