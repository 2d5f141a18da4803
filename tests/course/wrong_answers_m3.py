"""Wrong answers to the exercises of M3, as in `wrong_answers.py`."""

from __future__ import annotations

M3 = {
    "blocks_and_waste": {
        "rounded down": """
            def blocks_and_waste(num_tokens, block_size):
                right_waste(num_tokens, block_size)
                blocks = max(1, num_tokens // block_size) if num_tokens else 0
                return blocks, max(0.0, 1 - num_tokens / (blocks * block_size)) if blocks else 0.0
        """,
        "always one more": """
            def blocks_and_waste(num_tokens, block_size):
                right_waste(num_tokens, block_size)
                blocks = num_tokens // block_size + 1
                return blocks, 1 - num_tokens / (blocks * block_size)
        """,
        "empty slots, not their share": """
            def blocks_and_waste(num_tokens, block_size):
                blocks, waste = right_waste(num_tokens, block_size)
                return blocks, blocks * block_size - num_tokens
        """,
        "the share of the last block": """
            def blocks_and_waste(num_tokens, block_size):
                blocks, _ = right_waste(num_tokens, block_size)
                return blocks, -num_tokens % block_size / block_size
        """,
        "the used share": """
            def blocks_and_waste(num_tokens, block_size):
                blocks, waste = right_waste(num_tokens, block_size)
                return blocks, 1 - waste if blocks else 0.0
        """,
        "nothing is refused": """
            def blocks_and_waste(num_tokens, block_size):
                return right_waste(max(0, num_tokens), max(1, block_size))
        """,
    },
    "blocks_of_samples": {
        "the whole prompt is shared": """
            def blocks_of_samples(prompt_len, output_len, n, block_size):
                shared, each = prompt_len // block_size, right_samples(prompt_len, output_len, 1, block_size)[0]
                return shared + n * (each - shared), right_samples(prompt_len, output_len, n, block_size)[1]
        """,
        "partly filled blocks stay shared": """
            def blocks_of_samples(prompt_len, output_len, n, block_size):
                _, copies = right_samples(prompt_len, output_len, n, block_size)
                shared, each = -(-(prompt_len - 1) // block_size), copies // n
                return shared + n * (each - shared), copies
        """,
        "only the shared ones": """
            def blocks_of_samples(prompt_len, output_len, n, block_size):
                _, copies = right_samples(prompt_len, output_len, n, block_size)
                return (prompt_len - 1) // block_size, copies
        """,
        "blocks of all tokens together": """
            def blocks_of_samples(prompt_len, output_len, n, block_size):
                shared, _ = right_samples(prompt_len, output_len, n, block_size)
                return shared, -(-n * (prompt_len + output_len) // block_size)
        """,
        "negative outputs": """
            def blocks_of_samples(prompt_len, output_len, n, block_size):
                return right_samples(prompt_len, max(0, output_len), n, block_size)
        """,
    },
    "slot_mapping": {
        "blocks in the order of the pool": """
            def slot_mapping(block_table, start, num_tokens, block_size):
                return right_slots(sorted(block_table), start, num_tokens, block_size)
        """,
        "the first block goes on": """
            def slot_mapping(block_table, start, num_tokens, block_size):
                slots = right_slots(block_table, start, num_tokens, block_size)
                return [slots[0] + i for i in range(num_tokens)] if slots else []
        """,
        "start is forgotten": """
            def slot_mapping(block_table, start, num_tokens, block_size):
                right_slots(block_table, start, num_tokens, block_size)
                return right_slots(block_table, 0, num_tokens, block_size)
        """,
        "the offset is forgotten": """
            def slot_mapping(block_table, start, num_tokens, block_size):
                slots = right_slots(block_table, start, num_tokens, block_size)
                return [slot - slot % block_size for slot in slots]
        """,
        "blocks count from 1": """
            def slot_mapping(block_table, start, num_tokens, block_size):
                slots = right_slots(block_table, start, num_tokens, block_size)
                return [slot - block_size for slot in slots]
        """,
        "a page fault is not noticed": """
            def slot_mapping(block_table, start, num_tokens, block_size):
                if start < 0 or num_tokens < 0 or block_size < 1:
                    raise ValueError
                num_tokens = min(num_tokens, len(block_table) * block_size - start)
                return right_slots(block_table, start, num_tokens, block_size)
        """,
        "negative positions count from the end": """
            def slot_mapping(block_table, start, num_tokens, block_size):
                if start + num_tokens > len(block_table) * block_size or num_tokens < 0 or block_size < 1:
                    raise ValueError
                positions = range(start, start + num_tokens)
                return [block_table[i // block_size] * block_size + i % block_size for i in positions]
        """,
    },
    "BlockManager": {
        "block 0 is given away": """
            class BlockManager(RightManager):
                def __init__(self, num_blocks, block_size):
                    super().__init__(num_blocks, block_size)
                    self.free_list = deque(range(num_blocks))
        """,
        "one block more than needed": """
            class BlockManager(RightManager):
                def blocks_for(self, num_tokens):
                    return num_tokens // self.block_size + 1
        """,
        "the last free block is kept": """
            class BlockManager(RightManager):
                def allocate(self, seq_id, num_tokens):
                    if seq_id not in self.tables and self.blocks_for(num_tokens) == self.num_free() > 0:
                        return False
                    return super().allocate(seq_id, num_tokens)
        """,
        "as much as there is": """
            class BlockManager(RightManager):
                def allocate(self, seq_id, num_tokens):
                    if seq_id in self.tables or num_tokens < 1:
                        raise ValueError
                    self.tables[seq_id] = self.take(min(self.num_free(), self.blocks_for(num_tokens)))
                    self.lengths[seq_id] = num_tokens
                    return len(self.tables[seq_id]) == self.blocks_for(num_tokens)
        """,
        "allocate returns nothing": """
            class BlockManager(RightManager):
                def allocate(self, seq_id, num_tokens):
                    super().allocate(seq_id, num_tokens)
        """,
        "every token takes a block": """
            class BlockManager(RightManager):
                def append(self, seq_id, num_tokens):
                    copies = super().append(seq_id, num_tokens)
                    if copies is not None and self.num_free():
                        self.tables[seq_id] += self.take(1)
                    return copies
        """,
        "no copy on write": """
            class BlockManager(RightManager):
                def append(self, seq_id, num_tokens):
                    table, length = self.tables[seq_id], self.lengths[seq_id]
                    if num_tokens < 1:
                        raise ValueError
                    missing = self.blocks_for(length + num_tokens) - len(table)
                    if missing > self.num_free():
                        return None
                    table += self.take(missing)
                    self.lengths[seq_id] += num_tokens
                    return []
        """,
        "always a copy": """
            class BlockManager(RightManager):
                def append(self, seq_id, num_tokens):
                    last = self.tables[seq_id][-1]
                    partial = self.lengths[seq_id] % self.block_size > 0
                    self.ref_cnt[last] += partial
                    copies = super().append(seq_id, num_tokens)
                    self.ref_cnt[last] -= partial
                    if copies and not self.ref_cnt[last]:
                        self.free_list.append(last)
                    return copies
        """,
        "full blocks are copied, too": """
            class BlockManager(RightManager):
                def append(self, seq_id, num_tokens):
                    copies, table = super().append(seq_id, num_tokens), self.tables[seq_id]
                    index = (self.lengths[seq_id] - num_tokens - 1) // self.block_size
                    if copies == [] and self.ref_cnt[table[index]] > 1 and self.num_free():
                        (own,) = self.take(1)
                        copies = [(table[index], own)]
                        self.ref_cnt[table[index]] -= 1
                        table[index] = own
                    return copies
        """,
        "the copy's source keeps its count": """
            class BlockManager(RightManager):
                def append(self, seq_id, num_tokens):
                    copies = super().append(seq_id, num_tokens)
                    for source, _ in copies or []:
                        self.ref_cnt[source] += 1
                    return copies
        """,
        "the copy's source is freed": """
            class BlockManager(RightManager):
                def append(self, seq_id, num_tokens):
                    copies = super().append(seq_id, num_tokens)
                    for source, _ in copies or []:
                        self.ref_cnt[source] = 0
                        self.free_list.append(source)
                    return copies
        """,
        "the copy is not counted": """
            class BlockManager(RightManager):
                def append(self, seq_id, num_tokens):
                    table, length = self.tables[seq_id], self.lengths[seq_id]
                    missing = self.blocks_for(length + num_tokens) - len(table)
                    copies = super().append(seq_id, num_tokens)
                    if copies is None and missing <= self.num_free():
                        table += self.take(missing)
                        self.lengths[seq_id] = length + num_tokens
                        return []
                    return copies
        """,
        "half of it is done": """
            class BlockManager(RightManager):
                def append(self, seq_id, num_tokens):
                    copies = super().append(seq_id, num_tokens)
                    if copies is None:
                        self.tables[seq_id] += self.take(self.num_free())
                    return copies
        """,
        "copies the wrong way round": """
            class BlockManager(RightManager):
                def append(self, seq_id, num_tokens):
                    copies = super().append(seq_id, num_tokens)
                    return copies and [(target, source) for source, target in copies]
        """,
        "True for a list": """
            class BlockManager(RightManager):
                def append(self, seq_id, num_tokens):
                    return super().append(seq_id, num_tokens) is not None
        """,
        "one table for both": """
            class BlockManager(RightManager):
                def fork(self, parent_id, child_id, num_tokens):
                    super().fork(parent_id, child_id, num_tokens)
                    if len(self.tables[parent_id]) == len(self.tables[child_id]):
                        self.tables[child_id] = self.tables[parent_id]
        """,
        "the whole table is forked": """
            class BlockManager(RightManager):
                def fork(self, parent_id, child_id, num_tokens):
                    super().fork(parent_id, child_id, num_tokens)
                    rest = self.tables[parent_id][len(self.tables[child_id]):]
                    self.tables[child_id] += rest
                    for block in rest:
                        self.ref_cnt[block] += 1
        """,
        "a fork copies": """
            class BlockManager(RightManager):
                def fork(self, parent_id, child_id, num_tokens):
                    if parent_id not in self.tables or self.num_free() < self.blocks_for(num_tokens):
                        return super().fork(parent_id, child_id, num_tokens)
                    if child_id in self.tables or not 1 <= num_tokens <= self.lengths[parent_id]:
                        raise ValueError
                    self.allocate(child_id, num_tokens)
        """,
        "a fork is not counted": """
            class BlockManager(RightManager):
                def fork(self, parent_id, child_id, num_tokens):
                    super().fork(parent_id, child_id, num_tokens)
                    for block in self.tables[child_id]:
                        self.ref_cnt[block] -= 1
        """,
        "the fourth to share is not counted": """
            class BlockManager(RightManager):
                def fork(self, parent_id, child_id, num_tokens):
                    super().fork(parent_id, child_id, num_tokens)
                    for block in self.tables[child_id]:
                        self.ref_cnt[block] = min(3, self.ref_cnt[block])
        """,
        "the child is as long as the parent": """
            class BlockManager(RightManager):
                def fork(self, parent_id, child_id, num_tokens):
                    super().fork(parent_id, child_id, num_tokens)
                    self.lengths[child_id] = self.lengths[parent_id]
        """,
        "more tokens than the parent has": """
            class BlockManager(RightManager):
                def fork(self, parent_id, child_id, num_tokens):
                    if parent_id in self.tables and num_tokens > self.lengths[parent_id]:
                        num_tokens = self.lengths[parent_id]
                    super().fork(parent_id, child_id, num_tokens)
        """,
        "shared blocks are freed": """
            class BlockManager(RightManager):
                def free(self, seq_id):
                    for block in self.tables.pop(seq_id):
                        self.ref_cnt[block] = 0
                        self.free_list.append(block)
                    del self.lengths[seq_id]
        """,
        "freed blocks are lost": """
            class BlockManager(RightManager):
                def free(self, seq_id):
                    for block in self.tables.pop(seq_id):
                        self.ref_cnt[block] -= 1
                    del self.lengths[seq_id]
        """,
        "free twice": """
            class BlockManager(RightManager):
                def free(self, seq_id):
                    table = self.tables[seq_id]
                    super().free(seq_id)
                    self.free_list.extend(block for block in table if self.ref_cnt[block] == 0)
        """,
        "freed twice in silence": """
            class BlockManager(RightManager):
                def free(self, seq_id):
                    if seq_id in self.tables:
                        super().free(seq_id)
        """,
        "the books' own list": """
            class BlockManager(RightManager):
                def table(self, seq_id):
                    return self.tables[seq_id]
        """,
    },
    "give_way": {
        "the first admitted": """
            def give_way(request_id, needed, running, tables, num_free):
                return right_victims(request_id, needed, running[::-1], tables, num_free)
        """,
        "held is taken for free": """
            def give_way(request_id, needed, running, tables, num_free):
                right_victims(request_id, needed, running, tables, num_free)
                line, victims = [name for name, _ in sorted(running, key=lambda place: place[1])], []
                while num_free < needed and request_id not in victims:
                    victims.append(line.pop())
                    num_free += len(tables[victims[-1]])
                return victims
        """,
        "shared blocks never come free": """
            def give_way(request_id, needed, running, tables, num_free):
                right_victims(request_id, needed, running, tables, num_free)
                counts = Counter(block for name, _ in running for block in tables[name])
                line, victims = [name for name, _ in sorted(running, key=lambda place: place[1])], []
                while num_free < needed and request_id not in victims:
                    victims.append(line.pop())
                    num_free += sum(counts[block] == 1 for block in tables[victims[-1]])
                return victims
        """,
        "priorities are ignored": """
            def give_way(request_id, needed, running, tables, num_free):
                return right_victims(request_id, needed, [(name, 0) for name, _ in running], tables, num_free)
        """,
        "the most urgent first": """
            def give_way(request_id, needed, running, tables, num_free):
                return right_victims(request_id, needed, [(name, -p) for name, p in running], tables, num_free)
        """,
        "never the one that asks": """
            def give_way(request_id, needed, running, tables, num_free):
                right_victims(request_id, needed, running, tables, num_free)
                others = [place for place in running if place[0] != request_id]
                line, victims = [name for name, _ in sorted(others, key=lambda place: place[1])], []
                counts = Counter(block for name, _ in running for block in tables[name])
                while num_free < needed and line:
                    victims.append(line.pop())
                    for block in tables[victims[-1]]:
                        counts[block] -= 1
                        num_free += counts[block] == 0
                return victims
        """,
        "free blocks do not count": """
            def give_way(request_id, needed, running, tables, num_free):
                return right_victims(request_id, needed, running, tables, 0)
        """,
        "everybody": """
            def give_way(request_id, needed, running, tables, num_free):
                victims = right_victims(request_id, needed, running, tables, num_free)
                return victims and right_victims(request_id, 10**6, running, tables, num_free)
        """,
        "the line is emptied": """
            def give_way(request_id, needed, running, tables, num_free):
                victims = right_victims(request_id, needed, running, tables, num_free)
                running.clear()
                return victims
        """,
    },
    "preemption_seconds": {
        "one way only": """
            def preemption_seconds(num_tokens, block_size, **machine):
                recompute, swap = right_seconds(num_tokens, block_size, **machine)
                return recompute, swap / 2
        """,
        "only what is filled": """
            def preemption_seconds(num_tokens, block_size, **machine):
                recompute, _ = right_seconds(num_tokens, block_size, **machine)
                size, speed = machine["kv_bytes_per_token"], machine["copy_bytes_per_second"]
                copies = -(-num_tokens // block_size)
                return recompute, 2 * (num_tokens * size / speed + copies * machine["seconds_per_copy"])
        """,
        "one copy for all": """
            def preemption_seconds(num_tokens, block_size, **machine):
                recompute, _ = right_seconds(num_tokens, block_size, **machine)
                size, speed = machine["kv_bytes_per_token"], machine["copy_bytes_per_second"]
                slots = -(-num_tokens // block_size) * block_size
                return recompute, 2 * (slots * size / speed + machine["seconds_per_copy"])
        """,
        "one FLOP per weight": """
            def preemption_seconds(num_tokens, block_size, **machine):
                recompute, swap = right_seconds(num_tokens, block_size, **machine)
                return recompute / 2, swap
        """,
        "whole blocks are recomputed": """
            def preemption_seconds(num_tokens, block_size, **machine):
                right_seconds(num_tokens, block_size, **machine)
                return right_seconds(-(-num_tokens // block_size) * block_size, block_size, **machine)
        """,
        "the other way round": """
            def preemption_seconds(num_tokens, block_size, **machine):
                return right_seconds(num_tokens, block_size, **machine)[::-1]
        """,
    },
}

ALIASES_M3 = {
    "right_waste": "blocks_and_waste",
    "right_samples": "blocks_of_samples",
    "right_slots": "slot_mapping",
    "RightManager": "BlockManager",
    "right_victims": "give_way",
    "right_seconds": "preemption_seconds",
}
