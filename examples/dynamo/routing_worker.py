"""A worker of routing.py: Dynamo's real runtime and relay of KV events, a real FlexKV node, and in
place of the engine a cache of GPU blocks. It computes nothing and knows no time: it is told when a
request's prefill begins, when it has its first token, and when it ends.

    python routing_worker.py '{"name": ..., "model": ..., "port": ..., "gpu": ..., "cpu": ..., "ssd": ...,
                               "ssd_dir": ..., "flexkv": true, "block": 16}'

A request that comes in is said ({"arrived": its number here}); commands come as lines of JSON:
  ["start", number, blocks more]    answered: where its blocks were found, and where they
                                        should be by all events so far; or that there is no room
  ["first", number], ["end", number]    answered by tokens, which go to Dynamo
  ["dropped"]                           answered: blocks that FlexKV had no room for
"""
import asyncio
import ctypes
import functools
import hashlib
import json
import os
import sys
import time
from collections import OrderedDict

import msgspec
import zmq
from dynamo.llm import (KvEventPublisher, ModelInput, ModelRuntimeConfig, ModelType, WorkerType,
                        register_model)
from dynamo.runtime import DistributedRuntime

import flexkv
from flexkv.integration.vllm.versions import EventMaker

PAGE = 4096                     # bytes of a block: as small as the disk takes them
FIRST_TOKEN, DIGIT = 300, 1024  # a block's id is in its first two tokens
MOST_BLOCKS = DIGIT * DIGIT     # the model's vocabulary has them
FILLING = [FIRST_TOKEN + i % DIGIT for i in range(2 * DIGIT)]
IO_MS = 20000


def block_tokens(number, block):
    """The tokens of a trace's block, the same everywhere. Within the small model's vocabulary."""
    low, high = number % DIGIT, number // DIGIT
    return [FIRST_TOKEN + low, FIRST_TOKEN + high, *FILLING[low:low + block - 2]]


def block_number(tokens):
    return tokens[0] - FIRST_TOKEN + DIGIT * (tokens[1] - FIRST_TOKEN)


@functools.cache
def block_hash(number):
    """An id stands for a block with its whole prefix, so this needs no parent."""
    return hashlib.sha256(b"%d" % number).digest()


@functools.cache
def event_hash(number):
    """What routers call the block, in the GPU's events as in FlexKV's."""
    return int.from_bytes(block_hash(number)[-8:], "big")


class BlockStored(msgspec.Struct, tag=True, kw_only=True):
    """As vLLM's, without importing all of it into four processes."""
    block_hashes: list[int]
    parent_block_hash: int | None
    token_ids: list[int]
    block_size: int
    medium: str | None = "GPU"
    lora_name: str | None = None


class BlockRemoved(msgspec.Struct, tag=True, kw_only=True):
    block_hashes: list[int]
    medium: str | None = "GPU"


class Stream:
    """What vLLM's publisher puts on its socket; and what one knows who has heard all of it."""

    def __init__(self, port):
        self.socket = zmq.Context.instance().socket(zmq.PUB)
        self.socket.set_hwm(100000)
        self.socket.bind(f"tcp://127.0.0.1:{port}")
        self.encoder = msgspec.msgpack.Encoder()
        self.number = 0
        self.there = {"GPU": set(), "CPU": set(), "STORAGE": set()}

    def send(self, events):
        for e in events:
            place = self.there[e.medium]
            (place.update if isinstance(e, BlockStored) else place.difference_update)(e.block_hashes)
        if events:
            batch = self.encoder.encode([time.time(), events, 0])
            self.socket.send_multipart([b"", self.number.to_bytes(8, "big"), batch])
            self.number += 1

    def told(self, ids):
        """How far a router that walks along the prompt comes in each tier."""
        hashes, at, steps = [event_hash(i) for i in ids], 0, []
        for place in self.there.values():
            begin = at
            while at < len(hashes) and hashes[at] in place:
                at += 1
            steps.append(at - begin)
        return steps


