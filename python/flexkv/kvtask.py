"""Tasks over a node: what was matched, what is under way, what has ended.

A task is made by a match (or get/put/prefetch at once), launched with the pages of its blocks, and
observed by wait or try_wait, which hand its response out once. One lock guards the books; node
calls made under it take microseconds. Completions are taken by whoever waits.
"""
from __future__ import annotations

import errno
import itertools
import json
import threading
import time
from collections.abc import Callable, Sequence
from enum import Enum
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

import flexkv
from flexkv.common.block import namespace_parts
from flexkv.common.config import GLOBAL_CONFIG_FROM_ENV, CacheConfig, ModelConfig
from flexkv.common.debug import flexkv_logger
from flexkv.common.dtypes import dtype_name
from flexkv.common.node_config import node_config, node_settings
from flexkv.common.rank import noted_rank, replicas
from flexkv.common.request import KVResponse, KVResponseStatus
from flexkv.common.tokens import as_tokens, block_mask, masked_blocks, pages_of

if TYPE_CHECKING:
    from flexkv.integration.dynamo.collector import KVEventCollector

_SPACE_TRY_MS = 200             # one attempt of the thread that opens the space
_POLL_S = 0.02                  # one wait for completions: another thread may have taken ours
_CANCEL_WAIT_S = 2.0            # for a copy to stop; it does so between two blocks
_BUSY_LOOK_S = 0.1              # how often a worker that did not answer is looked at again
_BUSY_WAIT_S = 60.0             # and for how long its tasks are held back
_KEY_BYTES = 16
_FETCH_WAIT_S = 20.0            # for SSD blocks of a hit that is to be loaded in layers
_MAX_TASKS = 100_000            # kept for callers that never ask how their tasks ended
_MAX_NAMESPACES = 4096
_SUFFIX = "_gpu_register"


class TaskType(Enum):
    GET = "get"
    PUT = "put"
    PREFETCH = "prefetch"
    BATCH_GET = "batch_get"
    BATCH_PUT = "batch_put"


def node_address(port: str) -> str:
    """Workers and schedulers meet at one address, whichever of the two ports names it."""
    return port.removesuffix(_SUFFIX)


def instance_name(dp_client_id: int) -> str:
    """What the workers of one replica and its scheduler call it."""
    return f"client-{dp_client_id}"


class Task:
    __slots__ = ("task_id", "task_type", "status", "n_tokens", "first", "blocks", "mask", "keys",
                 "namespace", "tokens", "lease", "op", "members", "pending", "batch")

    def __init__(self, task_id: int, task_type: TaskType, n_tokens: int) -> None:
        self.task_id = task_id
        self.task_type = task_type
        self.status = KVResponseStatus.UNREADY      # TIMEOUT while under way
        self.n_tokens = n_tokens
        self.first = 0                  # blocks [first, first + blocks) are to be moved
        self.blocks = 0
        self.mask: np.ndarray | None = None
        self.keys = b""
        self.namespace: Any = None
        self.tokens: np.ndarray | None = None   # of a put that makes KV events
        self.lease = 0
        self.op = 0
        self.members: list[Task] = []   # of a batch
        self.pending = 0                # members under way
        self.batch: Task | None = None

    @property
    def done(self) -> bool:
        return self.status not in (KVResponseStatus.UNREADY, KVResponseStatus.TIMEOUT)

    def response(self) -> KVResponse:
        masks = [member.mask for member in self.members] if self.members else self.mask
        return KVResponse(self.status, self.task_id, masks)     # type: ignore[arg-type]


