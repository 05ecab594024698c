"""The extension module: what goes in and out of it, and its life among Python's threads, forks and exits."""
import array
import ast
import ctypes
import errno
import gc
import hashlib
import importlib.metadata
import inspect
import os
import pickle
import random
import re
import select
import signal
import struct
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

import flexkv
from conftest import KEY_BYTES, Rig, block_bytes, open_node, split_keys

HERE = Path(__file__).resolve().parent


def run_python(code, timeout=60):
    """A script in a process of its own; what it printed. The process must end well and quietly."""
    path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True,
                          timeout=timeout, env={**os.environ, "PYTHONPATH": path})
    assert (done.returncode, done.stderr) == (0, ""), f"{done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


# ---- the package ----

def test_import_needs_no_torch_and_no_numpy():
    out = run_python("""
        import sys
        import flexkv
        print(sorted({"torch", "numpy"} & set(sys.modules)))
    """)
    assert out == "[]\n"


def test_versions_agree():
    assert flexkv.__version__ == flexkv.version() == importlib.metadata.version("flexkv")


def test_program_comes_with_the_package():
    program = Path(sys.prefix) / "bin" / "flexkv"
    done = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=60)
    assert done.stdout == f"flexkv {flexkv.version()}\n"


def test_stub_and_module_have_the_same_names():
    import flexkv._flexkv as module
    tree = ast.parse(Path(module.__file__).with_name("_flexkv.pyi").read_text())
    classes = {n.name: n for n in tree.body if isinstance(n, ast.ClassDef)}
    names = set(classes) | {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}
    names |= {n.target.id for n in tree.body if isinstance(n, ast.AnnAssign)}
    assert names == {n for n in dir(module) if not n.startswith("_")}
    for name, node in classes.items():
        inside = {n.name for n in node.body if isinstance(n, ast.FunctionDef)}
        inside |= {n.target.id for n in node.body if isinstance(n, ast.AnnAssign)}
        public = {n for n in dir(getattr(module, name)) if not n.startswith("_")}
        if name == "Error":
            public -= set(dir(OSError))
        if name in ("Completion", "Match"):
            public -= set(dir(tuple)) | {"n_fields", "n_sequence_fields", "n_unnamed_fields"}
        assert {n for n in inside if not n.startswith("_")} == public, name
    assert set(flexkv.__all__) == names


def test_only_the_init_function_is_visible():
    import flexkv._flexkv as module
    library = ctypes.CDLL(module.__file__)
    assert hasattr(library, "PyInit__flexkv")
    assert not hasattr(library, "flexkv_version")


def test_factories_are_the_only_way_to_a_node():
    for cls in (flexkv.Node, flexkv.Space, flexkv.Namespace):
        with pytest.raises(TypeError):
            cls()


# ---- config ----

def test_config_values(tmp_path, monkeypatch):
    monkeypatch.setenv("FLEXKV_EVICTION_POLICY", "arc")
    config = flexkv.Config()
    config.load_env()
    config.set("cpu_cache_gb", "1.5")
    config.set("ssd_cache_dir", "/a;/b")
    assert config.get("cpu_cache_gb") == "1536M"
    assert config.get("eviction_policy") == "arc"
    assert config.get("ssd_cache_dir") == "/a;/b"
    assert config.get("logging_prefix") == flexkv.Config().get("logging_prefix")
    with pytest.raises(flexkv.Error, match="can't be changed") as e:
        config.set("cpu_cache_gb", "2")
    assert e.value.errno == errno.EBUSY


def test_config_long_value():
    long = ";".join(f"/{'x' * 60}/{i}" for i in range(300))
    config = flexkv.Config()
    config.set("ssd_cache_dir", long)
    assert config.get("ssd_cache_dir") == long


def test_config_file(tmp_path):
    path = tmp_path / "flexkv.yaml"
    path.write_text("cpu_cache_gb: 3\n")
    config = flexkv.Config()
    config.load_file(path)
    assert config.get("cpu_cache_gb") == "3G"
    with pytest.raises(flexkv.Error, match="nowhere.yaml") as e:
        flexkv.Config().load_file("/nowhere.yaml")
    assert e.value.errno == errno.ENOENT


@pytest.mark.parametrize("call", [lambda c: c.set("cpu_cach_gb", "1"), lambda c: c.get("cpu_cach_gb")])
def test_config_unknown_key_is_named(call):
    with pytest.raises(flexkv.Error, match="cpu_cach_gb; did you mean cpu_cache_gb") as e:
        call(flexkv.Config())
    assert e.value.errno == errno.ENOENT


