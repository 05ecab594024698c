"""Configuration objects, layouts, regions, masks and hashes: what needs no node and no workers."""
import json
import pickle
import types

import pytest

np = pytest.importorskip("numpy")

import flexkv
from flexkv.common.block import SequenceMeta, format_block_hash, hash_token
from flexkv.common.config import (
    GLOBAL_CONFIG_FROM_ENV,
    CacheConfig,
    LayerGroupSpec,
    ModelConfig,
    RankInfo,
    UserConfig,
    convert_to_block_num,
    load_user_config_from_env,
    load_user_config_from_file,
    parse_path_list,
    recompute_cache_block_counts,
    update_default_config_from_user_config,
)
from flexkv.common.dtypes import dtype_bytes, dtype_name
from flexkv.common.env import load_global_config, parse_gib
from flexkv.common.hash_utils import Hasher, gen_hashes
from flexkv.common.node_config import node_config, node_settings
from flexkv.common.rank import note_rank, noted_rank, replicas
from flexkv.common.request import KVResponse, KVResponseStatus
from flexkv.common.storage import KVCacheLayout, KVCacheLayoutType
from flexkv.integration.config import FlexKVConfig
from flexkv.kvtask import node_address
from flexkv.server.client import KVTPClient
from flexkv.server.regions import group_regions, kv_regions
from flexkv.transfer.layerwise import build_layerwise_eventfd_socket_path
from flexkv.transfer_manager import TransferManagerOnRemote

FIRST, BLOCK, WHOLE = (KVCacheLayoutType.LAYERFIRST, KVCacheLayoutType.LAYERBLOCK,
                       KVCacheLayoutType.BLOCKFIRST)


@pytest.fixture(autouse=True)
def global_config(monkeypatch):
    """What a test changes in the process's configuration is undone."""
    for name, value in vars(GLOBAL_CONFIG_FROM_ENV).items():
        monkeypatch.setattr(GLOBAL_CONFIG_FROM_ENV, name, value)


# ---- the user's settings ----

def test_environment(monkeypatch):
    monkeypatch.setenv("FLEXKV_CPU_CACHE_GB", "0.5")
    monkeypatch.setenv("FLEXKV_SSD_CACHE_GB", "2T")
    monkeypatch.setenv("FLEXKV_SSD_CACHE_DIR", "/mnt/a; /mnt/b;")
    monkeypatch.setenv("FLEXKV_USE_HUGEPAGE_CPU_BUFFER", "1")
    monkeypatch.setenv("FLEXKV_SWA_MULTI_GROUP", "0")
    config = load_user_config_from_env()
    assert (config.cpu_cache_gb, config.ssd_cache_gb) == (0.5, 2048)
    assert config.ssd_cache_dir == ["/mnt/a", "/mnt/b"]
    assert config.use_hugepage_cpu_buffer is True and config.swa_multi_group is False


def test_defaults(monkeypatch):
    for name in ("CPU_CACHE_GB", "SSD_CACHE_GB", "SSD_CACHE_DIR", "SWA_MULTI_GROUP"):
        monkeypatch.delenv("FLEXKV_" + name, raising=False)
    config = load_user_config_from_env()
    assert (config.cpu_cache_gb, config.ssd_cache_gb) == (16, 0)
    assert config.ssd_cache_dir == ["./flexkv_ssd"] and config.swa_multi_group is None
    assert UserConfig().ssd_cache_dir == "./ssd_cache"
    cache = CacheConfig()
    assert (cache.tokens_per_block, cache.num_cpu_blocks, cache.num_ssd_blocks,
            cache.eviction_policy) == (16, 1000000, 10000000, "lru")


@pytest.mark.parametrize("text, gib", [
    ("16", 16), (3, 3), ("0.5", 0.5), ("512M", 0.5), ("2g", 2), ("1.5T", 1536), ("2GiB", 2),
    ("4096B", 4096 / 2**30), ("64KiB", 2**-14)])
def test_sizes(text, gib):
    assert parse_gib(text) == gib


@pytest.mark.parametrize("variable, value", [
    ("FLEXKV_CPU_CACHE_GB", "much"), ("FLEXKV_ENABLE_GDS", "perhaps"),
    ("FLEXKV_HUGEPAGE_SIZE_BYTES", "2M?")])
