"""Dynamo's router over four workers with a FlexKV node each: requests go where their prefix lies in
FlexKV's tiers, and nowhere in particular where nobody says so."""
import random
import shutil
import time
from collections import Counter

import pytest
from deployment import Options, marked
from fake_worker import BLOCK, CPU_BLOCKS
from fakes import Fakes

WORKERS = 4
BLOCKS = 10                     # of a prompt, and one token more
ROUNDS = 5
CPU, DISK = 0.75, 0.25          # what the router gives for a block
FORMS = [("file", ""), ("etcd", "nats")]


def credit(weight):
    return pytest.approx(weight * BLOCKS / (BLOCKS + 1), abs=0.002)


@pytest.fixture(scope="module", params=FORMS, ids=["file-zmq", "etcd-nats"])
def fakes(request, folder):
    form, planes = request.param
    if form == "etcd" and not (shutil.which("etcd") and shutil.which("nats-server")):
        pytest.skip("no nats-server and etcd here; tools/install-deps --dynamo installs them")
    place = folder / form
    place.mkdir()
    with Fakes(place, Options(form=form, planes=planes, workers=WORKERS)) as deployment:
        yield deployment
    assert not marked(place), "everything has ended"


numbers = random.Random(7)


def new_prompt():
    return [numbers.randrange(300, 2000) for _ in range(BLOCKS * BLOCK + 1)]


def settle():
    time.sleep(0.7)


def spread(count):
    """Prompts that nobody has seen, and whose they will be: as many for each worker, so that a router
    that knows nothing is right once in four, however it chooses."""
    return [(new_prompt(), n % WORKERS) for n in range(count)]


def right(fakes, prompts, rounds=ROUNDS):
    """How often requests went to the worker that has the prompt; and the hit rates of these."""
    good, rates = 0, []
    for _ in range(rounds):
        for prompt, owner in prompts:
            answer = fakes.complete(prompt, 1)
            if answer.worker == fakes.at[owner]:
                good += 1
                rates.append(answer.hit_rate)
    return good / (rounds * len(prompts)), rates


def put_all(fakes, prompts, silent=False):
    for prompt, owner in prompts:
        fakes.tell(owner, "put", tokens=prompt)
    if not silent:
        for number in range(WORKERS):
            fakes.tell(number, "step")
        settle()


def push_to_disk(fakes, number):
    """Fills the CPU tier with other prompts."""
    for _ in range(CPU_BLOCKS // BLOCKS + 2):
        fakes.tell(number, "put", tokens=new_prompt())
        fakes.tell(number, "step")


def test_prefixes_in_the_cpu_tier(fakes):
    prompts = spread(12)
    put_all(fakes, prompts)
    share, rates = right(fakes, prompts)
    assert share >= 0.95
    assert rates == [credit(CPU)] * len(rates)


def test_prefixes_on_ssd(fakes):
    prompts = spread(8)
    put_all(fakes, prompts)
    for number in range(WORKERS):
        push_to_disk(fakes, number)
    settle()
    share, rates = right(fakes, prompts)
    assert share >= 0.95
    assert rates == [credit(DISK)] * len(rates)


def test_without_events_it_is_chance(fakes):
    """The same, but nobody tells. Without this the tests above would prove nothing."""
    prompts = spread(12)
    put_all(fakes, prompts, silent=True)
    share, rates = right(fakes, prompts)
    assert share <= 0.6 and not any(rates)
    for number in range(WORKERS):
        fakes.tell(number, "step")
    settle()
    assert right(fakes, prompts, 1)[0] >= 0.95


def test_the_nearer_tier_wins(fakes):
    prompt = new_prompt()
    fakes.tell(0, "put", tokens=prompt)
    fakes.tell(0, "step")
    push_to_disk(fakes, 0)
    fakes.tell(1, "put", tokens=prompt)
    fakes.tell(1, "step")
    settle()
    for _ in range(6):
        answer = fakes.complete(prompt, 1)
        assert (answer.worker, answer.hit_rate) == (fakes.at[1], credit(CPU))


def test_salts_are_namespaces(fakes):
    """Blocks of a salt are there for requests with it and for no other, also those of a chain that
    was stored in two parts."""
    prompt = new_prompt()
    fakes.tell(2, "put", tokens=prompt[:4 * BLOCK], salt="dynamo-cache-salt:ns1")
    fakes.tell(2, "step")
    settle()
    fakes.tell(2, "put", tokens=prompt, salt="dynamo-cache-salt:ns1", first=4)
    fakes.tell(2, "step")
    settle()
    for _ in range(4):
        salted = fakes.complete(prompt, 1, cache_salt="ns1")
        assert (salted.worker, salted.hit_rate) == (fakes.at[2], credit(CPU))
        assert fakes.complete(prompt, 1).hit_rate == 0
        assert fakes.complete(prompt, 1, cache_salt="ns2").hit_rate == 0


def test_what_is_gone_earns_nothing(fakes):
    prompt = new_prompt()
    fakes.tell(3, "put", tokens=prompt)
    fakes.tell(3, "step")
    settle()
    assert fakes.complete(prompt, 1).hit_rate == credit(CPU)
    fakes.tell(3, "reset")
    sent = Counter()
    for kind, _, blocks in fakes.tell(3, "step"):
        sent[kind] += blocks
    assert sent["BlockRemoved"] >= BLOCKS and not sent["BlockStored"]
    settle()
    assert fakes.complete(prompt, 1).hit_rate == 0


def test_after_the_engine_was_cleared(fakes):
    """A router forgets all tiers then. What FlexKV still has is announced again, once: when it goes
    it is gone."""
    prompt = new_prompt()
    fakes.tell(1, "put", tokens=prompt)
    fakes.tell(1, "step")
    settle()
    assert fakes.complete(prompt, 1).hit_rate == credit(CPU)
    fakes.tell(1, "clear")
    settle()
    assert fakes.complete(prompt, 1).hit_rate == 0, "it would show nothing if the router kept them"
    fakes.tell(1, "step")
    settle()
    assert fakes.complete(prompt, 1).hit_rate == credit(CPU)
    fakes.tell(1, "reset")
    fakes.tell(1, "step")
    settle()
    assert fakes.complete(prompt, 1).hit_rate == 0


def test_a_killed_worker_comes_back_with_its_ssd(fakes):
    prompt = new_prompt()
    fakes.tell(0, "put", tokens=prompt)
    fakes.tell(0, "step")
    settle()
    assert fakes.complete(prompt, 1).worker == fakes.at[0]
    before = fakes.at[0]
    fakes.restart(0)
    assert fakes.at[0] != before
    fakes.tell(0, "step")           # the first step of an engine, whatever it is about
    settle()
    fakes.wait("the front end's list without the dead worker", 60,
               lambda: before not in fakes.known_workers())
    for _ in range(4):
        answer = fakes.complete(prompt, 1)
        assert (answer.worker, answer.hit_rate) == (fakes.at[0], credit(DISK))
