"""The connectors' parts that need no engine: pages as regions, groups, identities, metadata."""
import importlib.util
import itertools
import json
import logging
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

if importlib.util.find_spec("vllm") is None or importlib.util.find_spec("flexkv") is None:
    pytest.skip("this Python has no vllm and flexkv", allow_module_level=True)

import torch

from flexkv.integration.vllm import identity, node, settings, versions
from flexkv.integration.vllm.geometry import (GeometryError, append, group_regions, layer_order,
                                              regions_of, tensor_regions)
from flexkv.integration.vllm.groups import (CHUNK, FULL, WINDOW, Group, Unsupported, alignment,
                                            groups_of, hash_block_size)
from flexkv.integration.vllm.layers import LayerLoads
from flexkv.integration.vllm.modes import load_modes
from flexkv.integration.vllm.protocol import (FailedLoad, LayerLoad, StepMetadata, StepStats,
                                              step_of)

BLOCKS = 6


# ---- regions -------------------------------------------------------------------------------------

def read(regions: list[tuple[int, int, int, int]], block: int) -> bytes:
    """What an agent would copy for a block."""
    import ctypes
    return b"".join(ctypes.string_at(base + stride * block, page)
                    for base, stride, page, _ in regions)


def numbered(*shape: int) -> torch.Tensor:
    return torch.arange(int(torch.tensor(shape).prod()), dtype=torch.int32).reshape(shape)


def check_pages(tensor: torch.Tensor, blocks_of: Any, most: int = 64) -> None:
    """Every element of a block is in its page once, and pages have nothing else in common."""
    regions = tensor_regions("layer", tensor, BLOCKS)
    assert len(regions) <= most
    assert all(pages == BLOCKS and stride >= page for _, stride, page, pages in regions)
    seen: set[int] = set()
    for block in range(BLOCKS):
        have = torch.frombuffer(bytearray(read(regions, block)), dtype=torch.int32).tolist()
        want = blocks_of(block).reshape(-1).tolist()
        assert sorted(have) == sorted(want)
        assert not seen & set(have)
        seen |= set(have)


def test_packed_block_first() -> None:
    t = numbered(BLOCKS, 4, 32, 16)
    check_pages(t, lambda b: t[b], most=1)


def test_tokens_before_heads_in_memory() -> None:
    """Logically heads first, physically tokens first: one run all the same."""
    t = numbered(BLOCKS, 32, 4, 16).permute(0, 2, 1, 3)
    check_pages(t, lambda b: t[b], most=1)


def test_k_and_v_adjacent() -> None:
    t = numbered(BLOCKS, 2, 16, 8, 4)
    check_pages(t, lambda b: t[b], most=1)


def test_k_and_v_outermost() -> None:
    t = numbered(2, BLOCKS, 16, 8, 4)
    check_pages(t, lambda b: t[:, b], most=2)
    assert len(tensor_regions("layer", t, BLOCKS)) == 2


def test_latent() -> None:
    for shape in ((BLOCKS, 16, 36), (BLOCKS, 1, 16, 36)):
        t = numbered(*shape)
        check_pages(t, lambda b, t=t: t[b], most=1)


def test_padded_rows() -> None:
    t = numbered(BLOCKS, 100)[:, :72].reshape(BLOCKS, 72).as_strided((BLOCKS, 9, 8), (100, 8, 1))
    check_pages(t, lambda b: t[b], most=1)


def test_kernel_blocks_smaller_than_blocks() -> None:
    t = numbered(BLOCKS * 4, 8, 16)
    check_pages(t, lambda b: t[4 * b:4 * b + 4], most=1)


def test_kernel_blocks_in_padded_rows() -> None:
    t = numbered(BLOCKS * 2, 20).as_strided((BLOCKS * 2, 4, 4), (20, 4, 1))
    check_pages(t, lambda b: t[2 * b:2 * b + 2], most=2)


def test_heads_outside_of_blocks() -> None:
    """A block is then as many runs as there are heads."""
    t = numbered(4, BLOCKS, 16, 8).permute(1, 0, 2, 3)
    check_pages(t, lambda b: t[b], most=4)
    assert len(tensor_regions("layer", t, BLOCKS)) == 4


