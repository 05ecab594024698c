"""The extension module: its life among Python's threads, forks and exits; what it lets go of."""
import array
import errno
import gc
import inspect
import os
import signal
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

import flexkv
from conftest import Rig, open_node, run_python, split_keys


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
    "import threading; threading.excepthook = lambda *_: None; "        # it may still be told that the node is closed
    "threading.Thread(target=rig.node.poll, args=(1, -1), daemon=True).start()",
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