def test_config_bad_value_is_named():
    with pytest.raises(flexkv.Error, match='cpu_cache_gb "lots"') as e:
        flexkv.Config().set("cpu_cache_gb", "lots")
    assert isinstance(e.value, OSError) and e.value.errno == errno.EINVAL


def test_config_of_a_node_is_frozen_and_may_be_used_again():
    config = flexkv.Config()
    config.set("cpu_cache_blocks", "4")
    for _ in range(2):
        flexkv.Node.open(config).close()
    with pytest.raises(flexkv.Error):
        config.set("cpu_cache_blocks", "5")
    with pytest.raises(TypeError, match="flexkv.Config"):
        flexkv.Node.open({"cpu_cache_blocks": 4})


# ---- put, match, get ----

@pytest.mark.parametrize("ranks", [1, 3])
def test_bytes_come_back(make_rig, ranks):
    rig = make_rig(ranks=ranks)
    keys = rig.keys(1, 7)
    pages = [9, 3, 30, 2, 61, 63, 0]
    assert not rig.namespace.match(keys).blocks
    done = rig.put(keys, pages)
    assert (done.kind, done.status, done.blocks, done.blocks_ok, done.flags) == (flexkv.OP_PUT, 0, 7, 7, 0)
    for page in range(64):
        rig.memory.spoil(page)
    assert rig.get(keys, [40, 12, 5, 55, 54, 20, 31]) == 7
    others = set(range(64)) - {40, 12, 5, 55, 54, 20, 31}
    assert all(rig.memory.is_spoiled(page) for page in others)
    assert rig.memory.gaps_are_whole()


def test_known_prefix_of_a_longer_prompt(rig):
    keys = rig.keys(1, 10)
    rig.put(keys[:6 * KEY_BYTES], list(range(6)))
    assert rig.namespace.match(keys)[1:] == (6, 6, 0, 0)
    assert rig.get(keys, list(range(20, 30))) == 6
    rig.put(keys, [50, 51, 52, 53], first=6)
    assert rig.get(keys, list(range(20, 30))) == 10


def test_part_of_a_match(rig):
    keys = rig.keys(1, 8)
    rig.put(keys, list(range(8)))
    found = rig.namespace.match(keys)
    for page in (40, 41, 42):
        rig.memory.spoil(page)
    done = rig.finish(rig.node.get(found.lease, 3, [40, 41]))
    assert (done.blocks, done.blocks_ok) == (2, 2)
    assert rig.memory.holds(40, split_keys(keys)[3]) and rig.memory.holds(41, split_keys(keys)[4])
    assert rig.memory.is_spoiled(42)


def test_namespaces_do_not_mix(rig):
    spaces = [rig.namespace] + [rig.space.namespace(*parts) for parts in
                                (("a",), ("b",), ("a", "b"), ("ab",), ("",), ("a", ""), ("ä", "\N{SNOWMAN}"))]
    keys = [rig.keys(1, 3, ns) for ns in spaces]
    assert len(set(keys)) == len(spaces)
    rig.put(keys[1], [1, 2, 3], namespace=spaces[1])
    assert [ns.match(k).blocks for ns, k in zip(spaces, keys)] == [0, 3] + [0] * 6
    again = rig.space.namespace("a")
    assert rig.keys(1, 3, again) == keys[1]
    assert rig.get(keys[1], [10, 11, 12], namespace=again) == 3
    with pytest.raises(ValueError, match="null"):
        rig.space.namespace("a\0b")
    with pytest.raises(TypeError):
        rig.space.namespace(1)


def test_release_and_cancel(rig):
    keys = rig.keys(1, 3)
    op = rig.namespace.put(keys, 0, [0, 1, 2])
    rig.finish(op)
    assert rig.node.cancel(op) is False
    lease = rig.namespace.match(keys).lease
    rig.node.release(lease)
    for call in (lambda: rig.node.release(lease), lambda: rig.node.get(lease, 0, [1])):
        with pytest.raises(flexkv.Error, match="lease") as e:
            call()
        assert e.value.errno == errno.ENOENT


def test_completions_and_matches_are_records(rig):
    keys = rig.keys(1, 3)
    done = rig.put(keys, [0, 1, 2])
    assert tuple(done) == (done.op, done.kind, done.status, done.blocks, done.blocks_ok, done.flags)
    found = rig.namespace.match(keys)
    assert tuple(found) == (found.lease, found.blocks, found.cpu_blocks, found.ssd_blocks, found.peer_blocks)
    assert pickle.loads(pickle.dumps([done, found])) == [done, found]
    assert rig.namespace.match(rig.keys(2, 3)) == (0, 0, 0, 0, 0)