def test_layers_of_one_allocation() -> None:
    """Blocks first, layers next: the layers' pages are one run."""
    whole = numbered(BLOCKS, 3, 8, 4)
    layers = {f"model.layers.{i}.attn": whole[:, i] for i in range(3)}
    regions, counts = group_regions(layers, BLOCKS)
    assert len(regions) == 1 and counts == [1, 0, 0], "the first layer brings the others' pages"
    assert read(regions, 4) == whole[4].numpy().tobytes()


def test_layers_apart_keep_their_order() -> None:
    tensors = [numbered(BLOCKS, 8) + 1000 * i for i in range(12)]
    names = [f"model.layers.{i}.attn" for i in range(12)]
    want = b"".join(t[3].numpy().tobytes() for t in tensors)
    for order in itertools.islice(itertools.permutations(range(12)), 0, 400_000, 99_991):
        regions, counts = group_regions({names[i]: tensors[i] for i in order}, BLOCKS)
        assert read(regions, 3) == want, "the order of a dict must not matter"
        assert counts == [1] * 12


def test_layers_that_share_a_tensor_count_once() -> None:
    t = numbered(BLOCKS, 8)
    assert group_regions({"a.0": t, "a.1": t}, BLOCKS) == (tensor_regions("a.0", t, BLOCKS), [1, 0])


def test_several_regions_in_a_layer() -> None:
    layers = {f"a.{i}": numbered(2, BLOCKS, 8, 4) for i in range(3)}
    regions, counts = group_regions(layers, BLOCKS)
    assert len(regions) == 6 and counts == [2, 2, 2]


def test_order_of_names() -> None:
    names = ["layers.10.attn", "layers.9.attn", "layers.9.k_cache", "mtp.0.attn", "layers.1.attn"]
    assert layer_order(names) == ["layers.1.attn", "layers.9.attn", "layers.9.k_cache",
                                  "layers.10.attn", "mtp.0.attn"]


def test_joined_keeps_gaps() -> None:
    def joined(*regions: tuple[int, int, int, int]) -> list[tuple[int, int, int, int]]:
        out: list[tuple[int, int, int, int]] = []
        for region in regions:
            append(out, region)
        return out
    assert joined((0, 100, 40, 9), (40, 100, 40, 9), (90, 100, 10, 9)) == [
        (0, 100, 80, 9), (90, 100, 10, 9)]
    assert joined((0, 100, 80, 9), (80, 100, 40, 9)) == [(0, 100, 80, 9), (80, 100, 40, 9)]


@pytest.mark.parametrize("shape,strides,words", [
    ((7, 4), (16, 4), "no dimension counts blocks"),
    ((), (), "no blocks"),
    ((BLOCKS, 4), (0, 4), "overlap"),
    ((BLOCKS, 4, 4), (64, 4, 4), "overlap"),
    ((BLOCKS, 2000, 4), (64000, 32, 4), "2000 pieces"),
])
def test_impossible_layouts(shape: Any, strides: Any, words: str) -> None:
    with pytest.raises(GeometryError, match=words) as e:
        regions_of("model.layers.3.attn", 0, shape, strides, 4, BLOCKS)
    assert "model.layers.3.attn" in str(e.value)


def test_other_devices_are_refused() -> None:
    with pytest.raises(GeometryError, match="CUDA devices only"):
        tensor_regions("layer", torch.empty(BLOCKS, 4, device="meta"), BLOCKS)


def test_pages_of_a_gpu() -> None:
    """As vLLM 0.24 has them there: 32 allocations, blocks of 16 tokens, K and V side by side."""
    layers = {f"model.layers.{i}.self_attn.attn": SimpleNamespace(
        device=torch.device("cuda", 0), shape=(BLOCKS, 2, 16, 8, 128), element_size=lambda: 2,
        stride=lambda: (32768, 16384, 1024, 128, 1), data_ptr=lambda i=i: 1 << 40 | i << 30)
        for i in range(32)}
    regions, counts = group_regions(layers, BLOCKS)
    assert regions == [(1 << 40 | i << 30, 65536, 65536, BLOCKS) for i in range(32)]
    assert counts == [1] * 32


