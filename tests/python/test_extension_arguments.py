"""The extension module: keys, pages and arguments in all their forms, and the wrong ones."""
import array
import ctypes
import errno
import hashlib
import random
import struct

import pytest

import flexkv
from conftest import split_keys


# ---- keys ----

def seed_of(space_options, parts=()):
    """docs/keys.md, with hashlib."""
    tokens_per_block, ranks, slice_bytes, fingerprint = space_options
    space = hashlib.sha256(b"flexkv-space-1\0" + struct.pack("<4Q", tokens_per_block, ranks, slice_bytes, 0) +
                           fingerprint).digest()[:16]
    text = b"".join(struct.pack("<Q", len(p.encode())) + p.encode() for p in parts)
    return hashlib.sha256(b"flexkv-seed-1\0" + space + text).digest()[:16]


def chain_of(seed, tokens, tokens_per_block):
    keys = []
    for i in range(0, len(tokens) - tokens_per_block + 1, tokens_per_block):
        data = struct.pack(f"<{tokens_per_block}I", *tokens[i:i + tokens_per_block])
        seed = hashlib.sha256(seed + data).digest()[:16]
        keys.append(seed)
    return b"".join(keys)


@pytest.mark.parametrize("n", [0, 3, 4, 4 * 700 + 1, 40000])
def test_keys_from_tokens(rig, n):
    rng = random.Random(n)
    tokens = [rng.randrange(1 << 32) for _ in range(n)]
    if n:
        tokens[-1] = 0xFFFFFFFF
    for parts in ((), ("tenant", "lora")):
        seed = seed_of((4, 1, rig.memory.slice_bytes, b"test-model"), parts)
        expected = chain_of(seed, tokens, 4)
        ns = rig.space.namespace(*parts)
        for form in (tokens, tuple(tokens), array.array("I", tokens), array.array("q", tokens),
                     array.array("Q", tokens), memoryview(array.array("I", tokens)), (ctypes.c_uint64 * n)(*tokens)):
            assert ns.keys_from_tokens(form) == expected
    small = [t >> 1 for t in tokens]
    assert rig.namespace.keys_from_tokens(array.array("i", small)) == rig.namespace.keys_from_tokens(small)


def test_keys_go_on_from_a_previous_key(rig):
    tokens = list(range(100, 140))
    whole = rig.namespace.keys_from_tokens(tokens)
    head = rig.namespace.keys_from_tokens(tokens[:24])
    tail = rig.namespace.keys_from_tokens(tokens[24:], prev=head[-16:])
    assert head + tail == whole
    assert rig.namespace.keys_from_tokens(tokens, None) == whole
    for bad in (head, b"", "0" * 16, 3):
        with pytest.raises(ValueError, match="prev"):
            rig.namespace.keys_from_tokens(tokens, bad)


@pytest.mark.parametrize("length", [16, 20, 32, 64])
@pytest.mark.parametrize("count", [1, 256, 1000])
def test_keys_from_hashes(rig, length, count):
    hashes = [random.Random(i).randbytes(length) for i in range(count)]
    seed = int.from_bytes(seed_of((4, 1, rig.memory.slice_bytes, b"test-model")), "little")
    expected = b"".join((int.from_bytes(h[:16], "little") ^ seed).to_bytes(16, "little") for h in hashes)
    assert rig.namespace.keys_from_hashes(hashes) == expected
    assert rig.namespace.keys_from_hashes(tuple(hashes)) == expected


def test_bad_hashes(rig):
    assert rig.namespace.keys_from_hashes([]) == b""
    assert len(rig.namespace.keys_from_hashes([b"12345678"])) == 16
    for bad, error, text in (([b"x" * 32, b"x" * 31], ValueError, "hash 1 has 31 bytes"),
                             ([b"1234567"], ValueError, "8 are the least"), ([b"x" * 8, 5], TypeError, "bytes"),
                             ([5], TypeError, "bytes"), ("x" * 8, TypeError, "sequence"), (7, TypeError, "sequence")):
        with pytest.raises(error, match=text):
            rig.namespace.keys_from_hashes(bad)


@pytest.mark.parametrize("form", [bytes, bytearray, memoryview, lambda k: array.array("Q", k),
                                  lambda k: memoryview(b"x" + k)[1:], lambda k: (ctypes.c_char * len(k))(*k)])