def test_poll_takes_at_most_max(rig):
    ops = [rig.namespace.put(rig.keys(chain, 1), 0, [chain]) for chain in range(9)]
    seen = []
    while len(seen) < len(ops):
        part = rig.node.poll(2, 5000)
        assert 1 <= len(part) <= 2
        seen += [c.op for c in part]
    assert sorted(seen) == sorted(ops)
    assert rig.node.poll() == []
    for bad in (0, -1, 1 << 40, "x"):
        with pytest.raises((ValueError, TypeError)):
            rig.node.poll(bad)


def test_descriptor_is_readable_while_completions_wait(rig):
    def readable(timeout):
        return bool(select.select([rig.node], [], [], timeout)[0])

    assert not readable(0)
    rig.namespace.put(rig.keys(1, 1), 0, [1])
    assert readable(20)
    rig.node.poll()
    assert not readable(0)


def test_reset_and_stats(rig):
    keys = rig.keys(1, 5)
    rig.put(keys, list(range(5)))
    rig.get(keys, list(range(10, 15)))
    stats = rig.node.stats()
    assert (stats["puts"], stats["gets"], stats["put_blocks"], stats["get_blocks"]) == (1, 1, 5, 5)
    assert stats["cpu"]["slots"] == 64 and stats["cpu"]["stored_blocks"] == 5
    assert stats["cpu"]["bytes_written"] == 5 * rig.memory.slice_bytes
    assert stats["ssd"]["slots"] == 0
    header = (HERE.parents[1] / "include/flexkv/flexkv.h").read_text()
    declared = re.search(r"typedef struct flexkv_stats \{(.*?)\}", header, re.S).group(1)
    declared = re.sub(r"/\*.*?\*/", "", declared, flags=re.S)
    fields = [n.strip() for part in re.findall(r"(?:uint64_t|flexkv_tier_stats) ([^;]*);", declared)
              for n in part.split(",")]
    assert set(stats) == set(fields)
    rig.node.reset()
    assert rig.namespace.match(keys).blocks == 0


def test_unregister(rig):
    keys = rig.keys(1, 2)
    rig.put(keys, [1, 2])
    rig.space.unregister(0)
    with pytest.raises(flexkv.Error, match="0 of 1 ranks") as e:
        rig.namespace.put(keys, 0, [1, 2])
    assert e.value.errno == errno.ENOTCONN
    rig.space.register(0, rig.memory.regions(0))
    assert rig.get(keys, [3, 4]) == 2
    with pytest.raises(flexkv.Error) as e:
        rig.space.register(0, rig.memory.regions(0))
    assert e.value.errno == errno.EEXIST


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


# ---- SSD ----

def ssd_rig(make_rig, folder, **options):
    return make_rig(ssd_cache_dir=folder, ssd_cache_blocks=64, **options)


def test_blocks_survive_a_restart_on_ssd(make_rig, tmp_path):
    first = ssd_rig(make_rig, tmp_path, ranks=2)
    chains = [first.keys(chain, 6) for chain in range(3)]
    for i, keys in enumerate(chains):
        assert first.put(keys, list(range(i * 6, i * 6 + 6))).status == 0
    first.node.close()
    with pytest.raises(flexkv.Error):
        first.namespace.match(chains[0])

    second = ssd_rig(make_rig, tmp_path, ranks=2)
    for keys in chains:
        assert second.namespace.match(keys)[1:] == (6, 0, 6, 0)
    done = second.finish(second.namespace.prefetch(chains[0]))
    assert (done.kind, done.status, done.blocks_ok) == (flexkv.OP_PREFETCH, 0, 6)
    assert second.namespace.match(chains[0])[1:] == (6, 6, 0, 0)
    for keys in chains:
        assert second.get(keys, list(range(20, 26))) == 6
    assert second.node.stats()["ssd"]["bytes_read"] >= 18 * 2 * second.memory.slice_bytes