def test_several_tensors_in_a_layer() -> None:
    with pytest.raises(GeometryError, match="2 tensors"):
        tensor_regions("mamba", [numbered(BLOCKS, 4)] * 2, BLOCKS)


# ---- groups --------------------------------------------------------------------------------------

def config(**cache: Any) -> Any:
    return SimpleNamespace(
        cache_config=SimpleNamespace(block_size=32, prefix_match_unit=None, hash_block_size=None,
                                     **cache),
        parallel_config=SimpleNamespace(tensor_parallel_size=1, pipeline_parallel_size=1))


def spec(name: str, block_size: int = 16, **more: Any) -> Any:
    return type(name, (SimpleNamespace,), {})(block_size=block_size, **more)


def kv_config(*specs: Any) -> Any:
    return SimpleNamespace(kv_cache_groups=[
        SimpleNamespace(layer_names=[f"layers.{i}"], kv_cache_spec=s)
        for i, s in enumerate(specs)])


def test_one_group_without_a_config() -> None:
    assert groups_of(config(), None) == [Group(0, FULL, 32, 0, ())]


def test_kinds_of_groups() -> None:
    groups = groups_of(config(), kv_config(
        spec("FullAttentionSpec"), spec("SlidingWindowSpec", 32, sliding_window=100),
        spec("ChunkedLocalAttentionSpec", attention_chunk_size=64), spec("MLAAttentionSpec", 48)))
    assert [(g.kind, g.block_size, g.reach, g.partial) for g in groups] == [
        (FULL, 16, 0, False), (WINDOW, 32, 100, True), (CHUNK, 16, 64, True), (FULL, 48, 0, False)]
    assert alignment(groups) == 96
    assert hash_block_size(config(), None, groups) == 16
    assert hash_block_size(config(), SimpleNamespace(hash_block_size=8), groups) == 8


def test_groups_wrapped_or_not_are_the_same() -> None:
    """Workers see a collection where the scheduler sees one of its members."""
    wrapped = spec("UniformTypeKVCacheSpecs", kv_cache_specs={
        "a": spec("MLAAttentionSpec"), "b": spec("MLAAttentionSpec")})
    plain = groups_of(config(), kv_config(spec("MLAAttentionSpec")))
    assert groups_of(config(), kv_config(wrapped)) == plain


@pytest.mark.parametrize("specs,words", [
    ([spec("FullAttentionSpec"), spec("MambaSpec")], "MambaSpec"),
    ([spec("SomethingNewSpec")], "SomethingNewSpec"),
    ([spec("FullAttentionSpec", non_causal=True)], "not causal"),
    ([], "no KV cache"),
])
def test_groups_that_are_refused(specs: list[Any], words: str) -> None:
    with pytest.raises(Unsupported, match=words):
        groups_of(config(), kv_config(*specs))


def test_groups_that_are_rebuilt_anyway_are_left_out() -> None:
    ring = spec("CircularBufferSpec", 2, prefix_cacheable=False)
    groups = groups_of(config(), kv_config(spec("FullAttentionSpec"), ring))
    assert [g.index for g in groups] == [0]


def test_context_parallel_is_refused() -> None:
    c = config()
    c.parallel_config.decode_context_parallel_size = 2
    with pytest.raises(Unsupported, match="decode_context_parallel_size"):
        groups_of(c, None)


# ---- identity ------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def engine_config(tmp_path_factory: pytest.TempPathFactory) -> Any:
    import tiny_model
    from vllm.engine.arg_utils import EngineArgs
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    path = tiny_model.write("gqa", tmp_path_factory.mktemp("tiny") / "tiny model!")
    return EngineArgs(model=str(path), skip_tokenizer_init=True, dtype="float32",
                      enforce_eager=True, block_size=32).create_engine_config()


ONE = Group(0, FULL, 32, 0, ())


def fingerprint(config: Any, group: Group = ONE, of: int = 1) -> bytes:
    return identity.group_identity(identity.engine_identity(config), group, of)


