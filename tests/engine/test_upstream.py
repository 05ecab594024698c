"""vLLM's own tests of its connector interface, and its FlexKV example, unchanged, on this machine without a GPU.

Wheels don't contain them. They are taken from FLEXKV_VLLM_SOURCE (a source tree of the installed version), else from the
source archive that pip gets from the package index, once, into FLEXKV_CACHE_DIR. Without either the tests here are
skipped. docs/vllm-upstream.md lists what runs, what does not, and why.
"""
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

if importlib.util.find_spec("vllm") is None or importlib.util.find_spec("flexkv") is None:
    pytest.skip("this Python has no vllm and flexkv", allow_module_level=True)

import tiny_model
from vllm_plans import environment

DOWNLOAD_SECONDS, TESTS_SECONDS, EXAMPLE_SECONDS = 300, 600, 600
UNIT = Path("tests/v1/kv_connector/unit")
EXAMPLE = Path("examples/disaggregated/flexkv_connector/prefix_caching_flexkv.py")
NEEDED = [Path("tests/__init__.py"), Path("tests/v1/__init__.py"), Path("tests/v1/core/__init__.py"),
          Path("tests/v1/core/utils.py"), Path("tests/v1/kv_connector"), Path("tests/utils.py"), EXAMPLE]

# File: how many of its tests pass here. Fewer would mean that something was not run.
FILES = {
    "test_flexkv_connector.py": 16, "test_kv_connector_lifecycle.py": 1, "test_kv_load_failure_recovery.py": 14,
    "test_config.py": 13, "test_output_aggregator.py": 2, "test_hma_auto_config.py": 5, "test_error_propagation.py": 2,
    "test_invalid_blocks_correctness.py": 3, "test_cache_pollution_prevention.py": 1, "test_remote_decode_lifecycle.py": 4,
    "test_remote_prefill_lifecycle.py": 16, "test_multi_connector.py": 28, "test_decode_bench_connector.py": 29,
    "test_handshake_pp_aggregation.py": 3, "test_transfer_topology_sharded.py": 4,
    "test_scheduler_kv_connector_override.py": 3,
}
# They need what is not here.
LEFT_OUT = {
    "test_multi_connector.py::test_multi_example_connector_consistency": "the weights of a model from the Hugging Face hub",
}


# ---- the sources ---------------------------------------------------------------------------------

def sources() -> Path:
    """A folder with vLLM's tests and examples; skips where there is none."""
    given = os.environ.get("FLEXKV_VLLM_SOURCE")
    if given:
        if not (Path(given) / UNIT).is_dir():
            pytest.fail(f"FLEXKV_VLLM_SOURCE={given} has no {UNIT}")
        return Path(given)
    version = _version()
    cache = Path(os.environ.get("FLEXKV_CACHE_DIR") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
                 / "flexkv")
    kept = cache / f"vllm-{version}-source"
    if not kept.is_dir():
        _download(version, kept)
    if not kept.is_dir():
        pytest.skip(f"pip finds no source archive of vllm {version}; FLEXKV_VLLM_SOURCE can name a source tree")
    return kept


def _version() -> str:
    import vllm
    return re.split(r"[+]|\.dev", vllm.__version__)[0]


def _download(version: str, kept: Path) -> None:
    """pip goes on to ask the archive how it would be built, which fails without vLLM's build tools; what it has unpacked
    is all that is wanted."""
    with tempfile.TemporaryDirectory(prefix="fk-upstream-") as folder:
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-clean", "--no-deps", "--no-build-isolation",
                        "--no-binary=:all:", "-d", folder, f"vllm=={version}"], timeout=DOWNLOAD_SECONDS,
                       env={**os.environ, "TMPDIR": folder}, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                       stderr=subprocess.DEVNULL, check=False)
        found = next(Path(folder).glob(f"*/*/{UNIT}"), None)
        if found is None:
            return
        root = found.parents[len(UNIT.parts) - 1]
        new = Path(tempfile.mkdtemp(prefix="vllm-source-", dir=kept.parent))
        for path in NEEDED:
            (new / path).parent.mkdir(parents=True, exist_ok=True)
            if (root / path).is_dir():
                shutil.copytree(root / path, new / path)
            elif (root / path).exists():
                shutil.copy(root / path, new / path)
        try:
            new.rename(kept)
        except OSError:                 # another one was faster
            shutil.rmtree(new)


@pytest.fixture(scope="session")
def source() -> Path:
    return sources()


# ---- the tests -----------------------------------------------------------------------------------

# What the tests ask of facebook/opt-125m: its configuration, never its weights.
OPT = {
    "architectures": ["OPTForCausalLM"], "model_type": "opt", "hidden_size": 768, "num_hidden_layers": 12,
    "num_attention_heads": 12, "ffn_dim": 3072, "word_embed_proj_dim": 768, "vocab_size": 50272,
    "max_position_embeddings": 2048, "do_layer_norm_before": True, "activation_function": "relu",
    "bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1, "dtype": "float16",
}