def test_damaged_block_is_an_error_not_wrong_bytes(make_rig, tmp_path):
    first = ssd_rig(make_rig, tmp_path)
    keys = first.keys(1, 6)
    first.put(keys, list(range(6)))
    needle = block_bytes(split_keys(keys)[3], 0, 0, 512)
    first.node.close()

    hits = 0
    for path in tmp_path.iterdir():
        data = path.read_bytes()
        at = data.find(needle)
        if at >= 0:
            hits += 1
            with open(path, "r+b") as f:
                f.seek(at + 100)
                f.write(bytes([data[at + 100] ^ 1]))
    assert hits == 1

    second = ssd_rig(make_rig, tmp_path)
    for page in range(64):
        second.memory.spoil(page)
    done = second.finish(second.node.get(second.namespace.match(keys).lease, 0, list(range(6))))
    assert (done.status, done.blocks, done.blocks_ok) == (-errno.EBADMSG, 6, 3)
    assert all(second.memory.holds(i, key) for i, key in enumerate(split_keys(keys)[:3]))


def test_directory_in_use(make_rig, tmp_path):
    ssd_rig(make_rig, tmp_path)
    with pytest.raises(flexkv.Error, match=str(tmp_path)) as e:
        ssd_rig(make_rig, tmp_path)
    assert e.value.errno == errno.EBUSY


# ---- closing ----

def test_closed_objects_refuse(rig):
    keys = rig.keys(1, 2)
    rig.put(keys, [0, 1])
    assert rig.node.closed is False
    rig.node.close()
    assert rig.node.closed is True
    calls = [rig.node.poll, rig.node.reset, rig.node.stats, rig.node.status, rig.node.fileno,
             lambda: rig.node.space(tokens_per_block=4, slice_bytes=4), lambda: rig.node.release(1),
             lambda: rig.node.get(1, 0, [1]), lambda: rig.node.cancel(1), lambda: rig.node.listen("ipc://@x"),
             lambda: rig.node.serve("ipc://@x"), lambda: rig.node.wait_idle(0, 0),
             lambda: rig.space.namespace("a"), lambda: rig.space.register(0, rig.memory.regions(0)),
             lambda: rig.space.unregister(0), lambda: rig.space.set_compute_rate(1.0),
             lambda: rig.namespace.keys_from_tokens([1] * 8), lambda: rig.namespace.keys_from_hashes([b"x" * 16]),
             lambda: rig.namespace.match(keys), lambda: rig.namespace.put(keys, 0, [0, 1]),
             lambda: rig.namespace.prefetch(keys), rig.namespace.label, rig.node.events]
    public = {n for cls in (flexkv.Node, flexkv.Space, flexkv.Namespace) for n in dir(cls) if not n.startswith("_")}
    assert len(calls) == len(public - {"open", "connect", "close", "closed", "name", "tokens_per_block"})
    for call in calls:
        with pytest.raises(flexkv.Error, match="the node is closed") as e:
            call()
        assert e.value.errno == errno.EBADF
    rig.node.close()
    assert rig.space.name == "default" and rig.space.tokens_per_block == 4


def test_with_statement():
    with open_node() as node:
        assert not node.closed
    assert node.closed


def test_namespace_keeps_its_node_alive(make_rig):
    rig = make_rig()
    keys = rig.keys(1, 2)
    rig.put(keys, [0, 1])
    namespace = rig.namespace
    rig.node = rig.space = rig.namespace = None
    assert namespace.match(keys).blocks == 2
    rig.node = open_node()


def test_collected_node_is_closed(tmp_path):
    for _ in range(3):
        node = open_node(ssd_cache_dir=tmp_path, ssd_cache_blocks=8)
        node.space(tokens_per_block=4, slice_bytes=4096)
        del node


def test_close_ends_a_waiting_poll(rig):
    result = []

    def wait():
        try:
            rig.node.poll(timeout_ms=-1)
        except flexkv.Error as e:
            result.append((e.errno, time.monotonic()))

    threads = [threading.Thread(target=wait) for _ in range(3)]
    for t in threads:
        t.start()
    time.sleep(0.2)
    start = time.monotonic()
    closers = [threading.Thread(target=rig.node.close) for _ in range(3)]
    for t in closers:
        t.start()
    for t in threads + closers:
        t.join(20)
        assert not t.is_alive()
    assert [e for e, _ in result] == [errno.EBADF] * 3
    assert max(t for _, t in result) - start < 2