def test_identity_is_the_same_in_another_process(engine_config: Any, tmp_path: Path) -> None:
    """Also with another hash seed for Python's own sets and dicts."""
    script = tmp_path / "again.py"
    (tmp_path / "config").write_bytes(pickle.dumps(engine_config))
    script.write_text(
        "import pickle, sys\n"
        "from flexkv.integration.vllm import identity\n"
        "from flexkv.integration.vllm.groups import Group\n"
        f"c = pickle.loads(open({str(tmp_path / 'config')!r}, 'rb').read())\n"
        "sys.stdout.buffer.write(identity.group_identity(identity.engine_identity(c),"
        " Group(0, 'full', 32, 0, ()), 1))\n")
    out = subprocess.run([sys.executable, str(script)], capture_output=True, check=True).stdout
    assert out.endswith(fingerprint(engine_config)), "workers would not find the scheduler"


def test_names_of_spaces(engine_config: Any) -> None:
    text = fingerprint(engine_config)
    name = identity.space_name(engine_config, ONE, 1, text)
    assert name.startswith("tiny_model_-") and len(name) <= 63
    other = identity.space_name(engine_config, Group(1, WINDOW, 32, 9, ()), 2, text)
    assert other.endswith("-g1")
    config = SimpleNamespace(model_config=SimpleNamespace(model="/m/" + "x" * 200))
    assert len(identity.space_name(config, ONE, 2, text)) == 63


def test_what_changes_the_identity(engine_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {fingerprint(engine_config), fingerprint(engine_config, Group(0, FULL, 64, 0, ())),
             fingerprint(engine_config, Group(0, WINDOW, 32, 64, ())),
             fingerprint(engine_config, ONE, 2)}
    monkeypatch.setenv("VLLM_KV_CACHE_LAYOUT", "NHD")
    texts.add(fingerprint(engine_config))
    monkeypatch.delenv("VLLM_KV_CACHE_LAYOUT")
    monkeypatch.setenv("PYTHONHASHSEED", "7")
    texts.add(fingerprint(engine_config))
    monkeypatch.delenv("PYTHONHASHSEED")
    monkeypatch.setattr(engine_config.cache_config, "cache_dtype", "fp8")
    texts.add(fingerprint(engine_config))
    monkeypatch.undo()
    weights = Path(engine_config.model_config.model) / "model.safetensors"
    content = weights.read_bytes()
    with open(weights, "r+b") as f:
        f.seek(len(content) - 5)
        f.write(bytes([content[-5] ^ 1]))
    texts.add(fingerprint(engine_config))
    weights.write_bytes(content)
    assert len(texts) == 8
    assert fingerprint(engine_config) in texts


def test_content_sample(tmp_path: Path) -> None:
    def sample() -> str:
        return identity.content_sample(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    weights = tmp_path / "a.safetensors"
    weights.write_bytes(bytes(8 << 20))
    seen = {sample()}
    for at in (100, (8 << 20) - 100):
        data = bytearray(8 << 20)
        data[at] = 1
        weights.write_bytes(data)
        seen.add(sample())
    data = bytearray(8 << 20)
    data[3 << 20:4 << 20] = b"\1" * (1 << 20)       # an eighth of the weights, in the middle
    weights.write_bytes(data)
    seen.add(sample())
    (tmp_path / "config.json").write_text("[]")
    seen.add(sample())
    weights.rename(tmp_path / "b.safetensors")
    seen.add(sample())
    assert len(seen) == 6
    (tmp_path / "readme.md").write_text("not looked at")
    assert sample() in seen
    assert identity.content_sample(tmp_path / "nothing") == ""


def test_replicas() -> None:
    def replicas(tp: int, heads: int, mla: bool = False, draft: Any = None) -> int:
        return identity.kv_replicas(SimpleNamespace(
            model_config=SimpleNamespace(
                use_mla=mla, get_total_num_kv_heads=lambda: heads,
                hf_text_config=SimpleNamespace(num_key_value_heads=heads)),
            parallel_config=SimpleNamespace(tensor_parallel_size=tp),
            speculative_config=SimpleNamespace(draft_model_config=draft) if draft else None))
    assert [replicas(2, 8), replicas(8, 8), replicas(8, 2), replicas(6, 4)] == [1, 1, 4, 1]
    assert replicas(4, 1, mla=True) == 4
    assert replicas(4, 2, draft=SimpleNamespace(use_mla=False)) == 1
    assert replicas(4, 1, mla=True, draft=SimpleNamespace(use_mla=False)) == 1
    assert replicas(4, 1, mla=True, draft=SimpleNamespace(use_mla=True)) == 4


def test_hashes_that_no_other_process_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    strong, weak = (config(prefix_caching_hash_algo=a) for a in ("sha256_cbor", "xxhash"))
    assert identity.private_part(strong) == ()
    assert identity.private_part(weak) != identity.private_part(weak)
    monkeypatch.setenv("PYTHONHASHSEED", "3")
    assert identity.private_part(weak) == ()
    strong.cache_config.calculate_kv_scales = True
    assert identity.private_part(strong) != ()


def test_older_engines_get_a_fixed_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    c = config(prefix_caching_hash_algo="sha256")
    monkeypatch.setattr(identity, "_fixed_seed", lambda: "a constant of its own")
    assert not identity.fix_hash_seed(c)
    monkeypatch.setattr(identity, "_fixed_seed", lambda: None)
    assert identity.fix_hash_seed(c) and os.environ["PYTHONHASHSEED"] == "0"
    assert identity.hash_scheme(c) == (
        {"vllm": versions.vllm_version(), "algorithm": "sha256", "seed": "0"}, True)
    monkeypatch.delenv("PYTHONHASHSEED")
    assert not identity.fix_hash_seed(config(prefix_caching_hash_algo="xxhash"))


def test_adapters_are_told_apart_by_content(tmp_path: Path) -> None:
    def lora(number: int, **more: Any) -> Any:
        return SimpleNamespace(lora_name="a", lora_int_id=number, lora_path=str(tmp_path), **more)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"one")
    adapters = identity.Adapters()
    first = adapters.parts(lora(1))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"two")
    assert adapters.parts(lora(1)) == first         # the engine has the old one loaded
    assert adapters.parts(lora(2)) != first
    assert adapters.parts(lora(1, load_inplace=True)) == adapters.parts(lora(2))