def test_keys_as_any_buffer(rig, form):
    keys = rig.keys(1, 700)
    pages = [5] * 40
    rig.finish(rig.namespace.put(form(keys[:40 * 16]), 0, pages))
    assert rig.namespace.match(form(keys)).blocks == 40


def test_bad_keys(rig):
    assert rig.namespace.match(b"").blocks == 0
    for bad in (b"x" * 15, b"x" * 17):
        with pytest.raises(ValueError, match=f"{len(bad)} bytes"):
            rig.namespace.match(bad)
    for bad in ("x" * 16, 5, None, [b"x" * 16]):
        with pytest.raises(TypeError):
            rig.namespace.match(bad)
    with pytest.raises(BufferError):
        rig.namespace.match(memoryview(b"x" * 64)[::2])


# ---- pages ----

@pytest.mark.parametrize("form", [
    list, tuple, lambda p: array.array("i", p), lambda p: array.array("I", p), lambda p: array.array("q", p),
    lambda p: array.array("Q", p), lambda p: (ctypes.c_int32 * len(p))(*p), lambda p: (ctypes.c_int64 * len(p))(*p)])
def test_pages_in_any_form(rig, form):
    keys = rig.keys(1, 5)
    pages = [60, 2, 33, 7, 8]
    for key, page in zip(split_keys(keys), pages):
        rig.memory.fill(page, key)
    rig.finish(rig.namespace.put(keys, 0, form(pages)))
    for page in range(64):
        rig.memory.spoil(page)
    back = [1, 0, 63, 11, 44]
    rig.finish(rig.node.get(rig.namespace.match(keys).lease, 0, form(back)))
    assert all(rig.memory.holds(page, key) for key, page in zip(split_keys(keys), back))


def test_many_pages(make_rig):
    rig = make_rig(pages=5000, cpu_cache_blocks=5000)
    keys = rig.keys(1, 5000)
    assert rig.put(keys, list(range(4999, -1, -1))).blocks_ok == 5000
    assert rig.get(keys, list(range(5000))) == 5000


class Index:
    def __index__(self):
        return 7


class Shrinks:
    """Takes the list apart that it is in, while it is read."""

    def __init__(self):
        self.owner = []

    def __index__(self):
        self.owner.clear()
        return 7


def test_page_numbers_of_other_types(rig):
    keys = rig.keys(1, 1)
    rig.finish(rig.namespace.put(keys, 0, [Index()]))
    shrinks = Shrinks()
    shrinks.owner = [shrinks, 1, 2]
    with pytest.raises(IndexError):
        rig.node.get(1, 0, shrinks.owner)


@pytest.mark.parametrize("bad, error, text", [
    ([1, -1, 2], ValueError, r"pages\[1\] must be 0 to 2\^32 - 1"),
    ([1, 2, 1 << 32], ValueError, r"pages\[2\]"), ([1 << 70, 1, 1], ValueError, r"pages\[0\]"),
    (array.array("i", [1, 2, -5]), ValueError, r"pages\[2\]"), (array.array("q", [1, -5, 2]), ValueError, r"pages\[1\]"),
    (array.array("Q", [1 << 32, 1, 1]), ValueError, r"pages\[0\]"),
    (array.array("Q", [1, 1, 1 << 63]), ValueError, r"pages\[2\]"),
    ([1, 2.0, 3], TypeError, "integer"), ([1, "2", 3], TypeError, "integer"), ([None] * 3, TypeError, "integer"),
    (array.array("d", [1, 2, 3]), TypeError, "8-byte integers, not format 'd'"),
    (array.array("h", [1, 2, 3]), TypeError, "'h'"), (b"abc", TypeError, "'B'"),
    (memoryview(bytes(12)).cast("I", (3, 1)), TypeError, "2 dimensions"), ("abc", TypeError, "sequence"),
    ({1, 2, 3}, TypeError, "sequence"), (3, TypeError, "sequence"), (None, TypeError, "sequence")])
