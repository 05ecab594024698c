"""The extension module: the package, its configuration, put, match and get, SSD."""
import ast
import ctypes
import errno
import importlib.metadata
import pickle
import re
import select
import subprocess
import sys
from pathlib import Path

import pytest

import flexkv
from conftest import KEY_BYTES, block_bytes, run_python, split_keys

HERE = Path(__file__).resolve().parent


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