def test_namespaces_of_requests() -> None:
    assert identity.requested_parts(SimpleNamespace()) == ()
    assert identity.requested_parts(SimpleNamespace(namespace_info="a")) == ("a",)
    assert identity.requested_parts(SimpleNamespace(namespace_info=["a", 5])) == ("a", "5")


# ---- daemon --------------------------------------------------------------------------------------

def options(address: str, **more: Any) -> settings.Settings:
    return settings.Settings(**{
        "enabled": True, "sync_get": False, "layerwise": False, "client": True, "launch": True,
        "address": address,
        "max_spaces": 1, "op_timeout": 20.0, "lease_timeout": 30.0, "start_timeout": 20.0, **more})


def test_a_daemon_is_started_and_is_nobodys_child(tmp_path: Path,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine's end takes all its descendants with it."""
    monkeypatch.setenv("FLEXKV_CPU_CACHE_GB", "1M")
    address = f"ipc://{tmp_path}/node"
    first = node.open_node(options(address), 3)
    status = json.loads(first.status())
    try:
        process = Path(f"/proc/{status['pid']}")
        assert f"\nPPid:\t{os.getpid()}\n" not in (process / "status").read_text()
        assert os.getpgid(status["pid"]) != os.getpgid(0)
        assert b"max_spaces=3" in (process / "cmdline").read_bytes()
        second = node.open_node(options(address, launch=False), 3)
        assert json.loads(second.status())["pid"] == status["pid"]
        second.close()
        first.close()
    finally:
        os.kill(status["pid"], signal.SIGKILL)


def test_a_daemon_that_can_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEXKV_CPU_CACHE_GB", "1M")
    monkeypatch.setattr(node, "_WINNER_SECONDS", 0.5)
    address = f"ipc://{tmp_path}/no/such/folder/node"
    start = time.monotonic()
    with pytest.raises(OSError, match="has ended, see its message above"):
        node.open_node(options(address), 1)
    assert time.monotonic() - start < 10


def test_replicas_of_a_dense_model() -> None:
    def replica(engine_id: str, **parallel: Any) -> bool:
        return settings._is_replica(SimpleNamespace(
            parallel_config=SimpleNamespace(**{"data_parallel_size": 1, **parallel}),
            kv_transfer_config=SimpleNamespace(engine_id=engine_id)))
    assert not replica("5c1f")
    assert replica("5c1f_dp0") and replica("x", data_parallel_size=2)
    assert replica("x", data_parallel_index=1)


# ---- what travels --------------------------------------------------------------------------------

def test_metadata_and_stats_can_be_pickled() -> None:
    meta = StepMetadata(7, [1, 2], [FailedLoad("r", [3], [4, 5])], [LayerLoad("s", [6], [7])])
    assert pickle.loads(pickle.dumps(meta)) == meta
    stats = StepStats(data={"loads": 1}, step=7)
    again = pickle.loads(pickle.dumps(stats))
    assert (again.data, again.step, bool(again)) == ({"loads": 1}, 7, True)


def test_stats_add_up() -> None:
    worker = StepStats(step=9).aggregate(StepStats(step=9))
    total = worker.aggregate(StepStats(data={"loads": 2, "cpu_blocks": 10, "cpu_used_blocks": 5}))
    total.aggregate(StepStats(data={"loads": 3, "cpu_blocks": 10, "cpu_used_blocks": 6}))
    assert total.step == 9 and not total.is_empty()
    assert total.data == {"loads": 5, "cpu_blocks": 10, "cpu_used_blocks": 6}
    assert total.reduce()["cpu tier used %"] == 60.0
    json.dumps(total.to_dict())
    clone = total.clone_and_reset()
    assert clone.data["loads"] == 5 and total.is_empty()


def test_step_of_an_output() -> None:
    def output(stats: Any) -> Any:
        return SimpleNamespace(kv_connector_stats=stats)
    assert step_of(output(StepStats(step=4, fenced=True))) == (4, True)
    assert step_of(output(SimpleNamespace(data={"Other": 1, "FlexKV": StepStats(step=5)}))) == (5, False)
    assert step_of(output(None)) == step_of(None) == (0, False)
    both = StepStats(step=4, fenced=True).aggregate(StepStats(step=4))
    assert step_of(output(both)) == (4, False)


# ---- loads layer by layer ------------------------------------------------------------------------

class FakeAgent:
    """Operation 9 fails at layer 1."""

    def __init__(self) -> None:
        self.waits: list[tuple[int, int]] = []      # operation, layer

    def wait_layer(self, ops: list[int], layer: int, stream: int, timeout_ms: int) -> int:
        assert stream == 77 and timeout_ms > 0
        self.waits += [(op, layer) for op in ops]
        return -5 if 9 in ops and layer == 1 else 0


def layer_loads() -> tuple[LayerLoads, FakeAgent]:
    agent = FakeAgent()
    return LayerLoads(agent, ["a.0", "a.1", "a.2"], lambda: 77, 5.0), agent


def ask(loads: LayerLoads, *names: str) -> None:
    for name in names:
        if loads.active:
            loads.wait(name)


def test_layers_wait_for_their_own_part() -> None:
    """From the second step on: it is not known before which layers ask."""
    loads, agent = layer_loads()
    loads.begin([LayerLoad("r", [1], [10, 11])], True)
    assert agent.waits == [(1, 0), (1, 1), (1, 2)]
    ask(loads, "a.0", "a.1")            # the last one never asks
    assert loads.finish() == [] and not loads.active
    agent.waits.clear()
    loads.begin([LayerLoad("r", [2], [10]), LayerLoad("s", [3], [11])], True)
    assert agent.waits == [(2, 2), (3, 2)]
    ask(loads, "a.0", "a.1")
    assert agent.waits[2:] == [(2, 0), (3, 0), (2, 1), (3, 1)]
    assert loads.finish() == []


def test_a_step_without_hooks_waits_for_all() -> None:
    loads, agent = layer_loads()
    for _ in range(2):
        agent.waits.clear()
        loads.begin([LayerLoad("r", [1], [10])], True)
        ask(loads, "a.0", "a.1", "a.2")
        assert loads.finish() == []
    agent.waits.clear()
    loads.begin([LayerLoad("r", [1], [10])], False)
    assert agent.waits == [(1, 0), (1, 1), (1, 2)]
    assert loads.finish() == []


def test_a_layer_that_does_not_come() -> None:
    loads, agent = layer_loads()
    loads.begin([LayerLoad("r", [9], [10, 11]), LayerLoad("s", [3], [12])], True)
    assert (9, 2) not in agent.waits and (3, 2) in agent.waits
    ask(loads, "a.0", "a.1", "a.2")
    assert loads.finish() == [FailedLoad("r", [9], [10, 11], waiting=False)]


def test_a_layer_that_was_not_asked_for() -> None:
    """It was computed on what was there, so its load is as good as failed."""
    loads, _ = layer_loads()
    loads.begin([LayerLoad("r", [1], [10])], True)
    ask(loads, "a.0", "a.1", "a.2")
    assert loads.finish() == []
    loads.begin([LayerLoad("r", [2], [10])], True)
    ask(loads, "a.0")
    assert [f.ops for f in loads.finish()] == [[2]]
    loads.begin([LayerLoad("r", [3], [10])], True)      # what does not ask is waited for at once
    ask(loads, "a.0")
    assert loads.finish() == []


def test_a_layer_with_another_ones_pages() -> None:
    loads, agent = layer_loads()
    for op in (1, 2):
        loads.begin([LayerLoad("r", [op], [10])], True)
        ask(loads, "a.0", "shared", "a.1", "a.2")
        assert loads.finish() == []
    assert agent.waits[3:] == [(2, 0), (2, 1), (2, 2)]


def test_which_steps_have_hooks() -> None:
    def context(metadata: Any, mode: str) -> Any:
        return SimpleNamespace(attn_metadata=metadata,
                               cudagraph_runtime_mode=SimpleNamespace(name=mode))
    assert versions.calls_layer_hooks(context({}, "NONE"))
    assert versions.calls_layer_hooks(context({}, "PIECEWISE"))
    assert not versions.calls_layer_hooks(context({}, "FULL"))
    assert not versions.calls_layer_hooks(context(None, "NONE"))


def test_what_keeps_loads_out_of_steps(caplog: pytest.LogCaptureFixture) -> None:
    def chosen(policy: str = "recompute", full: bool = True, sync: bool = False, kind: str = FULL,
               **engine: Any) -> tuple[bool, bool]:
        config = SimpleNamespace(kv_transfer_config=SimpleNamespace(kv_load_failure_policy=policy),
                                 **engine)
        spaces: Any = [SimpleNamespace(group=Group(0, kind, 16, 0, ()))]
        return load_modes(options("", sync_get=sync, layerwise=True), config, spaces, full=full)
    log = logging.getLogger("vllm.flexkv")
    before, log.propagate = log.propagate, True
    try:
        assert chosen() == chosen(sync=True) == (True, True) and not caplog.records
        assert chosen(use_v2_model_runner=True, policy="fail") == (True, True)
        for unfit in ({"use_v2_model_runner": True}, {"max_concurrent_batches": 2},
                      {"kind": WINDOW}, {"full": False}, {"speculative_config": 1}):
            caplog.clear()
            assert chosen(**unfit) == (False, False)
            assert len(caplog.records) == 1, "one warning, which says why"
        assert chosen(sync=True, full=False) == (True, False)
    finally:
        log.propagate = before


# ---- versions ------------------------------------------------------------------------------------

def test_this_version_is_known() -> None:
    versions.check(full=True)
    versions.check(full=False)


def test_unknown_interface_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "_KNOWN_ABSTRACT", versions._KNOWN_ABSTRACT - {"wait_for_save"})
    monkeypatch.setattr(versions, "_HOOKS", versions._HOOKS | {"teleport"})
    with pytest.raises(RuntimeError) as e:
        versions.check(full=False)
    for words in (versions.vllm_version(), "wait_for_save", "teleport", "0.32.0",
                  versions.ANY_VERSION):
        assert words in str(e.value)
    monkeypatch.setenv(versions.ANY_VERSION, "1")
    versions.check(full=False)