def test_bad_pages(rig, bad, error, text):
    keys = rig.keys(1, 3)
    with pytest.raises(error, match=text):
        rig.namespace.put(keys, 0, bad)
    rig.put(keys, [1, 2, 3])
    found = rig.namespace.match(keys)
    with pytest.raises(error, match=text):
        rig.node.get(found.lease, 0, bad)
    rig.node.release(found.lease)


def test_page_beyond_the_regions(rig):
    keys = rig.keys(1, 3)
    with pytest.raises(flexkv.Error, match="block 2: page 64, but the regions have 64 pages") as e:
        rig.namespace.put(keys, 0, [0, 63, 64])
    assert e.value.errno == errno.EINVAL


def test_number_of_pages(rig):
    keys = rig.keys(1, 3)
    for first, pages in ((0, [1, 2]), (1, [1, 2, 3]), (4, []), (0, [])):
        with pytest.raises(ValueError, match="as many pages"):
            rig.namespace.put(keys, first, pages)
    rig.put(keys, [1, 2, 3])
    with pytest.raises(flexkv.Error, match="range"):
        rig.node.get(rig.namespace.match(keys).lease, 2, [1, 2])


# ---- arguments ----

def test_arguments_by_name(rig):
    keys = rig.namespace.keys_from_tokens(tokens=[1, 2, 3, 4], prev=None)
    op = rig.namespace.put(keys=keys, first=0, pages=[1], timeout_ms=1000)
    assert rig.node.poll(timeout_ms=5000, max=1)[0].op == op
    rig.node.release(lease=rig.namespace.match(keys=keys).lease)
    op = rig.node.get(rig.namespace.match(keys).lease, pages=[2], first=0, timeout_ms=1000)
    rig.finish(op)
    assert rig.node.cancel(op=op) is False
    assert rig.namespace.keys_from_hashes(hashes=[b"x" * 16])
    rig.finish(rig.namespace.prefetch(keys=keys, timeout_ms=1000))


@pytest.mark.parametrize("call, text", [
    (lambda r: r.namespace.match(), r"match\(\) is missing the argument 'keys'"),
    (lambda r: r.namespace.match(b"", b""), r"match\(\) takes at most 1"),
    (lambda r: r.namespace.match(b"", keys=b""), "multiple values for argument 'keys'"),
    (lambda r: r.namespace.match(b"", key=b""), "unexpected keyword argument 'key'"),
    (lambda r: r.namespace.put(b"", pages=[]), "missing the argument 'first'"),
    (lambda r: r.node.get(1, 0), "missing the argument 'pages'"),
    (lambda r: r.node.space(), "tokens_per_block"),
    (lambda r: r.node.space("x", b""), "positional"),
    (lambda r: r.space.register(0, [[1, 2, 3, 4]]), "region is a tuple"),
    (lambda r: r.space.register(0, [(1, 2, 3)]), "region is a tuple"),
    (lambda r: flexkv.Node.open(1), "flexkv.Config"),
])
def test_wrong_arguments(rig, call, text):
    with pytest.raises(TypeError, match=text):
        call(rig)


@pytest.mark.parametrize("call, text", [
    (lambda r: r.node.get(-1, 0, []), "lease must be"), (lambda r: r.node.get(1 << 64, 0, []), "lease must be"),
    (lambda r: r.node.get(1, -1, []), "first must be"), (lambda r: r.node.get(1, 0, [], 1 << 32), "timeout_ms must be"),
    (lambda r: r.node.poll(1, -2), "timeout_ms must be"), (lambda r: r.node.cancel(-5), "op must be"),
    (lambda r: r.node.space(tokens_per_block=-1), "tokens_per_block must be"),
    (lambda r: r.space.register(0, [(-1, 1, 1, 1)]), "base address must be"),
    (lambda r: r.space.unregister(1 << 32), "rank must be"),
])
def test_numbers_out_of_range(rig, call, text):
    with pytest.raises(ValueError, match=text):
        call(rig)


def test_bad_spaces(rig):
    for options in ({"name": "a/b"}, {"ranks": 0}, {"slice_bytes": 1 << 40}, {"fingerprint": b"other"}):
        with pytest.raises(flexkv.Error, match="space") as e:
            rig.node.space(**{"tokens_per_block": 4, "slice_bytes": 4096, **options})
        assert e.value.errno in (errno.EINVAL, errno.EEXIST)