class Gpu:
    """Blocks on the GPU: who is not used by a request goes when room is needed, the longest unused
    first and a prompt's end before its beginning, as in vLLM."""

    def __init__(self, blocks):
        self.blocks = blocks
        self.memory = bytearray(PAGE * blocks)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self.free = list(range(blocks))
        self.pages = OrderedDict()      # id -> page, those unused the longest first
        self.users = {}                 # id -> requests
        self.private = 0                # blocks of answers and of prompts' ends: nobody else's

    def leading(self, ids):
        return next((n for n, i in enumerate(ids) if i not in self.pages), len(ids))

    def take(self, ids, more):
        """Makes room for a request and gives it its blocks. None where there is no room; else those
        that were pushed out."""
        new = [i for i in ids if i not in self.pages]
        if new != ids[len(ids) - len(new):]:
            raise RuntimeError("a block is there without those before it")
        idle = len(self.pages) - len(self.users) - sum(i not in self.users for i in ids[:len(ids) - len(new)])
        over = len(self.pages) + self.private + len(new) + more - self.blocks
        if over > idle:
            return None
        for i in ids:
            self.users[i] = self.users.get(i, 0) + 1
        gone = []
        for i in self.pages:
            if len(gone) >= over:
                break
            if i not in self.users:
                gone.append(i)
        for i in gone:
            self.free.append(self.pages.pop(i))
        for i in new:
            self.pages[i] = self.free.pop()
        self.private += more
        return gone

    def give(self, ids, more):
        self.private -= more
        for i in reversed(ids):
            self.users[i] -= 1
            if not self.users[i]:
                del self.users[i]
                self.pages.move_to_end(i)

    def write(self, number):
        """What computing it leaves there."""
        at = PAGE * self.pages[number]
        self.memory[at:at + 8] = number.to_bytes(8, "big")

    def read(self, number):
        at = PAGE * self.pages[number]
        return int.from_bytes(self.memory[at:at + 8], "big")


class Store:
    """The FlexKV node of this worker."""

    def __init__(self, settings, gpu):
        config = flexkv.Config()
        for key, value in {"cpu_cache_blocks": settings["cpu"], "ssd_cache_blocks": settings["ssd"],
                           "ssd_cache_dir": settings["ssd_dir"], "enable_kv_events": 1}.items():
            config.set(key, str(value))
        self.gpu = gpu
        self.block = settings["block"]
        self.node = flexkv.Node.open(config)
        self.space = self.node.space("routing", fingerprint=b"routing", tokens_per_block=self.block,
                                     slice_bytes=PAGE)
        self.space.register(0, [(gpu.address, PAGE, PAGE, gpu.blocks)])
        self.namespace = self.space.namespace()
        self.namespace.label(None, None)
        self.events = self.node.events(self.space)
        self.make = EventMaker(BlockStored, BlockRemoved)

    def _done(self, op):
        done = self.node.poll(1, IO_MS)
        if [c.op for c in done] != [op]:
            raise RuntimeError(f"FlexKV did not end operation {op} in {IO_MS} ms: {done}")
        return done[0].blocks_ok

    def load(self, ids, first):
        """Into the GPU, from block `first` on; how many came from the CPU tier and from SSD."""
        found = self.namespace.match(self.namespace.keys_from_hashes([block_hash(i) for i in ids]))
        if not found.blocks:
            return 0, 0
        if found.blocks <= first:
            self.node.release(found.lease)
            return 0, 0
        wanted = ids[first:found.blocks]
        loaded = self._done(self.node.get(found.lease, first, [self.gpu.pages[i] for i in wanted]))
        for i in wanted[:loaded]:
            if self.gpu.read(i) != i:
                raise RuntimeError(f"block {i} came back with the bytes of block {self.gpu.read(i)}")
        cpu = min(loaded, max(0, found.cpu_blocks - first))
        return cpu, loaded - cpu

    def put(self, ids):
        hashes = [block_hash(i) for i in ids]
        tokens = [t for i in ids for t in block_tokens(i, self.block)]
        self._done(self.namespace.put(self.namespace.keys_from_hashes(hashes), 0,
                                      [self.gpu.pages[i] for i in ids], event_hashes=hashes,
                                      event_tokens=tokens))

    def news(self):
        """As the connector's take_events."""
        events = []
        while taken := self.events.take():
            events += map(self.make.event, taken)
        return events

    def close(self):
        self.events.close()
        self.node.close()