class TaskEngine:
    """Tasks of one replica. What differs is how the node comes about: _open_node."""

    def __init__(self, model_config: ModelConfig, cache_config: CacheConfig,
                 dp_client_id: int = 0, first_task_id: int = 0) -> None:
        if model_config.nnodes > 1:
            raise NotImplementedError(
                f"nnodes={model_config.nnodes}: ranks of one replica on several machines are not "
                "supported by this build")
        self.model_config = model_config
        self.cache_config = cache_config
        self.dp_client_id = dp_client_id
        self.tokens_per_block = cache_config.tokens_per_block
        self.tasks: dict[int, Task] = {}
        self._ops: dict[int, Task] = {}
        self._busy: dict[int, Any] = {}     # operation: its completion, held back
        self._busy_since = self._busy_looked = 0.0
        self._ids = itertools.count(first_task_id)
        self._lock = threading.RLock()
        self._node: Any = None
        self._space: Any = None
        self._namespaces: dict[tuple[str, ...], Any] = {}
        self._opener: threading.Thread | None = None
        self._stop = threading.Event()
        self._failure: Exception | None = None
        self._said: set[str] = set()
        self.event_collector: KVEventCollector | None = None    # set before start
        self._layerwise = bool(GLOBAL_CONFIG_FROM_ENV.enable_layerwise_transfer)

    # ---- the node and the space ----

    def _open_node(self) -> Any:
        raise NotImplementedError

    def _starts_cold(self) -> bool:
        """Whether blocks that an earlier run left on SSD must not be used."""
        raise NotImplementedError

    def start(self) -> None:
        """Opens the node, then waits for the workers in the background: see is_ready."""
        if self._node is not None:
            return
        self._node = self._open_node()
        self._opener = threading.Thread(target=self._open_space, name="flexkv-space", daemon=True)
        self._opener.start()

    def is_ready(self) -> bool:
        """Whether every worker has registered. Raises what stands in the way for good."""
        if self._failure is not None:
            raise self._failure
        return self._space is not None

    def _space_arguments(self) -> dict[str, Any]:
        model = self.model_config
        shared_by = replicas(model, noted_rank(self.dp_client_id))
        groups = [[g.num_layers, g.num_kv_heads, g.head_size, list(g.layer_indices),
                   dtype_name(g.dtype or model.dtype), g.compress_ratio]
                  for g in model.layer_groups or ()]
        identity = {
            "model": model.model_id, "layers": model.num_layers, "heads": model.num_kv_heads,
            "head_size": model.head_size, "kv_dim": model.kv_dim,
            "dtype": dtype_name(model.dtype), "tp": model.tp_size, "cp": model.cp_size,
            "pp": model.pp_size, "groups": groups,
        }
        return {
            "fingerprint": json.dumps(identity, sort_keys=True).encode(),
            "tokens_per_block": self.tokens_per_block,
            "ranks": model.workers_per_client // shared_by,
            "instance": instance_name(self.dp_client_id),
            "workers": model.workers_per_client,
        }

    def _open_space(self) -> None:
        """A thread of its own: the call waits for the workers."""
        node = self._node
        arguments = self._space_arguments()
        try:
            space = None
            while space is None and not self._stop.is_set():
                try:
                    space = node.space(wait_ms=_SPACE_TRY_MS, **arguments)
                except flexkv.Error as error:
                    if error.errno not in (errno.ETIMEDOUT, errno.ENOTCONN):
                        raise
                    self._stop.wait(_SPACE_TRY_MS / 1000)
            if space is not None and self._starts_cold():
                node.reset()
            if space is not None and self.event_collector is not None:
                self.event_collector.follow(node, space)
        except Exception as error:     # whatever it is, is_ready must tell
            if not self._stop.is_set():
                flexkv_logger.error("FlexKV can't start: %s", error)
                self._failure = error
            return
        self._space = space

    def _namespace(self, namespace: Any) -> Any:
        parts = namespace_parts(namespace)
        found = self._namespaces.get(parts)
        if found is None:
            found = self._space.namespace(*parts)
            with self._lock:
                if len(self._namespaces) >= _MAX_NAMESPACES:
                    del self._namespaces[next(iter(self._namespaces))]
                self._namespaces[parts] = found
        return found

    def shutdown(self) -> None:
        """Ends what is under way as cancelled, and the node."""
        self._stop.set()
        node, self._space, self._node = self._node, None, None
        if self._opener is not None:
            self._opener.join()
            self._opener = None
            self._space = None
        if node is not None:
            if self.event_collector is not None:
                self.event_collector.close()
            node.close()
        with self._lock:
            self._ops.clear()
            self._busy.clear()
            for task in list(self.tasks.values()):
                if not task.done:
                    self._finish(task, KVResponseStatus.CANCELLED, 0)

    # ---- the books ----

    def _say_once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            flexkv_logger.warning("%s", text)

    def _new_task(self, task_type: TaskType, n_tokens: int, task_id: int = -1) -> Task:
        """Under the lock."""
        if len(self.tasks) >= _MAX_TASKS:
            oldest = next(iter(self.tasks.values()))
            if oldest.status is not KVResponseStatus.TIMEOUT:
                self._drop_lease(oldest)
                del self.tasks[oldest.task_id]
        task = Task(next(self._ids) if task_id < 0 else task_id, task_type, n_tokens)
        if task.task_id in self.tasks:
            raise ValueError(f"there is a task {task.task_id} already")
        self.tasks[task.task_id] = task
        return task

    def _plan(self, task: Task, first: int, end: int) -> None:
        """The task is to move blocks [first, end); with none it is done."""
        task.first = first
        task.blocks = end - first
        task.mask = block_mask(task.n_tokens, first, end, self.tokens_per_block)
        if task.blocks == 0:
            self._drop_lease(task)
            task.status = KVResponseStatus.SUCCESS

    def _drop_lease(self, task: Task) -> None:
        lease, task.lease = task.lease, 0
        node = self._node
        if lease and node is not None:
            try:
                node.release(lease)
            except flexkv.Error:
                pass                    # it ran out

    def _finish(self, task: Task, status: KVResponseStatus, blocks_ok: int) -> None:
        """Under the lock. The mask shrinks to what was moved."""
        self._drop_lease(task)
        task.status = status
        task.keys, task.namespace, task.tokens = b"", None, None
        if task.mask is not None and blocks_ok < task.blocks:
            end = (task.first + blocks_ok) * self.tokens_per_block
            task.mask = task.mask.copy()        # the caller has it from the match
            task.mask[end:] = False
        batch = task.batch
        if batch is not None:
            batch.pending -= 1
            self._settle_batch(batch)

    def _settle_batch(self, batch: Task) -> None:
        """A batch is as good as the worst of its members."""
        if batch.pending:
            return
        bad = [m.status for m in batch.members if m.status is not KVResponseStatus.SUCCESS]
        batch.status = bad[0] if bad else KVResponseStatus.SUCCESS

    def _take_completions(self, timeout_s: float) -> None:
        node = self._node
        if node is None:
            return
        timeout_ms = max(1, int(timeout_s * 1000)) if timeout_s > 0 else 0
        try:
            completions = node.poll(256, timeout_ms)
        except flexkv.Error:
            if self._node is None:      # shut down meanwhile; all tasks have ended
                return
            raise
        with self._lock:
            for completion in completions:
                if completion.op not in self._ops:
                    continue
                if completion.flags & flexkv.PAGES_BUSY:
                    self._hold_back(completion)
                else:
                    self._complete(self._ops.pop(completion.op), completion)
            if self._busy:
                self._look_at_busy(node)

    def _hold_back(self, completion: Any) -> None:
        """A worker that does not answer may still touch the pages. Until it is known that it does
        not, the task stays under way, so that the engine keeps them."""
        if not self._busy:
            self._busy_since = time.monotonic()
            flexkv_logger.error("a worker of replica %d does not answer; tasks of its wait",
                                self.dp_client_id)
        self._busy[completion.op] = completion

    def _look_at_busy(self, node: Any) -> None:
        now = time.monotonic()
        if now < self._busy_looked + _BUSY_LOOK_S:
            return
        self._busy_looked = now
        name = instance_name(self.dp_client_id)
        out = sum(instance["jobs_out"] for instance in json.loads(node.status())["instances"]
                  if instance["name"] == name)
        if out and now < self._busy_since + _BUSY_WAIT_S:
            return
        if out:
            flexkv_logger.error("it has not answered for %g s; its tasks end nevertheless, but it "
                                "may still touch their pages", _BUSY_WAIT_S)
        busy, self._busy = self._busy, {}
        for op, completion in busy.items():
            self._complete(self._ops.pop(op), completion)

    def _complete(self, task: Task, completion: Any) -> None:
        if task.task_type is TaskType.PREFETCH:
            task.mask = block_mask(task.n_tokens, 0, completion.blocks_ok, self.tokens_per_block)
            task.blocks = completion.blocks_ok
        status = completion.status
        if status == 0 or (status == -errno.ENOSPC and task.task_type is not TaskType.GET):
            result = KVResponseStatus.SUCCESS   # a full cache stores less; that is no failure
        elif status == -errno.ECANCELED:
            result = KVResponseStatus.CANCELLED
        else:
            result = KVResponseStatus.FAILED
            flexkv_logger.warning("%s task %d failed after %d of %d blocks: %s",
                                  task.task_type.value, task.task_id, completion.blocks_ok,
                                  task.blocks, errno.errorcode.get(-status, status))
        self._finish(task, result, completion.blocks_ok)

    # ---- matching ----

    def _keys(self, tokens: np.ndarray, blocks: int, namespace: Any) -> tuple[Any, bytes]:
        """The namespace, and the keys of the prompt's first blocks; none where there is nothing
        to ask."""
        if self._space is None:
            self._say_once("a request came while not all workers were registered; it is a miss")
            return None, b""
        if blocks == 0:
            return None, b""
        found = self._namespace(namespace)
        return found, found.keys_from_tokens(tokens[:blocks * self.tokens_per_block])

    def _match(self, task: Task) -> Any:
        """What is known of the task's keys, which stays until the task lets go of it."""
        if not task.keys:
            return None
        try:
            match = task.namespace.match(task.keys)
        except flexkv.Error as error:
            flexkv_logger.warning("match failed, taken as a miss: %s", error)
            return None
        task.lease = match.lease
        return match

    def get_match(self, token_ids: Any, dp_client_id: int = 0, token_mask: Any = None,
                  cpu_only: bool = False, task_id: int = -1, namespace: Any = None,
                  swa_aware: bool = False) -> tuple[int, np.ndarray]:
        tokens = as_tokens(token_ids)
        first, end = masked_blocks(token_mask, tokens.size, self.tokens_per_block)
        if swa_aware:
            self._say_once("swa_aware: sliding-window side data is not stored, so nothing hits")
            end = first
        named, keys = self._keys(tokens, end if end > first else 0, namespace)
        with self._lock:
            task = self._new_task(TaskType.GET, tokens.size, task_id)
            task.namespace, task.keys = named, keys
            match = self._match(task)
        if match is not None and self._layerwise and match.blocks > match.cpu_blocks:
            self._fetch(task, match.blocks)
            with self._lock:
                self._drop_lease(task)
                match = self._match(task)
        with self._lock:
            known = 0
            if match is not None:
                in_cpu = cpu_only or self._layerwise
                known = match.blocks if not in_cpu else min(match.blocks, match.cpu_blocks)
            self._plan(task, first, max(known, first))
        return task.task_id, task.mask          # type: ignore[return-value]

    def _fetch(self, task: Task, blocks: int) -> None:
        """A load in layers can't fail once the engine waits for it: what is on SSD is read before it
        counts as a hit. The engine would wait as long after the match."""
        with self._lock:
            helper = self._new_task(TaskType.PREFETCH, task.n_tokens)
            self._plan(helper, 0, 0)
            keys = task.keys[:blocks * _KEY_BYTES]
            self._begin(helper, lambda: task.namespace.prefetch(keys))
        self.wait(helper.task_id, _FETCH_WAIT_S)
        self.cancel_tasks(helper.task_id)       # one that is not in time goes no further

    def put_match(self, token_ids: Any, dp_client_id: int = 0, token_mask: Any = None,
                  task_id: int = -1, namespace: Any = None) -> tuple[int, np.ndarray]:
        tokens = as_tokens(token_ids)
        first, end = masked_blocks(token_mask, tokens.size, self.tokens_per_block)
        if first:
            raise ValueError(f"token_mask of a put begins at token "
                             f"{first * self.tokens_per_block}: a put stores a prompt from its "
                             "first token on; blocks that are known are left out by themselves")
        named, keys = self._keys(tokens, end, namespace)
        with self._lock:
            task = self._new_task(TaskType.PUT, tokens.size, task_id)
            task.namespace, task.keys = named, keys
            if self.event_collector is not None and not namespace_parts(namespace):
                task.tokens = tokens    # routers know nothing of namespaces
            match = self._match(task)
            known = match.blocks if match is not None else 0
            self._plan(task, known, end if keys else known)
        return task.task_id, task.mask          # type: ignore[return-value]

    def prefetch_async(self, token_ids: Any, dp_client_id: int = 0, task_id: int = -1,
                       namespace: Any = None, swa_aware: bool = False) -> int:
        tokens = as_tokens(token_ids)
        named, keys = self._keys(tokens, tokens.size // self.tokens_per_block, namespace)
        with self._lock:
            task = self._new_task(TaskType.PREFETCH, tokens.size, task_id)
            self._plan(task, 0, 0)
            if keys:
                self._begin(task, lambda: named.prefetch(keys))
        return task.task_id

    # ---- launching ----

    def _begin(self, task: Task, operation: Callable[[], int]) -> None:
        """Under the lock, which keeps completions out until the operation is in the books."""
        try:
            task.op = operation()
        except flexkv.Error as error:
            if error.errno == errno.EINVAL:
                self._finish(task, KVResponseStatus.FAILED, 0)
                raise ValueError(f"task {task.task_id}: {error}") from error
            flexkv_logger.warning("%s task %d failed at its start: %s", task.task_type.value,
                                  task.task_id, error)
            self._finish(task, KVResponseStatus.FAILED, 0)
            return
        task.status = KVResponseStatus.TIMEOUT
        self._ops[task.op] = task

    def _launch(self, task: Task, pages: np.ndarray, how: dict[str, Any] | None = None) -> None:
        if task.task_type is TaskType.GET:
            self._begin(task, lambda: self._node.get(task.lease, task.first, pages, **how or {}))
            if not task.done:
                task.lease = 0          # the get has used it up
        else:
            # The lease keeps the blocks before the first one until the put has been accepted.
            names = self._event_names(task)
            self._begin(task, lambda: task.namespace.put(task.keys, task.first, pages, **names))
            self._drop_lease(task)

    def _event_names(self, task: Task) -> dict[str, Any]:
        """There is no engine's hash here: blocks are called by the first half of their keys."""
        if task.tokens is None:
            return {}
        hashes = np.frombuffer(task.keys, np.uint64)[::2]
        start, end = (n * self.tokens_per_block for n in (task.first, hashes.size))
        return {"event_hashes": np.ascontiguousarray(hashes[task.first:]),
                "event_tokens": np.ascontiguousarray(task.tokens[start:end]),
                "event_parent": int(hashes[task.first - 1]) if task.first else None}

    def _pages(self, task: Task, slot_mapping: Any) -> np.ndarray | None:
        """The pages of a task that can be launched; None: it ended at its match.

        The mapping begins at the first token that is moved, or at the prompt's first if it has
        an entry for each whole block."""
        if task.done:
            return None
        if task.status is not KVResponseStatus.UNREADY:
            raise ValueError(f"task {task.task_id} is launched already")
        before = task.first * self.tokens_per_block
        whole = task.n_tokens // self.tokens_per_block * self.tokens_per_block
        skip = before if before and len(slot_mapping) >= whole else 0
        return pages_of(slot_mapping, skip, task.blocks, self.tokens_per_block)

    def launch_tasks(self, task_ids: list[int], slot_mappings: Sequence[Any],
                     swa_slot_mappings: Sequence[Any] | None = None, as_batch: bool = False,
                     batch_id: int = -1, layerwise_transfer: bool = False,
                     counter_id: int = 0) -> list[int]:
        """Starts matched tasks; with as_batch as one, whose number is returned."""
        if len(task_ids) != len(slot_mappings):
            raise ValueError(f"{len(task_ids)} tasks and {len(slot_mappings)} slot mappings")
        if any(mapping is not None for mapping in swa_slot_mappings or ()):
            raise NotImplementedError("swa_slot_mappings: sliding-window side data is not stored "
                                      "by this build")
        if layerwise_transfer and len(task_ids) > 1:
            raise NotImplementedError(f"{len(task_ids)} tasks in layers: one counter follows one load; "
                                      "launch each with a counter_id of its own")
        how = {"layerwise": True, "counter": counter_id + 1} if layerwise_transfer else {}
        with self._lock:
            tasks = [self._known(task_id) for task_id in task_ids]
            pages = [self._pages(task, mapping) for task, mapping in zip(tasks, slot_mappings)]
            types = {task.task_type for task in tasks}
            batch = None
            if as_batch and len(tasks) > 1 and len(types) == 1:
                batch = self._make_batch(tasks, types.pop(), batch_id)
            errors: list[Exception] = []
            for task, its_pages in zip(tasks, pages):
                if its_pages is not None:
                    try:
                        self._launch(task, its_pages, how)
                    except ValueError as error:
                        errors.append(error)
                    if how and task.done and task.status is not KVResponseStatus.SUCCESS:
                        errors.append(RuntimeError(
                            f"the load of task {task.task_id} has failed at its start, and an engine "
                            "that waits for its layers can't be told otherwise; the log says why"))
        if errors:
            raise errors[0]
        return [batch.task_id] if batch is not None else list(task_ids)

    def _known(self, task_id: int) -> Task:
        task = self.tasks.get(task_id)
        if task is None:
            raise KeyError(f"task {task_id} is not known: never matched, or its end was reported")
        return task

    def _make_batch(self, members: list[Task], task_type: TaskType, batch_id: int) -> Task:
        """The members give way to one task; their own numbers mean nothing any more."""
        batch_type = TaskType.BATCH_GET if task_type is TaskType.GET else TaskType.BATCH_PUT
        batch = self._new_task(batch_type, 0, batch_id)
        batch.members = members
        batch.status = KVResponseStatus.TIMEOUT
        batch.pending = sum(not member.done for member in members)
        for member in members:
            member.batch = batch
            del self.tasks[member.task_id]
        self._settle_batch(batch)
        return batch

    def get_async(self, token_ids: Any, slot_mapping: Any, dp_client_id: int = 0,
                  token_mask: Any = None, task_id: int = -1,
                  namespace: Any = None) -> tuple[int, np.ndarray]:
        task_id, mask = self.get_match(token_ids, token_mask=token_mask, task_id=task_id,
                                       namespace=namespace)
        self._launch_matched(task_id, slot_mapping, 0)
        return task_id, mask

    def put_async(self, token_ids: Any, slot_mapping: Any, dp_client_id: int = 0,
                  token_mask: Any = None, task_id: int = -1,
                  namespace: Any = None) -> tuple[int, np.ndarray]:
        task_id, mask = self.put_match(token_ids, token_mask=token_mask, task_id=task_id,
                                       namespace=namespace)
        # Its mapping has an entry for every token, known or not.
        self._launch_matched(task_id, slot_mapping,
                             self.tasks[task_id].first * self.tokens_per_block)
        return task_id, mask

    def _launch_matched(self, task_id: int, slot_mapping: Any, skip: int) -> None:
        with self._lock:
            task = self.tasks[task_id]
            if task.done:
                return
            try:
                pages = pages_of(slot_mapping, skip, task.blocks, self.tokens_per_block)
            except (TypeError, ValueError):
                self._cancel(task)
                raise
            self._launch(task, pages)

    # ---- waiting ----

    def _response(self, task_id: int) -> KVResponse | None:
        """None: under way. What has ended is handed out once."""
        with self._lock:
            task = self.tasks.get(task_id)
            if task is None:
                return KVResponse(KVResponseStatus.NOTFOUND, task_id, None)
            if task.status is KVResponseStatus.TIMEOUT:
                return None
            if task.done:
                del self.tasks[task_id]
                return task.response()
            return KVResponse(KVResponseStatus.UNREADY, task_id, None)

    def wait(self, task_ids: int | list[int], timeout: float = 20.0,
             completely: bool = False) -> dict[int, KVResponse]:
        """One response per task. TIMEOUT: it goes on, and can be waited for again."""
        responses: dict[int, KVResponse] = {}
        deadline = time.monotonic() + timeout
        self._take_completions(0)
        for task_id in [task_ids] if isinstance(task_ids, int) else task_ids:
            while (response := self._response(task_id)) is None:
                left = deadline - time.monotonic()
                if left <= 0:
                    response = KVResponse(KVResponseStatus.TIMEOUT, task_id, None)
                    break
                self._take_completions(min(left, _POLL_S))
            responses[task_id] = response
        return responses

    def try_wait(self, task_ids: int | list[int]) -> dict[int, KVResponse]:
        """The same for those that are not under way, at once."""
        self._take_completions(0)
        ids = [task_ids] if isinstance(task_ids, int) else task_ids
        return {task_id: response for task_id in ids
                if (response := self._response(task_id)) is not None}

    # ---- ending ----

    def _cancel(self, task: Task) -> None:
        """Under the lock. An operation under way is only asked to end."""
        self.tasks.pop(task.task_id, None)
        for part in task.members or [task]:
            if part.status is KVResponseStatus.TIMEOUT:
                try:
                    self._node.cancel(part.op)
                except flexkv.Error:
                    pass                # the daemon has gone; the completion says so
            elif not part.done:
                self._finish(part, KVResponseStatus.CANCELLED, 0)

    def cancel_tasks(self, task_ids: int | list[int]) -> None:
        """Forgets the tasks. Waits until no copy of theirs touches the engine's pages any more."""
        ops: list[int] = []
        with self._lock:
            for task_id in [task_ids] if isinstance(task_ids, int) else task_ids:
                task = self.tasks.get(task_id)
                if task is not None:
                    self._cancel(task)
                    ops += [part.op for part in task.members or [task] if not part.done]
        deadline = time.monotonic() + _CANCEL_WAIT_S
        while any(op in self._ops for op in ops):
            left = deadline - time.monotonic()
            if left <= 0:
                flexkv_logger.error("a cancelled copy has not stopped within %g s; a worker "
                                    "does not answer", _CANCEL_WAIT_S)
                return
            self._take_completions(min(left, _POLL_S))

    def reset_cache(self) -> None:
        """Drops every block of every tier. Tasks that have not ended end as cancelled."""
        with self._lock:
            for task in list(self.tasks.values()):
                if task.status is KVResponseStatus.UNREADY:
                    self._finish(task, KVResponseStatus.CANCELLED, 0)
        if self._node is not None:
            self._node.reset()

    # ---- what the reference's users look at ----

    def operation_of(self, task_id: int) -> int:
        """The operation of a task under way, as agents know it; 0: it is not."""
        with self._lock:
            task = self.tasks.get(task_id)
            return task.op if task is not None and not task.done else 0

    @property
    def graph_to_task(self) -> dict[int, Task]:
        """Operations under way and whose they are."""
        return self._ops

    @property
    def cache_engine(self) -> SimpleNamespace:
        """The CPU tier's total and free blocks."""
        cpu = self._node.stats()["cpu"]
        pool = SimpleNamespace(num_total_blocks=cpu["slots"], num_free_blocks=cpu["free_slots"])
        return SimpleNamespace(cpu_cache_engine=SimpleNamespace(mempool=pool))


class KVTaskEngine(TaskEngine):
    """The node in this process; workers meet it at its address."""

    def __init__(self, model_config: ModelConfig, cache_config: CacheConfig,
                 gpu_register_port: str | None = None, redis_meta: Any = None,
                 event_collector: Any = None) -> None:
        super().__init__(model_config, cache_config)
        self.address = node_address(gpu_register_port or GLOBAL_CONFIG_FROM_ENV.server_recv_port)
        self.event_collector = event_collector

    def _open_node(self) -> Any:
        settings = node_settings(self.model_config, self.cache_config)
        if self.event_collector is not None:
            settings["enable_kv_events"] = "1"
        node = flexkv.Node.open(node_config(settings))
        try:
            node.listen(self.address)
        except flexkv.Error:
            node.close()
            raise
        return node

    def _starts_cold(self) -> bool:
        if not self.cache_config.enable_ssd or self.model_config.model_id:
            return False
        flexkv_logger.info("ModelConfig.model_id is not given: blocks that an earlier run left on "
                           "SSD could be another model's and are dropped")
        return True