def test_close_under_load():
    for _ in range(5):
        rig = Rig()
        keys = rig.keys(1, 8)
        unexpected = []

        def work():
            try:
                while True:
                    found = rig.namespace.match(keys)
                    if found.lease:
                        rig.node.get(found.lease, 0, list(range(found.blocks)))
                    rig.namespace.put(keys, 0, list(range(8)))
                    rig.node.poll(timeout_ms=1)
            except flexkv.Error as e:
                if e.errno != errno.EBADF:
                    unexpected.append(e)
            except BaseException as e:
                unexpected.append(e)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for t in threads:
            t.start()
        time.sleep(0.05)
        rig.node.close()
        for t in threads:
            t.join(20)
            assert not t.is_alive()
        assert not unexpected


# ---- threads, signals, forks ----

def test_gil_is_released_while_poll_waits(rig):
    counted = 0
    stop = threading.Event()

    def count():
        nonlocal counted
        while not stop.is_set():
            counted += 1

    thread = threading.Thread(target=count)
    thread.start()
    before, start = counted, time.monotonic()
    assert rig.node.poll(timeout_ms=400) == []
    waited, progress = time.monotonic() - start, counted - before
    stop.set()
    thread.join()
    assert 0.39 < waited < 5
    assert progress > 1000


def test_threads_get_their_own_bytes(make_rig):
    """Four threads put and get through one node; completions are handed round by operation."""
    rig = make_rig(cpu_cache_blocks=2048)
    lock, done, wrong = threading.Lock(), {}, []

    def finish(op):
        end = time.monotonic() + 20
        while time.monotonic() < end:
            for c in rig.node.poll(timeout_ms=5):
                with lock:
                    done[c.op] = c
            with lock:
                if op in done:
                    return done.pop(op)
        raise TimeoutError(op)

    def work(thread):
        try:
            pages, back = list(range(thread * 16, thread * 16 + 8)), list(range(thread * 16 + 8, thread * 16 + 16))
            for i in range(40):
                keys = rig.keys(1000 * thread + i, 8)
                for key, page in zip(split_keys(keys), pages):
                    rig.memory.fill(page, key)
                finish(rig.namespace.put(keys, 0, pages))
                found = rig.namespace.match(keys)
                c = finish(rig.node.get(found.lease, 0, back[:found.blocks]))
                if (found.blocks, c.blocks_ok) != (8, 8):
                    wrong.append((thread, i, found, c))
                for key, page in zip(split_keys(keys), back):
                    if not rig.memory.holds(page, key):
                        wrong.append((thread, i, page))
        except BaseException as e:
            wrong.append(e)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    assert not wrong


def test_signal_ends_a_wait(rig):
    class Alarm(Exception):
        pass

    def handler(*_):
        raise Alarm

    before = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        start = time.monotonic()
        with pytest.raises(Alarm):
            rig.node.poll(timeout_ms=20000)
        assert time.monotonic() - start < 5
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    keys = rig.keys(1, 2)
    assert rig.put(keys, [1, 2]).status == 0


def test_child_of_fork_is_refused_and_harmless():
    out = run_python("""
        import errno, gc, os, sys, warnings
        import flexkv
        from conftest import Rig, open_node
        rig = Rig()
        keys = rig.keys(1, 4)
        rig.put(keys, [0, 1, 2, 3])
        warnings.simplefilter("ignore")     # later Pythons warn of any fork with threads
        child = os.fork()
        if not child:
            for call in (rig.node.poll, lambda: rig.namespace.match(keys), rig.node.stats):
                try:
                    call()
                    sys.exit(3)
                except flexkv.Error as e:
                    if e.errno != errno.EBADF or "fork" not in str(e):
                        sys.exit(4)
            own = open_node()           # one of its own works
            rig.node.close()
            del rig
            gc.collect()
            sys.exit(0 if own.poll() == [] else 5)
        assert os.waitpid(child, 0)[1] == 0
        assert rig.get(keys, [10, 11, 12, 13]) == 4
        print("ok")
    """)
    assert out == "ok\n"


# ---- the end of the interpreter ----

@pytest.mark.parametrize("ending", [
    "",                                                         # all globals, in any order
    "import sys; sys.modules['keep'] = rig.node",
    "rig.cycle = rig",                                          # garbage, seen by no collection
    "import builtins; builtins.keep = (rig.namespace, rig)",
    "rig.node.close()",
    "import atexit; atexit.register(lambda: print(rig.node.closed))",
    "import threading; threading.Thread(target=rig.node.poll, args=(1, -1), daemon=True).start()",
    "import threading; threading.Thread(target=rig.node.poll, args=(1, 300)).start()",
    "import sys; sys.exit(0)",
    """
def work():
    while True:
        rig.namespace.put(keys, 0, list(range(8)))
        rig.node.poll()
import threading, time
threading.excepthook = lambda *_: None
threading.Thread(target=work, daemon=True).start()
time.sleep(0.1)
""",
])
def test_exit_with_open_nodes(ending):
    run_python(textwrap.dedent("""
        from conftest import Rig
        rig = Rig(ranks=2)
        keys = rig.keys(1, 8)
        rig.put(keys, list(range(8)))
        rig.node.get(rig.namespace.match(keys).lease, 0, list(range(8)))    # under way at the end
    """) + ending)