class Request:
    def __init__(self, tokens, block):
        whole = len(tokens) // block
        self.ids = [block_number(tokens[i * block:]) for i in range(whole)]
        self.usable = (len(tokens) - 1) // block    # something has to be computed
        self.hit = self.more = 0
        self.first, self.end = asyncio.Event(), asyncio.Event()


class Worker:
    def __init__(self, settings):
        self.block = settings["block"]
        self.gpu = Gpu(settings["gpu"])
        self.store = Store(settings, self.gpu) if settings["flexkv"] else None
        self.stream = Stream(settings["port"])
        self.requests = {}
        self.count = 0

    async def generate(self, request, context=None):
        r = Request(request["token_ids"], self.block)
        number, self.count = self.count, self.count + 1
        self.requests[number] = r
        say({"arrived": number, "blocks": len(r.ids), "told": self.stream.told(r.ids)})
        await r.first.wait()
        yield {"token_ids": [FIRST_TOKEN], "finish_reason": None}
        await r.end.wait()
        yield {"token_ids": [FIRST_TOKEN + 1], "finish_reason": "length"}

    def start(self, number, more):
        r = self.requests[number]
        in_gpu = self.gpu.leading(r.ids)
        gone = self.gpu.take(r.ids, more)
        if gone is None:
            return say({"room": False})
        r.more = more
        events = [BlockRemoved(block_hashes=[event_hash(i) for i in gone])] if gone else []
        r.hit = in_gpu
        hit = min(in_gpu, r.usable)
        cpu = ssd = 0
        told = self.stream.told(r.ids[:r.usable])
        if self.store:
            cpu, ssd = self.store.load(r.ids[:r.usable], hit)
            events += self.store.news()
        self.stream.send(events)
        for i in r.ids[hit + cpu + ssd:]:
            self.gpu.write(i)
        return say({"room": True, "gpu": hit, "cpu": cpu, "ssd": ssd, "told": told})

    def first(self, number):
        r = self.requests[number]
        events = []
        if r.hit < len(r.ids):
            new = r.ids[r.hit:]
            events.append(BlockStored(
                block_hashes=[event_hash(i) for i in new], block_size=self.block,
                parent_block_hash=event_hash(r.ids[r.hit - 1]) if r.hit else None,
                token_ids=[t for i in new for t in block_tokens(i, self.block)]))
        if self.store and r.ids:
            self.store.put(r.ids)
            events += self.store.news()
        self.stream.send(events)
        r.first.set()

    def end(self, number):
        r = self.requests.pop(number)
        self.gpu.give(r.ids, r.more)
        r.end.set()

    def dropped(self):
        say({"dropped": self.store.node.stats()["put_dropped_blocks"] if self.store else 0})


async def commands(worker):
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := await reader.readline():
        name, *arguments = json.loads(line)
        getattr(worker, name)(*arguments)


async def main(settings):
    runtime = DistributedRuntime(asyncio.get_running_loop(), "file", "tcp", event_plane="zmq")
    worker = Worker(settings)
    endpoint = runtime.endpoint("dynamo.backend.generate")
    config = ModelRuntimeConfig()
    config.total_kv_blocks, config.max_num_seqs = settings["gpu"], 256
    config.max_num_batched_tokens, config.context_length = 8192, settings["context"]
    config.enable_local_indexer = True
    relay = KvEventPublisher(endpoint=endpoint, kv_block_size=worker.block, zmq_topic="",
                             zmq_endpoint=f"tcp://127.0.0.1:{settings['port']}",
                             enable_local_indexer=True, dp_rank=0)
    await register_model(ModelInput.Tokens, ModelType.Chat | ModelType.Completions, endpoint,
                         settings["model"], settings["name"], worker_type=WorkerType.Aggregated,
                         kv_cache_block_size=worker.block, runtime_config=config)
    serving = asyncio.ensure_future(endpoint.serve_endpoint(worker.generate))
    await asyncio.sleep(1)          # for the relay's subscription
    say({"instance": endpoint.connection_id()})
    try:
        await commands(worker)      # until nobody is there to send them
    finally:
        if worker.store:
            worker.store.close()
        serving.cancel()
        runtime.shutdown()
        del relay


def say(answer):
    os.write(1, json.dumps(answer).encode() + b"\n")


if __name__ == "__main__":
    asyncio.run(main(json.loads(sys.argv[1])))
