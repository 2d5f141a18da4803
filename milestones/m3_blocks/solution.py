"""Reference answers to the exercises of M3. The tasks are in `exercise.py`; each answer names its place in folovllm."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping, Sequence

# --- what blocks waste ------------------------------------------------------------------------------------


def blocks_and_waste(num_tokens: int, block_size: int) -> tuple[int, float]:
    """-(-a // b) rounds up (`num_blocks` in folovllm/course/lessons/fragmentation.py)."""
    if num_tokens < 0 or block_size < 1:
        raise ValueError(f"num_tokens={num_tokens}, block_size={block_size}: at least 0 and 1")
    blocks = -(-num_tokens // block_size)
    return blocks, 1 - num_tokens / (blocks * block_size) if blocks else 0.0


def blocks_of_samples(prompt_len: int, output_len: int, n: int, block_size: int) -> tuple[int, int]:
    """What forks leave shared is whole blocks (folovllm/scheduler/scheduler.py: `Scheduler` says who forks what)."""
    if min(prompt_len, n, block_size) < 1 or output_len < 0:
        raise ValueError(f"prompt_len={prompt_len}, n={n}, block_size={block_size}, output_len={output_len}")
    shared = (prompt_len - 1) // block_size
    each = -(-(prompt_len + output_len) // block_size)
    return shared + n * (each - shared), n * each


# --- where a token's K/V stands ---------------------------------------------------------------------------


def slot_mapping(block_table: Sequence[int], start: int, num_tokens: int, block_size: int) -> list[int]:
    """As `InputBatch` in folovllm/runner/input_batch.py does it for all requests of a step."""
    if min(start, num_tokens) < 0 or block_size < 1 or start + num_tokens > len(block_table) * block_size:
        raise ValueError(f"start={start}, num_tokens={num_tokens}, {len(block_table)} blocks of {block_size}")
    positions = range(start, start + num_tokens)
    return [block_table[i // block_size] * block_size + i % block_size for i in positions]


# --- who owns which block ---------------------------------------------------------------------------------


class BlockManager:
    """The engine's own is in two parts: folovllm/kv_cache/block_pool.py: `BlockPool` has the counts and the free list.

    folovllm/kv_cache/block_manager.py: `BlockManager` has the tables, and besides: blocks of the host to swap to, how
    many slots of a block are written, and room that newcomers leave to those that run.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if min(num_blocks, block_size) < 1:
            raise ValueError(f"num_blocks={num_blocks}, block_size={block_size}: at least 1")
        self.block_size = block_size
        self.free_list = deque(range(1, num_blocks + 1))  # taken from the left, given back at the right
        self.ref_cnt = [0] * (num_blocks + 1)
        self.tables: dict[str, list[int]] = {}
        self.lengths: dict[str, int] = {}

    def take(self, count: int) -> list[int]:
        """Free blocks, each named once from now on."""
        blocks = [self.free_list.popleft() for _ in range(count)]
        for block in blocks:
            self.ref_cnt[block] = 1
        return blocks

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that so many tokens need."""
        return -(-num_tokens // self.block_size)

    def allocate(self, seq_id: str, num_tokens: int) -> bool:
        """Nothing is written before it is known that there is enough."""
        if seq_id in self.tables or num_tokens < 1:
            raise ValueError(f"seq_id={seq_id!r}, num_tokens={num_tokens}: a new id and at least 1")
        if self.blocks_for(num_tokens) > len(self.free_list):
            return False
        self.tables[seq_id] = self.take(self.blocks_for(num_tokens))
        self.lengths[seq_id] = num_tokens
        return True

    def append(self, seq_id: str, num_tokens: int) -> list[tuple[int, int]] | None:
        """Only the block that the next token goes into can be shared and not full."""
        table, length = self.tables[seq_id], self.lengths[seq_id]
        if num_tokens < 1:
            raise ValueError(f"num_tokens={num_tokens}: at least 1")
        missing = self.blocks_for(length + num_tokens) - len(table)
        shared = length % self.block_size > 0 and self.ref_cnt[table[-1]] > 1
        if missing + shared > len(self.free_list):
            return None
        copies = []
        if shared:
            (own,) = self.take(1)
            copies.append((table[-1], own))
            self.ref_cnt[table[-1]] -= 1
            table[-1] = own
        table += self.take(missing)
        self.lengths[seq_id] = length + num_tokens
        return copies

    def fork(self, parent_id: str, child_id: str, num_tokens: int) -> None:
        """Numbers are copied, blocks are not."""
        if child_id in self.tables or not 1 <= num_tokens <= self.lengths[parent_id]:
            raise ValueError(f"child_id={child_id!r}, num_tokens={num_tokens}: a new id, and no more than the parent")
        self.tables[child_id] = self.tables[parent_id][: self.blocks_for(num_tokens)]
        self.lengths[child_id] = num_tokens
        for block in self.tables[child_id]:
            self.ref_cnt[block] += 1

    def free(self, seq_id: str) -> None:
        """The last block first, so that a sequence's tail is taken by others before its head: M4 has a use for that."""
        for block in reversed(self.tables.pop(seq_id)):
            self.ref_cnt[block] -= 1
            if self.ref_cnt[block] == 0:
                self.free_list.append(block)
        del self.lengths[seq_id]

    def table(self, seq_id: str) -> list[int]:
        """A copy: who changes it does not change the books."""
        return list(self.tables[seq_id])

    def ref_count(self, block: int) -> int:
        """As counted."""
        return self.ref_cnt[block]

    def num_free(self) -> int:
        """The length of the free list."""
        return len(self.free_list)


# --- who gives way ----------------------------------------------------------------------------------------


def give_way(
    request_id: str,
    needed: int,
    running: Sequence[tuple[str, int]],
    tables: Mapping[str, Sequence[int]],
    num_free: int,
) -> list[str]:
    """`Scheduler` in folovllm/scheduler/scheduler.py asks for room, lets one go, and asks again."""
    if needed < 1 or all(request_id != name for name, _ in running):
        raise ValueError(f"request_id={request_id!r}, needed={needed}: a request that runs, and at least 1")
    counts = Counter(block for name, _ in running for block in tables[name])
    line = [name for name, _ in sorted(running, key=lambda place: place[1])]  # a sort keeps the order of equals
    victims: list[str] = []
    while num_free < needed and request_id not in victims:
        victims.append(line.pop())
        for block in tables[victims[-1]]:
            counts[block] -= 1
            num_free += counts[block] == 0
    return victims


# --- what it costs ----------------------------------------------------------------------------------------


def preemption_seconds(
    num_tokens: int,
    block_size: int,
    *,
    kv_bytes_per_token: int,
    num_weights: int,
    flops_per_second: float,
    copy_bytes_per_second: float,
    seconds_per_copy: float,
) -> tuple[float, float]:
    """Arithmetic. What really happens: `swap_out` in folovllm/kv_cache/block_manager.py, and a prefill."""
    counts = (num_tokens, block_size, kv_bytes_per_token, num_weights)
    speeds = (flops_per_second, copy_bytes_per_second)
    if min(counts) < 1 or min(speeds) <= 0 or seconds_per_copy < 0:
        raise ValueError(f"counts {counts} must be at least 1, speeds {speeds} above 0")
    blocks = -(-num_tokens // block_size)
    one_copy = block_size * kv_bytes_per_token / copy_bytes_per_second + seconds_per_copy
    return 2 * num_weights * num_tokens / flops_per_second, 2 * blocks * one_copy
