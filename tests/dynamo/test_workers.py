"""dynamo.vllm with FlexKV, two workers: the first with the connector that comes with vLLM, the second
with FlexKV's own. What the router credits is what the engine then reuses, tier by tier."""
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from deployment import BLOCK, Deployment, Options, marked

HERE = Path(__file__).resolve().parent
BLOCKS = 10
PROMPT = BLOCKS * BLOCK + 5
FILLER = 30 * BLOCK + 5
REUSED = BLOCKS * BLOCK
OUT_OF_ENGINE, OUT_OF_CPU = 2, 5        # so many fillers push a prompt out
WORKERS = pytest.mark.parametrize("number", (0, 1), ids=("upstream", "ours"))
numbers = random.Random(11)


def credit(weight):
    return pytest.approx(weight * BLOCKS / (BLOCKS + 1), abs=0.002)


ENGINE, CPU, DISK = credit(1), credit(0.75), credit(0.25)


@pytest.fixture(scope="module")
def pair(folder):
    options = Options(form="file", workers=2, own_connectors=(1,), engine_blocks=48,
                      max_length=32 * BLOCK, cpu_cache="24M", ssd_cache="256M")
    with Deployment(folder, options) as deployment:
        yield deployment
    assert not marked(folder), "everything has ended"


def new_tokens(count=PROMPT):
    return [numbers.randrange(300, 2000) for _ in range(count)]


def settle(pair):
    """Engines publish with a step; what is stored after a request's end comes with the next one."""
    time.sleep(0.5)
    for number in range(2):
        pair.complete(new_tokens(8), 1, pair.instance(number))
    time.sleep(0.7)


def push_out(pair, number, fillers):
    for _ in range(fillers):
        pair.complete(new_tokens(FILLER), 1, pair.instance(number))
    settle(pair)


def place(pair, number, **more):
    """A prompt that the worker computes, and what it answers. Asked twice: what is asked once may be
    the first to go when there is no room."""
    prompt = new_tokens()
    answer = pair.complete(prompt, worker=pair.instance(number), **more)
    assert answer.cached_tokens == 0
    settle(pair)
    pair.complete(prompt, worker=pair.instance(number), **more)
    settle(pair)
    return prompt, answer.text


def seen(pair, prompt, **more):
    answer = pair.complete(prompt, **more)
    return answer.worker, answer.hit_rate, answer.cached_tokens, answer.text


@WORKERS
def test_credit_and_reuse_tier_by_tier(pair, number):
    prompt, text = place(pair, number)
    here = pair.instance(number)
    assert seen(pair, prompt) == (here, ENGINE, REUSED, text)
    push_out(pair, number, OUT_OF_ENGINE)
    assert seen(pair, prompt) == (here, CPU, REUSED, text)
    assert pair.routed()[-1] == (BLOCKS, 0)
    push_out(pair, number, OUT_OF_CPU)
    assert seen(pair, prompt) == (here, DISK, REUSED, text)
    assert pair.routed()[-1] == (0, BLOCKS)


@WORKERS
def test_salts_are_namespaces(pair, number):
    prompt, text = place(pair, number, cache_salt="ns1")
    push_out(pair, number, OUT_OF_ENGINE)
    assert seen(pair, prompt)[1:3] == (0, 0), "without the salt nothing is there"
    assert seen(pair, prompt, cache_salt="ns2")[1:3] == (0, 0)
    assert seen(pair, prompt, cache_salt="ns1") == (pair.instance(number), CPU, REUSED, text)


@WORKERS
def test_a_cleared_worker_has_nothing(pair, number):
    """The router forgets all tiers, and FlexKV has been told, with either connector."""
    prompt, text = place(pair, number)
    push_out(pair, number, OUT_OF_ENGINE)
    assert seen(pair, prompt) == (pair.instance(number), CPU, REUSED, text)
    settle(pair)
    done = subprocess.run([sys.executable, HERE / "clear.py", str(pair.instance(number))],
                          env=pair.environment({}), capture_output=True, timeout=90, text=True)
    assert "success" in done.stdout, done.stdout + done.stderr
    settle(pair)
    answer = pair.complete(prompt, worker=pair.instance(number))
    assert (answer.hit_rate, answer.cached_tokens, answer.text) == (0, 0, text)


def test_a_killed_worker_comes_back_with_its_ssd(pair):
    """Its engine outlives it, as an orphan that keeps ports and files: it has to go first."""
    prompt, text = place(pair, 1)
    push_out(pair, 1, OUT_OF_ENGINE)
    instance = pair.restart_worker(1)
    settle(pair)
    assert seen(pair, prompt) == (instance, DISK, REUSED, text)


def test_without_events_the_router_is_blind(pair):
    """The engine reuses what FlexKV has all the same. Without this the tests above would prove
    nothing."""
    instance = pair.restart_worker(1, DYNAMO_USE_FLEXKV="0")
    prompt, text = place(pair, 1)
    push_out(pair, 1, OUT_OF_ENGINE)
    answer = pair.complete(prompt, worker=instance)
    assert (answer.hit_rate, answer.cached_tokens, answer.text) == (0, REUSED, text)


def test_what_is_in_use_is_said_at_once(pair):
    second = pair.start_worker(0)
    pair.children.remove(second)
    assert second.process.wait(30) == 2
    assert "FLEXKV_SERVER_RECV_PORT" in second.tail() and "another" in second.tail()