def test_nodes_are_closed_before_anything_goes_away():
    out = run_python("""
        import atexit
        kept = []
        atexit.register(lambda: print(kept[0].closed))      # before the import: runs after the module's own
        from conftest import open_node
        kept.append(open_node())
        atexit.register(lambda: print(kept[0].closed))
    """)
    assert out == "False\nTrue\n"


# ---- leaks ----

def rss_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def one_of_each(rig, keys, hashes, pages, tokens):
    ns, node = rig.namespace, rig.node
    ns.keys_from_hashes(hashes)
    ns.keys_from_tokens(tokens)
    rig.finish(ns.put(keys, 0, pages))
    rig.finish(node.get(ns.match(keys).lease, 0, pages))
    node.release(ns.match(bytearray(keys)).lease)
    node.stats()
    for call in (lambda: ns.match(b"x"), lambda: node.get(1, 0, pages), lambda: ns.put(keys, 0, [-1]),
                 lambda: ns.put(keys, 0, array.array("d", [1])), lambda: ns.keys_from_hashes([b"x"])):
        try:
            call()
        except (ValueError, TypeError, flexkv.Error):
            pass
        else:
            raise AssertionError("no error")


def test_nothing_leaks(rig):
    keys, pages, tokens = rig.keys(1, 16), array.array("I", range(16)), [10 ** 6 + i for i in range(2500)]
    hashes = [bytes([i]) * 32 for i in range(250)] * 2     # more than has room on the stack
    given = (rig, keys, hashes, pages, tokens)
    counted = (keys, hashes, pages, tokens, hashes[0], tokens[0], rig.node, rig.space, rig.namespace, flexkv.Match,
               flexkv.Completion, flexkv.Error, None)
    for _ in range(1000):
        one_of_each(*given)
    gc.collect()
    refs, objects, rss = [sys.getrefcount(o) for o in counted], sys.getallocatedblocks(), rss_bytes()
    for _ in range(20000):
        one_of_each(*given)
    gc.collect()
    assert sys.getallocatedblocks() - objects < 500
    assert rss_bytes() - rss < 2 << 20, "100 bytes each time"
    after = [sys.getrefcount(o) for o in counted]
    assert all(abs(a - b) < 100 for a, b in zip(after, refs)), list(zip(refs, after))


def test_buffers_are_let_go(rig):
    """What is still exported can't grow."""
    keys, pages = bytearray(rig.keys(1, 4)), array.array("I", range(4))
    rig.finish(rig.namespace.put(keys, 0, pages))
    for wrong in (pages[:3], array.array("d", range(4)), array.array("i", [-1] * 4)):
        with pytest.raises((ValueError, TypeError)):
            rig.namespace.put(keys, 0, wrong)
        wrong.append(1)
    found = rig.namespace.match(keys)
    rig.finish(rig.node.get(found.lease, 0, pages))
    keys.append(1)
    with pytest.raises(ValueError):
        rig.namespace.match(keys)
    keys.append(2)
    pages.append(3)
    rig.namespace.keys_from_tokens(pages)
    pages.append(4)


def test_opening_and_closing_does_not_leak():
    def once():
        with open_node(cpu_cache_blocks=4) as node:
            space = node.space(tokens_per_block=4, slice_bytes=4096, fingerprint=b"x")
            space.namespace("a", "b").match(b"")
            with pytest.raises(flexkv.Error):
                node.space("a/b", tokens_per_block=4, slice_bytes=4096)

    for _ in range(50):
        once()
    rss, fds = rss_bytes(), len(os.listdir("/proc/self/fd"))
    for _ in range(300):
        once()
    assert len(os.listdir("/proc/self/fd")) == fds
    assert rss_bytes() - rss < 2 << 20


def test_docstrings():
    for cls in (flexkv.Config, flexkv.Node, flexkv.Space, flexkv.Namespace, flexkv.Agent):
        for name, member in inspect.getmembers(cls):
            if not name.startswith("_"):
                assert member.__doc__, f"{cls.__name__}.{name}"