def hub(folder: Path) -> Path:
    """A Hugging Face cache that has the configuration, as if it had been downloaded."""
    model = folder / "hub" / "models--facebook--opt-125m"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text("0" * 40)
    (model / "snapshots" / ("0" * 40)).mkdir(parents=True)
    (model / "snapshots" / ("0" * 40) / "config.json").write_text(json.dumps(OPT))
    return folder


def run_tests(source: Path, folder: Path, names: list[str], python_path: list[Path], *more: str) -> dict[str, str]:
    """Runs them where they are; test -> "passed", "skipped" or what was wrong."""
    report = folder / "report.xml"
    home = folder / "home"
    if not home.exists():
        hub(home)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", "--tb=short",
               f"--rootdir={source}", f"--confcutdir={source / UNIT.parent}", f"--junitxml={report}", *more,
               *(str(source / UNIT / name) for name in names)]
    env = environment(HF_HOME=str(home), PYTHONDONTWRITEBYTECODE="1",
                      PYTHONPATH=os.pathsep.join([*map(str, python_path), str(source), os.environ.get("PYTHONPATH", "")]))
    for name in [n for n in env if n.startswith("FLEXKV_")]:
        del env[name]
    done = subprocess.run(command, cwd=folder, env=env, timeout=TESTS_SECONDS, stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    assert report.exists(), done.stdout[-3000:]
    found = {}
    for case in ET.parse(report).getroot().iter("testcase"):
        name = f"{case.get('classname', '').rpartition('.unit.')[2]}.{case.get('name')}"
        bad = case.find("failure") if case.find("failure") is not None else case.find("error")
        found[name] = ("skipped" if case.find("skipped") is not None else "passed" if bad is None
                       else f"{bad.get('message')}\n{bad.text}")
    return found


@pytest.fixture(scope="session")
def results(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """All of them in one process; only the one about a FlexKV that is not installed needs another."""
    folder = tmp_path_factory.mktemp("upstream")
    absent = folder / "absent"
    absent.mkdir()
    (absent / "flexkv.py").write_text('raise ImportError("No module named \'flexkv\'")\n')
    alone = "test_flexkv_connector.py::TestFlexKVConnectorImportError"
    found = run_tests(source, folder, [alone], [absent])
    left_out = [f"--deselect={UNIT / name}" for name in [alone, *LEFT_OUT]]
    return found | run_tests(source, folder, [name for name in FILES if (source / UNIT / name).exists()], [], *left_out)


@pytest.mark.parametrize("file", FILES)
def test_connector_tests(file: str, results: dict[str, str]) -> None:
    mine = {name: result for name, result in results.items() if name.startswith(file.removesuffix(".py") + ".")}
    bad = {name: result for name, result in mine.items() if result not in ("passed", "skipped")}
    assert not bad, "\n".join(f"{name}: {result}" for name, result in bad.items())
    passed = list(mine.values()).count("passed")
    assert passed >= FILES[file], f"only {passed} tests of {file} passed: {mine}"


# ---- the example ---------------------------------------------------------------------------------

def small_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The example names 10240 blocks of 128 tokens for the cpu tier: few bytes a token. Its prompts are English: a
    tokenizer of letters."""
    settings = tiny_model.config("gqa") | {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 128,
                                           "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    monkeypatch.setattr(tiny_model, "config", lambda kind: settings)
    letters = [chr(c) for c in range(32, 127)]
    fill = [f"<{i}>" for i in range(tiny_model.VOCAB - len(tiny_model.SPECIAL) - len(letters))]
    monkeypatch.setattr(tiny_model, "words", lambda: [*tiny_model.SPECIAL, *letters, *fill])
    path = tiny_model.write("demo", folder / "model")
    tokenizer = json.loads((path / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"] = {"type": "Split", "pattern": {"Regex": "."}, "behavior": "Isolated", "invert": False}
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    return path


def test_example(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not (source / EXAMPLE).exists():
        pytest.skip(f"vllm {_version()} has no {EXAMPLE}")
    model = small_model(tmp_path, monkeypatch)
    env = environment(OMP_NUM_THREADS="1")
    del env["FLEXKV_CPU_CACHE_GB"]      # the example has a file of settings
    with open(tmp_path / "log", "w+") as log:
        done = subprocess.run([sys.executable, str(source / EXAMPLE), "--model", str(model)], cwd=tmp_path, env=env,
                              stdin=subprocess.DEVNULL, stdout=log, stderr=log, timeout=EXAMPLE_SECONDS)
        log.seek(0)
        text = log.read()
    assert done.returncode == 0, text[-4000:]
    assert re.findall(r"Generated answers are the same: (\w+)", text) == ["True", "True"], text[-4000:]
    assert re.search(r"FlexKV: space .* 128 tokens in a block, 1 workers", text), "FlexKV was not there"