def test_a_bad_variable_is_named(monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=variable):
        load_user_config_from_env()


def test_global_config_reads_its_variables(monkeypatch):
    monkeypatch.setenv("FLEXKV_EVICT_RATIO", "0.1")
    monkeypatch.setenv("FLEXKV_CPU_LAYOUT", "layerfirst")
    monkeypatch.setenv("FLEXKV_SERVER_CLIENT_MODE", "1")
    config = load_global_config()
    assert config.evict_ratio == 0.1 and config.cpu_layout_type is FIRST
    assert config.server_client_mode is True
    assert config.server_recv_port == "ipc:///tmp/flexkv_server"
    monkeypatch.setenv("FLEXKV_INSTANCE_ID", "one")
    with pytest.raises(ValueError, match="FLEXKV_INSTANCE_ID"):
        load_global_config()


@pytest.mark.parametrize("bad", [{"cpu_cache_gb": 0}, {"ssd_cache_gb": -1},
                                 {"swa_multi_group": "false"}])
def test_bad_user_config(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        UserConfig(**bad)


def write(path, content):
    path.write_text(json.dumps(content))
    return str(path)


def test_file_and_its_overrides(tmp_path):
    path = write(tmp_path / "f.json", {
        "cpu_cache_gb": 3, "ssd_cache_gb": 1, "ssd_cache_dir": "/a;/b", "evict_ratio": "0.05",
        "eviction_policy": "arc", "server_recv_port": "ipc:///run/kv", "redis_password": None,
        "enable_metrics": True, "ssd_write_policy": "on_reuse"})
    user = load_user_config_from_file(path)
    assert (user.cpu_cache_gb, user.ssd_cache_dir) == (3, ["/a", "/b"])
    assert user.override_eviction_policy == "arc" and "redis_password" not in user.overrides()
    cache = CacheConfig()
    model = ModelConfig(num_layers=4, num_kv_heads=8, head_size=128, dtype="float16")
    update_default_config_from_user_config(RankInfo(model), cache, user)
    block = 4 * 8 * 128 * 2 * 2 * 16
    assert cache.num_cpu_blocks == 3 * 2**30 // block
    assert cache.num_ssd_blocks == 2**30 // block and cache.enable_ssd
    assert GLOBAL_CONFIG_FROM_ENV.evict_ratio == 0.05
    assert GLOBAL_CONFIG_FROM_ENV.enable_metrics is True
    assert GLOBAL_CONFIG_FROM_ENV.server_recv_port == "ipc:///run/kv"
    settings = node_settings(model, cache)
    assert settings["cpu_cache_gb"] == "3" and settings["num_cpu_blocks"] == "0"
    assert settings["eviction_policy"] == "arc" and settings["evict_ratio"] == "0.05"
    assert settings["ssd_cache_dir"] == "/a;/b"


def test_yaml_file(tmp_path):
    pytest.importorskip("yaml")
    path = tmp_path / "f.yml"
    path.write_text("cpu_cache_gb: 512M\nssd_cache_dir: [/a, /b]\n")
    user = load_user_config_from_file(str(path))
    assert user.cpu_cache_gb == 0.5 and user.ssd_cache_dir == ["/a", "/b"]


def test_legacy_file(tmp_path):
    path = write(tmp_path / "f.json", {
        "server_recv_port": "ipc:///tmp/x",
        "cache_config": {"enable_cpu": True, "num_cpu_blocks": 10240, "enable_ssd": True,
                         "num_ssd_blocks": 20480, "ssd_cache_dir": "/a", "evict_ratio": 0.1},
        "num_log_interval_requests": 2000})
    cache, model = CacheConfig(), ModelConfig()
    update_default_config_from_user_config(model, cache, load_user_config_from_file(path))
    assert (cache.num_cpu_blocks, cache.num_ssd_blocks, cache.enable_ssd) == (10240, 20480, True)
    settings = node_settings(model, cache)
    assert settings["num_cpu_blocks"] == "10240" and "cpu_cache_gb" not in settings
    assert GLOBAL_CONFIG_FROM_ENV.server_recv_port == "ipc:///tmp/x"


@pytest.mark.parametrize("name, content, message", [
    ("f.txt", "{}", "must end in"), ("f.json", "[1]", "keys and values"),
    ("f.json", '{"cpu_cache_gb": "x"}', "no size")])
def test_bad_files(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        load_user_config_from_file(str(path))


def test_node_config_takes_every_setting(tmp_path):
    """Each option that can be set from here is one that the node knows."""
    cache = CacheConfig(enable_ssd=True, ssd_cache_dir="/a", num_ssd_blocks=5, enable_gds=True,
                        enable_p2p_cpu=True, redis_host="h", redis_port=1, redis_password="p",
                        hugepage_size_bytes=1 << 30, eviction_policy="slru",
                        use_hugepage_cpu_buffer=True, local_ip="1.2.3.4", node_ttl_seconds=5)
    for name, value in (("evict_ratio", 0.2), ("evict_start_threshold", 0.5),
                        ("hit_reward_seconds", 3), ("slru_protected_threshold", 4),
                        ("iouring_entries", 64), ("lease_ttl_ms", 5), ("enable_metrics", True),
                        ("trace_max_files", 3), ("trace_max_file_size_mb", 1)):
        setattr(GLOBAL_CONFIG_FROM_ENV, name, value)
    config = node_config(node_settings(ModelConfig(), cache))
    assert config.get("num_ssd_blocks") == "5" and config.get("evict_ratio") == "0.2"
    assert config.get("redis_host") == "h" and config.get("ssd_recreate") == "1"
    assert config.get("eviction_policy") == "slru"


def test_a_named_model_keeps_what_is_on_ssd():
    cache = CacheConfig(enable_ssd=True, ssd_cache_dir="/a", num_ssd_blocks=5)
    assert "ssd_recreate" not in node_settings(ModelConfig(model_id="m"), cache)


# ---- the model ----

def test_model_config_says_mla_in_either_way():
    assert ModelConfig(use_mla=True).kv_dim == 1 and ModelConfig(kv_dim=1).use_mla
    assert not ModelConfig().use_mla
    with pytest.raises(AttributeError):
        ModelConfig().use_mla = True
    with pytest.raises(ValueError, match="contradict"):
        ModelConfig(use_mla=True, kv_dim=2)


def test_freeze():
    config = ModelConfig(tp_size=2, attn_cp_size=2)
    config.freeze()
    assert config.cp_size == 2 and config.effective_tp_size == 4
    with pytest.raises(AttributeError, match="tp_size"):
        config.tp_size = 4
    config.layer_groups = None
    assert pickle.loads(pickle.dumps(config)) == config
    with pytest.raises(ValueError, match="instance_num"):
        ModelConfig(instance_num=0).freeze()
    with pytest.raises(ValueError, match="cp_size"):
        ModelConfig(cp_size=2, attn_cp_size=4).freeze()


@pytest.mark.parametrize("groups, message", [
    ([LayerGroupSpec(2, 1, 1, [0])], "layer_indices"),
    ([LayerGroupSpec(2, 1, 1, [1, 1])], "duplicates"),
    ([LayerGroupSpec(1, 1, 1, [4])], "out of range"),
    ([LayerGroupSpec(1, 1, 1, [0], compress_ratio=0)], "compress_ratio")])
def test_bad_layer_groups(groups, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(num_layers=4, layer_groups=groups).freeze()


def test_ranks():
    model = ModelConfig(tp_size=4, pp_size=2, dp_size=2)
    rank = RankInfo(model, tp_rank=3, pp_rank=1, dp_rank=1, instance_id=2)
    assert (rank.intra_client_id, rank.dp_client_id, rank.local_rank) == (7, 5, 15)
    assert rank.model_config.workers_per_client == 8 and model.total_gpus == 16
    stage = RankInfo(ModelConfig(num_layers=10), pp_start_layer=4, pp_end_layer=10)
    assert stage.num_layers_per_pp_stage == 6
    assert RankInfo(ModelConfig(cp_size=2, tp_size=2), attn_cp_rank=1).intra_client_id == 2
    with pytest.raises(ValueError, match="cp_rank"):
        RankInfo(model, cp_rank=1, attn_cp_rank=2)


def test_replicas_need_an_adapters_word():
    latent = ModelConfig(num_kv_heads=1, kv_dim=1, tp_size=4)
    assert replicas(latent, None) == 1
    note_rank(RankInfo(latent))
    try:
        assert replicas(latent, noted_rank(0)) == 4 and noted_rank(1) is None
        assert replicas(ModelConfig(num_kv_heads=8, tp_size=4), noted_rank(0)) == 1
    finally:
        note_rank(None)


def test_sizes_of_blocks():
    model = ModelConfig(num_layers=3, num_kv_heads=2, head_size=8, dtype="float16", tp_size=2)
    assert model.token_size_in_bytes == 3 * 2 * 8 * 2 * 2
    cache = CacheConfig(tokens_per_block=16)
    user = UserConfig(cpu_cache_gb=1, ssd_cache_gb=1, ssd_cache_dir=["/a", "/b", "/c"])
    update_default_config_from_user_config(RankInfo(model), cache, user)
    assert cache.num_ssd_blocks % 3 == 0
    before = cache.num_cpu_blocks
    assert recompute_cache_block_counts(model, cache) is False
    model.layer_groups = [LayerGroupSpec(3, 1, 8, [0, 1, 2]),
                          LayerGroupSpec(2, 1, 12, [0, 1], dtype="uint8", compress_ratio=4)]
    assert recompute_cache_block_counts(model, cache) is True
    block = 2 * (3 * 2 * 16 * 8 * 2 + 2 * 2 * 4 * 12)
    assert cache.num_cpu_blocks == convert_to_block_num(1, block) != before
    layout = KVCacheLayout(WHOLE, 3, 1, 16, 1, 8, tp_size=2, layer_groups=[
        LayerGroupSpec(3, 1, 8, [0, 1, 2], "float16"), model.layer_groups[1]])
    assert layout.kv_shape == (1, block) and layout.get_block_stride() == block
    assert [g["offset_elements"] for g in layout.get_group_strides()] == [0, 3 * 2 * 16 * 8]


def test_dtypes():
    assert dtype_bytes("bf16") == 2 and dtype_bytes(np.dtype("int64")) == 8
    assert dtype_name("torch.bfloat16") == "bfloat16" and dtype_name("nvfp4") == "uint8"
    assert dtype_name(np.dtype("float16")) == "float16"
    with pytest.raises(ValueError, match="known"):
        dtype_bytes("float13")


# ---- layouts ----

@pytest.mark.parametrize("kind, shape, strides", [
    (FIRST, (3, 2, 5, 16, 4, 8), (5120, 2560, 512)),
    (BLOCK, (3, 5, 2, 16, 4, 8), (5120, 512, 1024)),
    (WHOLE, (5, 3, 2, 16, 4, 8), (1024, 512, 3072))])
def test_layout_shapes(kind, shape, strides):
    layout = KVCacheLayout(kind, 3, 5, 16, 4, 8, kv_dim=2, num_kv_heads=8)
    assert layout.kv_shape == shape and layout.kv_shape[1:].numel() == 15360 // shape[0]
    assert (layout.get_layer_stride(), layout.get_kv_stride(), layout.get_block_stride()) == strides
    assert layout.get_chunk_size() == 512 and layout.get_total_elements() == 15360
    assert layout.get_elements_per_block() == 3072
    assert pickle.loads(pickle.dumps(layout)) == layout


def test_layout_keywords_of_both_generations():
    new = KVCacheLayout(type=FIRST, num_layer=3, num_block=5, tokens_per_block=16, num_head=1,
                        head_size=8, kv_dim=1, num_kv_heads=1)
    assert KVCacheLayout(type=FIRST, num_layer=3, num_block=5, tokens_per_block=16, num_head=1,
                         head_size=8, is_mla=True) == new
    assert KVCacheLayout(FIRST, 3, 5, 16, 1, 8, True) == new
    assert KVCacheLayout(FIRST, 3, 5, 16, 1, 8, False).kv_dim == 2
    assert KVCacheLayout(FIRST, 3, 5, 16, num_kv_heads=4, head_size=8).num_head == 4
    assert new.is_mla and KVCacheLayout("LAYERFIRST", 3, 5, 16, 1, 8, 1) == new
    with pytest.raises(ValueError, match="contradict"):
        KVCacheLayout(FIRST, 3, 5, 16, 1, 8, 2, is_mla=True)
    with pytest.raises(ValueError, match="BLOCKFIRST"):
        KVCacheLayout(FIRST, 3, 5, 16, 1, 8, layer_groups=[LayerGroupSpec(1, 1, 1, [0], "int8")])


def test_layout_division():
    layout = KVCacheLayout(FIRST, 4, 6, 16, 8, 8)
    assert layout.div_head(4).num_head == 2 and layout.div_layer(2).num_layer == 2
    assert layout.div_block(3).num_block == 2 and layout.div_block(4, padding=True).num_block == 2
    for divide in (lambda: layout.div_head(3), lambda: layout.div_block(4),
                   lambda: layout.div_layer(3)):
        with pytest.raises(ValueError, match="divided"):
            divide()


# ---- regions ----

class Tensor:
    """int16 elements at a made-up address."""

    def __init__(self, base, shape, strides=None):
        self.base, self.shape = base, shape
        if strides is None:
            strides = [int(np.prod(shape[i + 1:])) for i in range(len(shape))]
        self.strides = tuple(strides)

    def data_ptr(self):
        return self.base

    def element_size(self):
        return 2

    def stride(self):
        return self.strides


PAGE = 16 * 4 * 8 * 2


def layout_of(kind=FIRST, kv=2, heads=4, layers=2, blocks=5, tokens=16):
    return KVCacheLayout(kind, layers, blocks, tokens, heads, 8, kv_dim=kv, num_kv_heads=heads)


def test_layer_first_regions():
    tensors = [Tensor(0, (2, 5, 16, 4, 8)), Tensor(100000, (2, 5, 16, 4, 8))]
    assert kv_regions(tensors, layout_of()) == [
        (0, PAGE, PAGE, 5), (5 * PAGE, PAGE, PAGE, 5),
        (100000, PAGE, PAGE, 5), (100000 + 5 * PAGE, PAGE, PAGE, 5)]
    whole = [Tensor(0, (2, 2, 5, 16, 4, 8))]
    assert [r[0] for r in kv_regions(whole, layout_of())] == [0, 5 * PAGE, 10 * PAGE, 15 * PAGE]


def test_neighbouring_pages_become_one():
    assert kv_regions([Tensor(0, (5, 2, 16, 4, 8)), Tensor(77777, (5, 2, 16, 4, 8))],
                      layout_of(BLOCK)) == [(0, 2 * PAGE, 2 * PAGE, 5),
                                            (77777, 2 * PAGE, 2 * PAGE, 5)]
    assert kv_regions([Tensor(0, (5, 2, 2, 16, 4, 8))], layout_of(WHOLE)) == [
        (0, 4 * PAGE, 4 * PAGE, 5)]


def test_k_tensors_and_then_v_tensors():
    tensors = [Tensor(i * 10**6, (83, 4, 8)) for i in range(4)]     # 5 pages of 16 slots, and a rest
    assert kv_regions(tensors, layout_of()) == [
        (layer * 10**6 + kv * 2 * 10**6, PAGE, PAGE, 5) for layer in range(2) for kv in range(2)]


def test_one_buffer_per_layer():
    latent = layout_of(kv=1, heads=1)
    for shape in ((5, 16, 8), (1, 5, 16, 1, 8), (80, 1, 8), (5, 16, 1, 8)):
        assert kv_regions([Tensor(0, shape), Tensor(9999, shape)], latent) == [
            (0, 256, 256, 5), (9999, 256, 256, 5)]


def test_pages_may_lie_apart_and_be_permuted():
    packed = layout_of(kv=1)
    tensors = [Tensor(base, (5, 4, 16, 8), (1000, 8, 32, 1)) for base in (0, 50000)]
    assert kv_regions(tensors, packed) == [(0, 2000, PAGE, 5), (50000, 2000, PAGE, 5)]


@pytest.mark.parametrize("tensors, message", [
    ([Tensor(0, (2, 5, 4, 16, 8))] * 2, "head-major"),
    ([Tensor(0, (2, 5, 16, 4, 8), (10**5, 600, 32, 8, 1))] * 3, "don't fit"),
    ([Tensor(0, (2, 6, 16, 4, 8))] * 2, "don't fit"),
    ([Tensor(0, (5, 2, 16, 4, 8))] * 2, "don't fit"),
    ([Tensor(0, (2, 5, 16, 4, 8), (10**5, 1000, 40, 8, 1))] * 2, "one run"),
    ([], "no KV cache tensors")])
def test_what_can_not_be_registered(tensors, message):
    with pytest.raises(ValueError, match=message):
        kv_regions(tensors, layout_of())


def test_groups_share_page_numbers():
    indexer = KVCacheLayout(FIRST, 2, 4, 1, 1, 33, kv_dim=1)
    regions = group_regions([([Tensor(0, (2, 5, 16, 4, 8)), Tensor(10**5, (2, 5, 16, 4, 8))],
                              layout_of()),
                             ([Tensor(10**6, (4, 33)), Tensor(10**7, (4, 33))], indexer)])
    assert {r[3] for r in regions} == {4} and [r[2] for r in regions] == [PAGE] * 4 + [66] * 2


# ---- clients ----

def test_addresses():
    assert node_address("ipc:///tmp/x_gpu_register") == node_address("ipc:///tmp/x") == "ipc:///tmp/x"
    config = FlexKVConfig(server_recv_port="ipc:///tmp/x")
    assert config.gpu_register_port == "ipc:///tmp/x_gpu_register"


def test_other_devices_are_refused_clearly():
    client = KVTPClient("ipc://@nobody", dp_client_id=0, device_id=0)
    tensor = Tensor(0, (2, 5, 16, 4, 8))
    tensor.device = types.SimpleNamespace(type="xpu")
    with pytest.raises(NotImplementedError, match="xpu"):
        client.register_to_server([tensor, tensor], layout_of())
    with pytest.raises(NotImplementedError, match="swa_caches"):
        client.register_to_server([tensor], layout_of(), swa_caches=[tensor])
    with pytest.raises(ValueError, match="indexer_layout"):
        client.register_to_server([tensor], layout_of(), indexer_buffers=[tensor])
    with pytest.raises(ValueError, match="gpu_layouts"):
        client.register_to_server([tensor], layout_of(), handles_per_group=[[tensor]])


def test_worker_numbers():
    assert KVTPClient("ipc://@nobody", 0, 3).intra_client_id == 3
    assert KVTPClient("ipc://@nobody", 1, 3, intra_client_id=1).intra_client_id == 1
    with pytest.raises(ValueError, match="intra_client_id"):
        KVTPClient("ipc://@nobody", 1, 3)


def test_ranks_on_other_machines_are_refused_clearly():
    with pytest.raises(NotImplementedError, match="several machines"):
        TransferManagerOnRemote.create_process(master_host="h", master_ports=("1", "2", "3"))


def test_layerwise_socket_path(monkeypatch):
    monkeypatch.delenv("FLEXKV_LAYERWISE_EVENTFD_SOCKET", raising=False)
    path = build_layerwise_eventfd_socket_path
    assert path(0, 0, ModelConfig()) == "/tmp/flexkv_layerwise_eventfd.sock"
    monkeypatch.setenv("FLEXKV_LAYERWISE_EVENTFD_SOCKET", "/run/x.sock")
    assert path(3, 1, ModelConfig(pp_size=2, dp_size=4)) == "/run/x_pp1_dp3.sock"


# ---- FlexKVConfig ----

def test_flexkv_config_from_env(monkeypatch, tmp_path):
    monkeypatch.setenv("ENABLE_FLEXKV", "0")
    monkeypatch.setenv("FLEXKV_CPU_CACHE_GB", "7")
    monkeypatch.delenv("FLEXKV_CONFIG_PATH", raising=False)
    config = FlexKVConfig.from_env()
    assert config.enable_flexkv is False and config.user_config.cpu_cache_gb == 7
    monkeypatch.setenv("FLEXKV_CONFIG_PATH", write(tmp_path / "f.json", {"ssd_cache_gb": 40}))
    config = FlexKVConfig.from_env()        # with a file, sizes in the environment do not count
    assert (config.user_config.cpu_cache_gb, config.user_config.ssd_cache_gb) == (16, 40)


def sglang_args(**more):
    return types.SimpleNamespace(**{
        "tp_size": 4, "pp_size": 1, "dp_size": 1, "nnodes": 1, "node_rank": 0,
        "enable_dp_attention": False, "kv_cache_dtype": "auto", "model_path": "org/model", **more})


def test_sglang_config(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch", types.SimpleNamespace(
        cuda=types.SimpleNamespace(is_available=lambda: False)))
    model = types.SimpleNamespace(num_hidden_layers=8, head_dim=64, num_key_value_heads=8,
                                  get_total_num_kv_heads=lambda: 8, dtype="torch.float16")
    config = FlexKVConfig()
    rank = config.post_init_from_sglang_config(model, sglang_args(), page_size=32, tp_rank=3)
    try:
        assert (config.model_config.num_kv_heads, config.model_config.kv_dim) == (8, 2)
        assert config.cache_config.tokens_per_block == 32 and rank.intra_client_id == 3
        assert dtype_name(config.model_config.dtype) == "float16"
        assert "org/model" in config.model_config.model_id
        assert noted_rank(0) is rank
        latent = types.SimpleNamespace(num_hidden_layers=8, qk_nope_head_dim=128, kv_lora_rank=512,
                                       qk_rope_head_dim=64, dtype="bfloat16")
        config = FlexKVConfig()
        rank = config.post_init_from_sglang_config(
            latent, sglang_args(tp_size=8, dp_size=4, enable_dp_attention=True,
                                kv_cache_dtype="fp8_e4m3"), tp_rank=5, dp_rank=2)
        assert (config.model_config.head_size, config.model_config.num_kv_heads) == (576, 1)
        assert config.model_config.tp_size == 2 and rank.tp_rank == 1
        assert rank.dp_client_id == 2 and dtype_bytes(config.model_config.dtype) == 1
    finally:
        note_rank(None)


# ---- hashes and responses ----

def test_block_hashes_follow_prefix_and_namespace():
    tokens = np.arange(40, dtype=np.int64)
    whole, part = SequenceMeta(tokens, 16), SequenceMeta(tokens[:16], 16)
    assert whole.num_blocks == 2 and np.array_equal(whole.block_hashes[:1], part.block_hashes)
    spaces = [None, ["a"], ["b"], ["ab", "c"], ["a", "bc"]]
    assert len({SequenceMeta(tokens, 16, s).get_hash(1) for s in spaces}) == len(spaces)
    assert SequenceMeta(tokens, 16, []).namespace_id is None
    assert SequenceMeta(tokens, 16, ["a"]).namespace_id == part_id(["a"]) != part_id(["b"])
    assert hash_token(tokens, None) != hash_token(tokens[:-1], None)
    assert format_block_hash(None) == "-" and format_block_hash(-1) == "0xffffffffffffffff"


def part_id(namespace):
    return SequenceMeta(np.zeros(0, dtype=np.int64), 16, namespace).namespace_id


def test_hasher_chains():
    tokens = np.arange(32, dtype=np.int64)
    hasher, expected = Hasher(), []
    for block in (tokens[:16], tokens[16:]):
        hasher.update(block)
        expected.append(hasher.digest())
    assert gen_hashes(tokens, 16).tolist() == expected
    assert gen_hashes(np.repeat(tokens, 2)[::2], 16).tolist() == expected
    with pytest.raises(TypeError, match="int64"):
        gen_hashes(tokens.astype(np.int32), 16)


def test_response_of_a_batch():
    response = KVResponse(KVResponseStatus.SUCCESS, 1, np.ones(3, dtype=bool))
    with pytest.raises(TypeError, match="batch"):
        response.get_mask(0)


def test_paths():
    assert parse_path_list(" /a ;;/b") == ["/a", "/b"] == parse_path_list(["/a", " /b"])


def test_the_package_is_importable_without_an_engine():
    import flexkv.integration.dynamo.collector as collector
    assert collector.KVEventCollector().take_events() == []
    assert flexkv.version()
