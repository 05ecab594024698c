"""A worker of Dynamo's without an engine: the real runtime, the real relay of KV events, and a real
FlexKV node, whose events go out as vLLM sends them. It answers requests with tokens of its own.

    python fake_worker.py '{"form": ..., "planes": ..., "model": ..., "port": ..., "ssd": ...}'

Commands come as lines of JSON and are answered by one each: see Worker.
"""
import asyncio
import ctypes
import hashlib
import json
import sys
import time

import msgspec
import zmq
from dynamo.llm import (KvEventPublisher, ModelInput, ModelRuntimeConfig, ModelType, WorkerType,
                        register_model)
from dynamo.runtime import DistributedRuntime
from vllm.distributed.kv_events import AllBlocksCleared, KVEventBatch

import flexkv
from flexkv.integration.vllm.versions import EventMaker

BLOCK = 16              # tokens
CPU_BLOCKS, SSD_BLOCKS, PAGE = 64, 512, 4096


class Stream:
    """What vLLM's publisher puts on its socket."""

    def __init__(self, port):
        self.socket = zmq.Context.instance().socket(zmq.PUB)
        self.socket.set_hwm(100000)
        self.socket.bind(f"tcp://*:{port}")
        self.encoder = msgspec.msgpack.Encoder()
        self.number = 0

    def send(self, events):
        batch = KVEventBatch(ts=time.time(), events=events, data_parallel_rank=0)
        self.socket.send_multipart([b"", self.number.to_bytes(8, "big"), self.encoder.encode(batch)])
        self.number += 1


class Worker:
    """Each public method is a command."""

    def __init__(self, port, ssd):
        self.stream = Stream(port)
        config = flexkv.Config()
        for key, value in {"cpu_cache_blocks": CPU_BLOCKS, "ssd_cache_blocks": SSD_BLOCKS,
                           "ssd_cache_dir": ssd, "enable_kv_events": 1}.items():
            config.set(key, str(value))
        self.node = flexkv.Node.open(config)
        self.space = self.node.space("fake", fingerprint=b"fake", tokens_per_block=BLOCK,
                                     slice_bytes=PAGE)
        self.memory = ctypes.create_string_buffer(PAGE * CPU_BLOCKS)
        self.space.register(0, [(ctypes.addressof(self.memory), PAGE, PAGE, CPU_BLOCKS)])
        self.namespaces = {}
        self.events = self.node.events(self.space)
        self.make = EventMaker()

    def namespace(self, salt):
        if salt not in self.namespaces:
            self.namespaces[salt] = self.space.namespace(*([salt] if salt else []))
            self.namespaces[salt].label(None, salt)
        return self.namespaces[salt]

    def put(self, tokens, salt=None, first=0):
        """The prompt's whole blocks from the first one on, as engines put them."""
        hashes, parent = [], hashlib.sha256((salt or "").encode()).digest()
        blocks = len(tokens) // BLOCK
        for i in range(blocks):
            parent = hashlib.sha256(parent + bytes(str(tokens[i * BLOCK:(i + 1) * BLOCK]), "ascii")).digest()
            hashes.append(parent)
        namespace = self.namespace(salt)
        op = namespace.put(namespace.keys_from_hashes(hashes), first, list(range(blocks - first)),
                           event_hashes=hashes[first:], event_tokens=tokens[first * BLOCK:],
                           event_parent=hashes[first - 1] if first else None)
        done = self.node.poll(1, 20000)
        assert [c.op for c in done] == [op] and done[0].blocks_ok == blocks - first, done
        end = time.monotonic() + 20
        while self.node.stats()["write_backlog_blocks"]:
            assert time.monotonic() < end, "the disk does not come to rest"
            time.sleep(0.01)

    def step(self):
        """As take_events does after a step; returns what was sent."""
        events = []
        while taken := self.events.take():
            events += map(self.make.event, taken)
        if events:
            self.stream.send(events)
        return [[type(e).__name__, e.medium, len(e.block_hashes)] for e in events]

    def clear(self):
        """The engine's cache was cleared, FlexKV's was not."""
        self.events.again()
        self.stream.send([AllBlocksCleared()])

    def reset(self):
        self.node.reset()


async def generate(request, context=None):
    count = int((request.get("stop_conditions") or {}).get("max_tokens") or 1)
    for i in range(count):
        yield {"token_ids": [300 + i], "finish_reason": "length" if i == count - 1 else None}


async def main(settings):
    loop = asyncio.get_running_loop()
    nats = settings["planes"] == "nats"
    runtime = DistributedRuntime(loop, settings["form"], "nats" if nats else "tcp",
                                 event_plane="nats" if nats else "zmq")
    worker = Worker(settings["port"], settings["ssd"])
    endpoint = runtime.endpoint("dynamo.backend.generate")
    config = ModelRuntimeConfig()
    config.total_kv_blocks, config.max_num_seqs, config.max_num_batched_tokens = 10000, 64, 8192
    config.enable_local_indexer = True
    relay = KvEventPublisher(endpoint=endpoint, kv_block_size=BLOCK, zmq_topic="",
                             zmq_endpoint=f"tcp://127.0.0.1:{settings['port']}",
                             enable_local_indexer=True, dp_rank=0)
    await register_model(ModelInput.Tokens, ModelType.Chat | ModelType.Completions, endpoint,
                         settings["model"], settings["name"], worker_type=WorkerType.Aggregated,
                         kv_cache_block_size=BLOCK, runtime_config=config)
    serving = asyncio.ensure_future(endpoint.serve_endpoint(generate))
    await asyncio.sleep(0.5)        # for the relay's subscription
    say({"instance": endpoint.connection_id()})
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        name, arguments = json.loads(line)
        say(getattr(worker, name)(**arguments))
    worker.events.close()
    worker.node.close()
    serving.cancel()
    runtime.shutdown()
    del relay


def say(answer):
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    asyncio.run(main(json.loads(sys.argv[1])))
