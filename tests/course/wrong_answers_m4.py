"""Wrong answers to the exercises of M4, as in `wrong_answers.py`."""

from __future__ import annotations

M4 = {
    "split_budget": {
        "in the order of admission": """
            def split_budget(running, waiting, budget, long_prefill_token_threshold=0):
                step, left = [], budget
                right_split(running, waiting, budget, long_prefill_token_threshold)
                for name, missing in [*running, *waiting]:
                    count = min(missing, left, long_prefill_token_threshold or left)
                    if count:
                        step.append((name, count))
                        left -= count
                return step
        """,
        "short prompts count as decodes": """
            def split_budget(running, waiting, budget, long_prefill_token_threshold=0):
                short = [place for place in waiting if place[1] == 1]
                long = [place for place in waiting if place[1] > 1]
                return right_split([*running, *short], long, budget, long_prefill_token_threshold)
        """,
        "prompts first": """
            def split_budget(running, waiting, budget, long_prefill_token_threshold=0):
                right_split(running, waiting, budget, long_prefill_token_threshold)
                chunks = [place for place in running if place[1] > 1]
                decodes = [place for place in running if place[1] == 1]
                return right_split([], [*chunks, *waiting, *decodes], budget, long_prefill_token_threshold)
        """,
        "one chunk in a step": """
            def split_budget(running, waiting, budget, long_prefill_token_threshold=0):
                step = right_split(running, waiting, budget, long_prefill_token_threshold)
                lacks = dict([*running, *waiting])
                cut = next((i for i, (name, count) in enumerate(step) if lacks[name] > 1), len(step))
                return step[: cut + 1]
        """,
        "whole prompts only": """
            def split_budget(running, waiting, budget, long_prefill_token_threshold=0):
                step = right_split(running, waiting, budget, long_prefill_token_threshold)
                lacks = dict(waiting)
                return [(name, count) for name, count in step if lacks.get(name, count) == count]
        """,
        "waiting ones have no longest piece": """
            def split_budget(running, waiting, budget, long_prefill_token_threshold=0):
                step = right_split(running, [], budget, long_prefill_token_threshold)
                left = budget - sum(count for _, count in step)
                return step + (right_split([], waiting, left) if left else [])
        """,
        "those with nothing are in it": """
            def split_budget(running, waiting, budget, long_prefill_token_threshold=0):
                step = right_split(running, waiting, budget, long_prefill_token_threshold)
                names = [name for name, _ in step]
                return step + [(name, 0) for name, _ in [*running, *waiting] if name not in names]
        """,
        "no limit is a limit of 0": """
            def split_budget(running, waiting, budget, long_prefill_token_threshold=0):
                step = right_split(running, waiting, budget, long_prefill_token_threshold)
                return step if long_prefill_token_threshold else []
        """,
        "sorted in place": """
            def split_budget(running, waiting, budget, long_prefill_token_threshold=0):
                running.sort(key=lambda place: place[1] > 1)
                return right_split(running, waiting, budget, long_prefill_token_threshold)
        """,
        "nothing is refused": """
            def split_budget(running, waiting, budget, long_prefill_token_threshold=0):
                return right_split(running, waiting, max(1, budget), max(0, long_prefill_token_threshold))
        """,
    },
    "chunk_mask": {
        "a chunk is a triangle": """
            def chunk_mask(shares):
                right_mask(shares)
                blocks = [torch.ones(count, start + count).tril() for start, count in shares]
                return torch.block_diag(*blocks).bool()
        """,
        "all of the chunk": """
            def chunk_mask(shares):
                right_mask(shares)
                return torch.block_diag(*(torch.ones(count, start + count) for start, count in shares)).bool()
        """,
        "not itself": """
            def chunk_mask(shares):
                right_mask(shares)
                rows = [torch.ones(count, start + count).tril(start - 1) for start, count in shares]
                return torch.block_diag(*rows).bool()
        """,
        "what comes after": """
            def chunk_mask(shares):
                right_mask(shares)
                rows = [torch.ones(count, start + count).triu(start) for start, count in shares]
                return torch.block_diag(*rows).bool()
        """,
        "neighbours are seen": """
            def chunk_mask(shares):
                width = right_mask(shares).shape[1]
                rows, before = [], 0
                for start, count in shares:
                    rows.append(torch.ones(count, width).tril(before + start))
                    before += start + count
                return torch.cat(rows).bool()
        """,
        "only the new keys": """
            def chunk_mask(shares):
                right_mask(shares)
                return torch.block_diag(*(torch.ones(count, count).tril() for _, count in shares)).bool()
        """,
        "numbers": """
            def chunk_mask(shares):
                return right_mask(shares).long()
        """,
        "nothing is refused": """
            def chunk_mask(shares):
                shares = [(max(0, start), count) for start, count in shares]
                return right_mask(shares)
        """,
    },
    "rows_to_sample": {
        "every chunk samples": """
            def rows_to_sample(shares):
                right_rows(shares)
                return right_rows([(start, count, start + count) for start, count, _ in shares])
        """,
        "one too far": """
            def rows_to_sample(shares):
                return [row + 1 for row in right_rows(shares)]
        """,
        "the first row of each": """
            def rows_to_sample(shares):
                rows, before = [], 0
                right_rows(shares)
                for start, count, known in shares:
                    if start + count == known:
                        rows.append(before)
                    before += count
                return rows
        """,
        "rows of the request alone": """
            def rows_to_sample(shares):
                right_rows(shares)
                return [count - 1 for start, count, known in shares if start + count == known]
        """,
        "those that are not done take no rows": """
            def rows_to_sample(shares):
                right_rows(shares)
                return right_rows([share for share in shares if share[0] + share[1] == share[2]])
        """,
        "one token short is done": """
            def rows_to_sample(shares):
                right_rows(shares)
                rows, end = [], 0
                for start, count, known in shares:
                    end += count
                    if start + count >= known - 1:
                        rows.append(end - 1)
                return rows
        """,
        "tokens that nobody knows": """
            def rows_to_sample(shares):
                return right_rows([(start, count, max(known, start + count)) for start, count, known in shares])
        """,
    },
    "block_keys": {
        "no chain": """
            def block_keys(token_ids, block_size, hash_block, secret, cache_salt=""):
                right_keys([], block_size, hash_block, secret)
                return [hash_block(secret, block, cache_salt) for block in full_blocks(token_ids, block_size)]
        """,
        "the rest has a key": """
            def block_keys(token_ids, block_size, hash_block, secret, cache_salt=""):
                keys = right_keys(token_ids, block_size, hash_block, secret, cache_salt)
                rest = tuple(token_ids[len(keys) * block_size :])
                return [*keys, hash_block(keys[-1] if keys else secret, rest, cache_salt)] if rest else keys
        """,
        "the salt once": """
            def block_keys(token_ids, block_size, hash_block, secret, cache_salt=""):
                right_keys([], block_size, hash_block, secret)
                keys = []
                for block in full_blocks(token_ids, block_size):
                    keys.append(hash_block(keys[-1] if keys else secret, block, "" if keys else cache_salt))
                return keys
        """,
        "no salt": """
            def block_keys(token_ids, block_size, hash_block, secret, cache_salt=""):
                return right_keys(token_ids, block_size, hash_block, secret)
        """,
        "all tokens in every key": """
            def block_keys(token_ids, block_size, hash_block, secret, cache_salt=""):
                ends = range(block_size, len(token_ids) + 1, max(1, block_size))
                return [right_keys(token_ids[:end], end, hash_block, secret, cache_salt)[-1] for end in ends]
        """,
        "from the beginning for each": """
            def block_keys(token_ids, block_size, hash_block, secret, cache_salt=""):
                right_keys([], block_size, hash_block, secret)
                count = len(token_ids) // block_size
                return [
                    right_keys(token_ids[: (i + 1) * block_size], block_size, hash_block, secret, cache_salt)[-1]
                    for i in range(count)
                ]
        """,
    },
    "reusable_tokens": {
        "all of it": """
            def reusable_tokens(num_tokens, block_size, in_cache):
                right_reusable(num_tokens, block_size, in_cache)
                return [*in_cache, False].index(False) * block_size
        """,
        "all but one token": """
            def reusable_tokens(num_tokens, block_size, in_cache):
                right_reusable(num_tokens, block_size, in_cache)
                return min([*in_cache, False].index(False) * block_size, num_tokens - 1)
        """,
        "gaps do not matter": """
            def reusable_tokens(num_tokens, block_size, in_cache):
                right_reusable(num_tokens, block_size, in_cache)
                return min(sum(in_cache), (num_tokens - 1) // block_size) * block_size
        """,
        "a block is always left": """
            def reusable_tokens(num_tokens, block_size, in_cache):
                found = right_reusable(num_tokens, block_size, in_cache)
                return found - block_size if all(in_cache) and found >= block_size else found
        """,
        "blocks": """
            def reusable_tokens(num_tokens, block_size, in_cache):
                return right_reusable(num_tokens, block_size, in_cache) // block_size
        """,
        "any list": """
            def reusable_tokens(num_tokens, block_size, in_cache):
                count = num_tokens // max(1, block_size)
                right_reusable(num_tokens, block_size, [False] * count)
                return right_reusable(num_tokens, block_size, ([*in_cache] + [False] * count)[:count])
        """,
    },
    "eviction_order": {
        "heads first": """
            def eviction_order(num_blocks, events):
                return right_order(num_blocks, [(w, b[::-1] if w == "release" else b) for w, b in events])
        """,
        "set free by the first": """
            def eviction_order(num_blocks, events):
                right_order(num_blocks, events)
                line = dict.fromkeys(range(1, num_blocks + 1))
                for what, blocks in events:
                    for block in reversed(blocks):
                        line.pop(block, None)
                        if what == "release":
                            line[block] = None
                return list(line)
        """,
        "back to its old place": """
            def eviction_order(num_blocks, events):
                return sorted(right_order(num_blocks, events))
        """,
        "to the front": """
            def eviction_order(num_blocks, events):
                right_order(num_blocks, events)
                line, holders = list(range(1, num_blocks + 1)), Counter()
                for what, blocks in events:
                    for block in blocks:
                        holders[block] += 1 if what == "hold" else -1
                        if block in line:
                            line.remove(block)
                        if not holders[block]:
                            line.insert(0, block)
                return line
        """,
        "a hit is no use": """
            def eviction_order(num_blocks, events):
                free = right_order(num_blocks, events)
                first = {}
                for time, (what, blocks) in enumerate(events):
                    for place, block in enumerate(reversed(blocks)):
                        if what == "release":
                            first.setdefault(block, (time, place))
                return sorted(free, key=lambda block: first.get(block, (-1, block)))
        """,
        "by the largest number": """
            def eviction_order(num_blocks, events):
                return right_order(num_blocks, [(what, sorted(blocks)) for what, blocks in events])
        """,
        "held ones are in it": """
            def eviction_order(num_blocks, events):
                free = right_order(num_blocks, events)
                return free + [block for block in range(1, num_blocks + 1) if block not in free]
        """,
        "any block": """
            def eviction_order(num_blocks, events):
                known = [(what, [block for block in blocks if 1 <= block <= num_blocks]) for what, blocks in events]
                return right_order(num_blocks, known)
        """,
        "released twice": """
            def eviction_order(num_blocks, events):
                try:
                    return right_order(num_blocks, events)
                except ValueError:
                    if num_blocks < 1 or any(not 1 <= b <= num_blocks for _, blocks in events for b in blocks):
                        raise
                    return []
        """,
    },
    "PrefixIndex": {
        "the beginning does not count": """
            class PrefixIndex(RightIndex):
                def insert(self, token_ids, blocks, cache_salt=""):
                    super().insert([], [], cache_salt)
                    if len(blocks) > len(token_ids) // self.block_size:
                        raise ValueError
                    for tokens, block in zip(full_blocks(token_ids, self.block_size), blocks):
                        self.block_of.setdefault((tokens, cache_salt), block)
                def find(self, token_ids, cache_salt=""):
                    found = []
                    for tokens in full_blocks(token_ids, self.block_size):
                        if (tokens, cache_salt) not in self.block_of:
                            break
                        found.append(self.block_of[tokens, cache_salt])
                    return found
                def evict(self, block):
                    self.block_of = {key: b for key, b in self.block_of.items() if b != block}
        """,
        "the block before, by its number": """
            class PrefixIndex(RightIndex):
                def insert(self, token_ids, blocks, cache_salt=""):
                    if len(blocks) > len(token_ids) // self.block_size:
                        raise ValueError
                    before = 0
                    for tokens, block in zip(full_blocks(token_ids, self.block_size), blocks):
                        before = self.block_of.setdefault((before, tokens, cache_salt), block)
                def find(self, token_ids, cache_salt=""):
                    found = []
                    for tokens in full_blocks(token_ids, self.block_size):
                        key = (found[-1] if found else 0, tokens, cache_salt)
                        if key not in self.block_of:
                            break
                        found.append(self.block_of[key])
                    return found
                def evict(self, block):
                    self.block_of = {key: b for key, b in self.block_of.items() if b != block}
        """,
        "the salt is forgotten": """
            class PrefixIndex(RightIndex):
                def insert(self, token_ids, blocks, cache_salt=""):
                    super().insert(token_ids, blocks)
                def find(self, token_ids, cache_salt=""):
                    return super().find(token_ids)
        """,
        "the newest copy": """
            class PrefixIndex(RightIndex):
                def insert(self, token_ids, blocks, cache_salt=""):
                    for old, new in zip(self.find(token_ids, cache_salt), blocks):
                        if old != new:
                            self.evict(old)
                    super().insert(token_ids, blocks, cache_salt)
        """,
        "a copy is lost, and all is": """
            class PrefixIndex(RightIndex):
                def insert(self, token_ids, blocks, cache_salt=""):
                    super().insert(token_ids, blocks, cache_salt)
                    self.copies = getattr(self, "copies", {})
                    self.copies.update(zip(blocks, self.find(token_ids, cache_salt)))
                def evict(self, block):
                    super().evict(getattr(self, "copies", {}).get(block, block))
        """,
        "gaps are jumped over": """
            class PrefixIndex(RightIndex):
                def find(self, token_ids, cache_salt=""):
                    found, beginning = [], 0
                    for tokens in full_blocks(token_ids, self.block_size):
                        beginning = self.numbers.get((beginning, tokens, cache_salt), -1)
                        if beginning in self.block_of:
                            found.append(self.block_of[beginning])
                    return found
        """,
        "the last block is found when it is not full": """
            class PrefixIndex(RightIndex):
                def find(self, token_ids, cache_salt=""):
                    found = super().find(token_ids, cache_salt)
                    rest = tuple(token_ids[len(found) * self.block_size :])
                    if rest and len(rest) < self.block_size:
                        for (before, tokens, salt), number in self.numbers.items():
                            head = self.beginning_of[found[-1]] if found else 0
                            if (before, tokens[: len(rest)], salt) == (head, rest, cache_salt):
                                return found + [b for b in [self.block_of.get(number)] if b is not None]
                    return found
        """,
        "nothing is ever evicted": """
            class PrefixIndex(RightIndex):
                def evict(self, block):
                    pass
        """,
        "what comes after goes along": """
            class PrefixIndex(RightIndex):
                def evict(self, block):
                    gone = {self.beginning_of.get(block)}
                    for (before, tokens, salt), number in self.numbers.items():
                        if before in gone:
                            gone.add(number)
                    for b in [b for b, number in self.beginning_of.items() if number in gone]:
                        super().evict(b)
        """,
        "all tokens, not those of the blocks": """
            class PrefixIndex(RightIndex):
                def insert(self, token_ids, blocks, cache_salt=""):
                    super().insert(token_ids, blocks, cache_salt)
                    if blocks:
                        more = range(len(blocks), len(token_ids) // self.block_size)
                        super().insert(token_ids, [*blocks, *(blocks[-1] + 100 + i for i in more)], cache_salt)
        """,
        "more blocks than tokens": """
            class PrefixIndex(RightIndex):
                def insert(self, token_ids, blocks, cache_salt=""):
                    super().insert(token_ids, blocks[: len(token_ids) // self.block_size], cache_salt)
        """,
    },
}

ALIASES_M4 = {
    "right_split": "split_budget",
    "right_mask": "chunk_mask",
    "right_rows": "rows_to_sample",
    "right_keys": "block_keys",
    "right_reusable": "reusable_tokens",
    "right_order": "eviction_order",
    "RightIndex": "PrefixIndex",
}
