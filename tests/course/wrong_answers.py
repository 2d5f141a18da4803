"""Wrong answers that learners give, per milestone and exercise: a name, and code that replaces the reference answer.

They run in the namespace of `solution.py`. The grader has to catch each of them.
"""

from __future__ import annotations

from tests.course.wrong_answers_kernels import M3_KERNELS
from tests.course.wrong_answers_latency import ALIASES_LATENCY, LATENCY
from tests.course.wrong_answers_m3 import ALIASES_M3, M3
from tests.course.wrong_answers_m4 import ALIASES_M4, M4

M0 = {
    "linear_flops": {
        "the last token is fed too": """
            def linear_flops(num_weights, prompt_len, n, *, cached):
                return 2 * num_weights * sum(tokens_fed(prompt_len, n + 1, cached))
        """,
        "one FLOP per weight": """
            def linear_flops(num_weights, prompt_len, n, *, cached):
                return num_weights * sum(tokens_fed(prompt_len, n, cached))
        """,
        "the prompt is free": """
            def linear_flops(num_weights, prompt_len, n, *, cached):
                tokens_fed(prompt_len, n, cached)
                return 2 * num_weights * (n if cached else n * prompt_len + n * (n - 1) // 2)
        """,
        "nothing is refused": """
            def linear_flops(num_weights, prompt_len, n, *, cached):
                return 2 * num_weights * sum(1 if cached and i else prompt_len + i for i in range(n))
        """,
    },
    "attention_flops": {
        "a token does not see itself": """
            def attention_flops(num_layers, num_heads, head_dim, prompt_len, n, *, cached):
                fed = tokens_fed(prompt_len, n, cached)
                pairs = sum(q * (prompt_len + i - (q == 1 and i > 0)) for i, q in enumerate(fed))
                return 4 * head_dim * num_heads * num_layers * pairs
        """,
        "hidden pairs are left out": """
            def attention_flops(num_layers, num_heads, head_dim, prompt_len, n, *, cached):
                fed = tokens_fed(prompt_len, n, cached)
                pairs = sum(q * (prompt_len + i) - q * (q - 1) // 2 for i, q in enumerate(fed))
                return 4 * head_dim * num_heads * num_layers * pairs
        """,
        "only the scores": """
            def attention_flops(num_layers, num_heads, head_dim, prompt_len, n, *, cached):
                fed = tokens_fed(prompt_len, n, cached)
                return 2 * head_dim * num_heads * num_layers * sum(q * (prompt_len + i) for i, q in enumerate(fed))
        """,
    },
    "arithmetic_intensity": {
        "only the weights are moved": """
            def arithmetic_intensity(m, k, n, dtype_bytes):
                if min(m, k, n, dtype_bytes) < 1:
                    raise ValueError
                return 2 * m * k * n / (dtype_bytes * k * n)
        """,
        "one FLOP per product": """
            def arithmetic_intensity(m, k, n, dtype_bytes):
                if min(m, k, n, dtype_bytes) < 1:
                    raise ValueError
                return m * k * n / (dtype_bytes * (m * k + k * n + m * n))
        """,
        "whole numbers": """
            def arithmetic_intensity(m, k, n, dtype_bytes):
                if min(m, k, n, dtype_bytes) < 1:
                    raise ValueError
                return 2 * m * k * n // (dtype_bytes * (m * k + k * n + m * n))
        """,
    },
    "kv_bytes_per_token": {
        "query heads": """
            def kv_bytes_per_token(config, dtype_bytes):
                return right_kv_bytes({**config, "num_key_value_heads": config["num_attention_heads"],
                    "head_dim": config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]},
                    dtype_bytes) if "kv_lora_rank" not in config else right_kv_bytes(config, dtype_bytes)
        """,
        "keys without values": """
            def kv_bytes_per_token(config, dtype_bytes):
                return right_kv_bytes(config, dtype_bytes) // (1 if config.get("kv_lora_rank") else 2)
        """,
        "head_dim is always hidden_size over heads": """
            def kv_bytes_per_token(config, dtype_bytes):
                return right_kv_bytes({**config, "head_dim": None}, dtype_bytes)
        """,
        "latent attention like any other": """
            def kv_bytes_per_token(config, dtype_bytes):
                return right_kv_bytes({**config, "kv_lora_rank": None}, dtype_bytes)
        """,
        "a latent key and a latent value": """
            def kv_bytes_per_token(config, dtype_bytes):
                return right_kv_bytes(config, dtype_bytes) * (2 if config.get("kv_lora_rank") else 1)
        """,
        "None is no number": """
            def kv_bytes_per_token(config, dtype_bytes):
                if "head_dim" in config and config["head_dim"] is None:
                    return 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"]
                return right_kv_bytes(config, dtype_bytes)
        """,
    },
    "causal_mask": {
        "upper-triangular": """
            def causal_mask(start, length):
                if start < 0 or length < 1:
                    raise ValueError
                return torch.ones(length, start + length, dtype=torch.bool).triu(start)
        """,
        "a decode row that sees only itself": """
            def causal_mask(start, length):
                return right_mask(start, length) if length > 1 else torch.arange(start + 1)[None] == start
        """,
        "start is forgotten": """
            def causal_mask(start, length):
                if start < 0 or length < 1:
                    raise ValueError
                return torch.ones(length, start + length, dtype=torch.bool).tril()
        """,
        "a token does not see itself": """
            def causal_mask(start, length):
                right_mask(start, length)
                return torch.arange(start + length)[None] < torch.arange(start, start + length)[:, None]
        """,
        "numbers for booleans": """
            def causal_mask(start, length):
                return right_mask(start, length).float()
        """,
        "square": """
            def causal_mask(start, length):
                return right_mask(0, start + length) if length > 1 else right_mask(start, length)
        """,
    },
    "left_pad": {
        "padded on the right": """
            def left_pad(prompts, pad_token_id):
                ids, mask, positions = right_left_pad(prompts, pad_token_id)
                rows = [list(p) + [pad_token_id] * (ids.shape[1] - len(p)) for p in prompts]
                return torch.tensor(rows), mask.flip(1), mask.flip(1).cumsum(1).sub(1) * mask.flip(1)
        """,
        "positions are columns": """
            def left_pad(prompts, pad_token_id):
                ids, mask, _ = right_left_pad(prompts, pad_token_id)
                return ids, mask, torch.arange(ids.shape[1]).expand_as(ids).contiguous()
        """,
        "every pad token is padding": """
            def left_pad(prompts, pad_token_id):
                ids, _, _ = right_left_pad(prompts, pad_token_id)
                mask = (ids != pad_token_id).long()
                return ids, mask, (mask.cumsum(1) - 1).clamp(min=0)
        """,
        "positions count from 1": """
            def left_pad(prompts, pad_token_id):
                ids, mask, _ = right_left_pad(prompts, pad_token_id)
                return ids, mask, mask.cumsum(1)
        """,
    },
    "decode_inputs": {
        "one position too far": """
            def decode_inputs(attention_mask, tokens):
                ids, mask, positions = right_decode(attention_mask, tokens)
                return ids, mask, positions + 1
        """,
        "the column number": """
            def decode_inputs(attention_mask, tokens):
                ids, mask, positions = right_decode(attention_mask, tokens)
                return ids, mask, torch.full_like(positions, attention_mask.shape[1])
        """,
        "the mask does not grow": """
            def decode_inputs(attention_mask, tokens):
                ids, _, positions = right_decode(attention_mask, tokens)
                return ids, attention_mask, positions
        """,
        "the mask is changed": """
            def decode_inputs(attention_mask, tokens):
                result = right_decode(attention_mask, tokens)
                attention_mask[:] = 1
                return result
        """,
    },
    "generate_greedy": {
        "no cache": """
            def generate_greedy(model, prompt, n):
                text = list(prompt)
                for _ in range(n):
                    text.append(int(model(input_ids=torch.tensor([text])).logits[0, -1].argmax()))
                return text[len(prompt):]
        """,
        "positions one too far": """
            def generate_greedy(model, prompt, n):
                cache, fed, output, past = DynamicCache(), list(prompt), [], 0
                for step in range(n):
                    positions = torch.arange(past, past + len(fed))[None] + (step > 0)
                    past += len(fed)
                    logits = model(input_ids=torch.tensor([fed]), position_ids=positions, past_key_values=cache).logits
                    output.append(int(logits[0, -1].argmax()))
                    fed = output[-1:]
                return output
        """,
        "one pass too many": """
            def generate_greedy(model, prompt, n):
                return right_greedy(model, prompt, n + 1)[:n]
        """,
    },
}

M1 = {
    "apply_repetition_penalty": {
        "always divides": """
            def apply_repetition_penalty(logits, token_ids, penalty):
                right_penalty(logits, token_ids, penalty)
                new = logits.clone()
                for i in set(token_ids):
                    new[i] /= penalty
                return new
        """,
        "per occurrence": """
            def apply_repetition_penalty(logits, token_ids, penalty):
                right_penalty(logits, token_ids, penalty)
                new = logits.clone()
                for i in token_ids:
                    new[i] = new[i] / penalty if new[i] > 0 else new[i] * penalty
                return new
        """,
        "in place": """
            def apply_repetition_penalty(logits, token_ids, penalty):
                logits[:] = right_penalty(logits, token_ids, penalty)
                return logits
        """,
    },
    "apply_temperature": {
        "multiplies": """
            def apply_temperature(logits, temperature):
                right_temperature(logits, temperature)
                return logits * temperature
        """,
        "in place": """
            def apply_temperature(logits, temperature):
                right_temperature(logits, temperature)
                logits /= temperature
                return logits
        """,
        "zero is not refused": """
            def apply_temperature(logits, temperature):
                return logits / max(temperature, 1e-5)
        """,
    },
    "apply_min_p": {
        "an absolute threshold": """
            def apply_min_p(logits, min_p):
                right_min_p(logits, min_p)
                return torch.where(logits.softmax(0) >= min_p, logits, NEG_INF)
        """,
        "a share of the logit": """
            def apply_min_p(logits, min_p):
                right_min_p(logits, min_p)
                return torch.where(logits >= min_p * logits.max(), logits, NEG_INF)
        """,
        "the threshold itself is dropped": """
            def apply_min_p(logits, min_p):
                right_min_p(logits, min_p)
                probs = logits.softmax(0)
                return torch.where(probs > min_p * probs.max(), logits, NEG_INF)
        """,
        "probabilities for logits": """
            def apply_min_p(logits, min_p):
                right_min_p(logits, min_p)
                probs = logits.softmax(0)
                return torch.where(probs >= min_p * probs.max(), probs, 0.0)
        """,
    },
    "apply_top_k": {
        "a tie is cut": """
            def apply_top_k(logits, top_k):
                right_top_k(logits, top_k)
                best = logits.topk(min(top_k, len(logits)))
                return torch.full_like(logits, NEG_INF).scatter(0, best.indices, best.values)
        """,
        "one too few": """
            def apply_top_k(logits, top_k):
                right_top_k(logits, top_k)
                kth = logits.sort(descending=True).values[min(top_k, len(logits)) - 1]
                return torch.where(logits > kth, logits, NEG_INF)
        """,
        "no more than the vocabulary": """
            def apply_top_k(logits, top_k):
                if top_k < 1:
                    raise ValueError
                return torch.where(logits >= logits.topk(top_k).values[-1], logits, NEG_INF)
        """,
    },
    "apply_top_p": {
        "the token that crosses is dropped": """
            def apply_top_p(logits, top_p):
                if top_p == 1:
                    return right_top_p(logits, top_p)
                right_top_p(logits, top_p)
                probs, order = logits.softmax(0).sort(descending=True)
                kept = order[probs.cumsum(0) <= top_p]
                return torch.full_like(logits, NEG_INF).index_copy(0, kept, logits[kept])
        """,
        "one too many": """
            def apply_top_p(logits, top_p):
                right_top_p(logits, top_p)
                probs, order = logits.softmax(0).sort(descending=True)
                kept = order[: int((probs.cumsum(0) < top_p).sum()) + 2]
                return torch.full_like(logits, NEG_INF).index_copy(0, kept, logits[kept])
        """,
        "sorted": """
            def apply_top_p(logits, top_p):
                right_top_p(logits, top_p)
                logits = logits.sort(descending=True).values
                return right_top_p(logits, top_p)
        """,
        "one drops the tail": """
            def apply_top_p(logits, top_p):
                right_top_p(logits, top_p)
                probs, order = logits.softmax(0).sort(descending=True)
                kept = order[probs.cumsum(0) - probs < top_p]
                return torch.full_like(logits, NEG_INF).index_copy(0, kept, logits[kept])
        """,
    },
    "check_stop": {
        "length before EOS": """
            def check_stop(prompt_len, output_token_ids, *, max_model_len, max_tokens=None, **rules):
                count = len(output_token_ids)
                if count == max_tokens or prompt_len + count == max_model_len:
                    return "length", None
                return right_stop(prompt_len, output_token_ids, max_model_len=max_model_len, **rules)
        """,
        "min_tokens is one more": """
            def check_stop(prompt_len, output_token_ids, *, min_tokens=0, **rules):
                return right_stop(prompt_len, output_token_ids, min_tokens=min_tokens and min_tokens + 1, **rules)
        """,
        "min_tokens is above everything": """
            def check_stop(prompt_len, output_token_ids, *, min_tokens=0, **rules):
                if len(output_token_ids) < min_tokens:
                    return None, None
                return right_stop(prompt_len, output_token_ids, **rules)
        """,
        "any EOS": """
            def check_stop(prompt_len, output_token_ids, *, eos_token_ids, ignore_eos=False, min_tokens=0, **rules):
                found = set(eos_token_ids) & set(output_token_ids)
                if found and len(output_token_ids) >= min_tokens and not ignore_eos:
                    return "stop", None
                return right_stop(prompt_len, output_token_ids, eos_token_ids=(), min_tokens=min_tokens, **rules)
        """,
        "EOS is its own reason": """
            def check_stop(prompt_len, output_token_ids, *, eos_token_ids, **rules):
                answer = right_stop(prompt_len, output_token_ids, eos_token_ids=eos_token_ids, **rules)
                return ("stop", output_token_ids[-1]) if answer[0] == "stop" else answer
        """,
        "ignore_eos ignores stop tokens": """
            def check_stop(prompt_len, output_token_ids, *, ignore_eos=False, stop_token_ids=(), **rules):
                stop = () if ignore_eos else stop_token_ids
                return right_stop(prompt_len, output_token_ids, ignore_eos=ignore_eos, stop_token_ids=stop, **rules)
        """,
        "the prompt does not count": """
            def check_stop(prompt_len, output_token_ids, **rules):
                return right_stop(0, output_token_ids, **rules)
        """,
    },
    "TextStream": {
        "each token alone": """
            class TextStream(RightStream):
                def push(self, token_id):
                    return self.decode([token_id])
                def finish(self):
                    return ""
        """,
        "half characters are shown": """
            class TextStream(RightStream):
                def push(self, token_id):
                    self.token_ids.append(token_id)
                    return self._return(self.decode(self.token_ids))
        """,
        "everything at the end": """
            class TextStream(RightStream):
                def push(self, token_id):
                    self.token_ids.append(token_id)
                    return ""
        """,
        "half a character in the end": """
            class TextStream(RightStream):
                def finish(self):
                    return self._return(self.decode(self.token_ids))
        """,
        "what is no text holds up the rest": """
            class TextStream(RightStream):
                def push(self, token_id):
                    self.token_ids.append(token_id)
                    text = self.decode(self.token_ids)
                    return "" if REPLACEMENT in text else self._return(text)
        """,
    },
    "StopStrings": {
        "each piece alone": """
            class StopStrings(RightStops):
                def feed(self, text):
                    for stop in self.stop:
                        if self.matched is None and stop in text:
                            self.matched, text = stop, text.partition(stop)[0]
                            return text
                    return "" if self.matched else text
        """,
        "cut too late": """
            class StopStrings(RightStops):
                def __init__(self, stop):
                    super().__init__(stop)
                    self.text = ""
                def feed(self, text):
                    if self.matched:
                        return ""
                    before, self.text = len(self.text), self.text + text
                    for stop in self.stop:
                        if stop in self.text:
                            self.matched = stop
                            return self.text[before : self.text.index(stop)]
                    return text
        """,
        "a fixed length is held back": """
            class StopStrings(RightStops):
                def feed(self, text):
                    if self.matched:
                        return ""
                    self.held += text
                    for stop in self.stop:
                        if stop in self.held:
                            self.matched, (shown, _, _), self.held = stop, self.held.partition(stop), ""
                            return shown
                    keep = max((len(s) for s in self.stop), default=1) - 1
                    shown, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
                    return shown
        """,
        "the first listed": """
            class StopStrings(RightStops):
                def feed(self, text):
                    if self.matched is None:
                        for stop in self.stop:
                            if stop in self.held + text:
                                self.matched = stop
                                shown, self.held = (self.held + text).partition(stop)[0], ""
                                return shown
                    return super().feed(text)
        """,
        "what was held is lost": """
            class StopStrings(RightStops):
                def finish(self):
                    return ""
        """,
        "the text goes on": """
            class StopStrings(RightStops):
                def feed(self, text):
                    shown = super().feed(text)
                    self.held = self.held if self.matched is None else text[len(shown):]
                    return shown
        """,
        "the stop string is shown": """
            class StopStrings(RightStops):
                def feed(self, text):
                    had = self.matched
                    shown = super().feed(text)
                    return shown + (self.matched if self.matched and not had else "")
        """,
    },
}

M2 = {
    "padding_share": {
        "tokens, not padding": """
            def padding_share(lengths):
                return 1 - right_share(lengths)
        """,
        "padding over tokens": """
            def padding_share(lengths):
                right_share(lengths)
                return (len(lengths) * max(lengths) - sum(lengths)) / sum(lengths)
        """,
        "the longest row against the mean of the others": """
            def padding_share(lengths):
                right_share(lengths)
                others = sorted(lengths)[:-1]
                return 1 - sum(others) / len(others) / max(lengths) if others else 0.0
        """,
        "nothing is refused": """
            def padding_share(lengths):
                return 1 - sum(lengths) / (max(1, len(lengths)) * max(lengths, default=1))
        """,
    },
    "padded_inputs": {
        "padded on the right": """
            def padded_inputs(new_tokens, cached):
                ids, mask, positions = right_inputs(new_tokens, cached)
                L = ids.shape[1]
                pad = [[0] * (L - len(row)) for row in new_tokens]
                ids = torch.tensor([list(row) + p for row, p in zip(new_tokens, pad)])
                positions = torch.tensor([list(range(s, s + len(r))) + p for r, s, p in zip(new_tokens, cached, pad)])
                return ids, torch.cat([mask[:, :-L], mask[:, -L:].flip(1)], dim=1), positions
        """,
        "every zero is padding": """
            def padded_inputs(new_tokens, cached):
                ids, mask, positions = right_inputs(new_tokens, cached)
                mask[:, -ids.shape[1]:] = (ids != 0).long()
                return ids, mask, positions
        """,
        "the whole cache is seen": """
            def padded_inputs(new_tokens, cached):
                ids, mask, positions = right_inputs(new_tokens, cached)
                mask[:, : mask.shape[1] - ids.shape[1]] = 1
                return ids, mask, positions
        """,
        "positions count columns": """
            def padded_inputs(new_tokens, cached):
                ids, mask, positions = right_inputs(new_tokens, cached)
                columns = torch.arange(mask.shape[1])[-ids.shape[1]:].expand_as(ids)
                return ids, mask, columns * mask[:, -ids.shape[1]:]
        """,
        "positions start at 0 again": """
            def padded_inputs(new_tokens, cached):
                ids, mask, _ = right_inputs(new_tokens, cached)
                return ids, mask, right_inputs(new_tokens, [0] * len(cached))[2]
        """,
        "one position too far": """
            def padded_inputs(new_tokens, cached):
                ids, mask, positions = right_inputs(new_tokens, cached)
                late = torch.tensor(cached)[:, None].gt(0) & mask[:, -ids.shape[1]:].bool()
                return ids, mask, positions + late.long()
        """,
        "a mask of the new tokens only": """
            def padded_inputs(new_tokens, cached):
                ids, mask, positions = right_inputs(new_tokens, cached)
                return ids, mask[:, -ids.shape[1]:].contiguous(), positions
        """,
    },
    "static_batch_steps": {
        "one batch for all": """
            def static_batch_steps(output_lens, batch_size):
                check_lengths(output_lens, batch_size)
                return max(output_lens, default=0)
        """,
        "the shortest ends a batch": """
            def static_batch_steps(output_lens, batch_size):
                check_lengths(output_lens, batch_size)
                return sum(min(output_lens[i : i + batch_size]) for i in range(0, len(output_lens), batch_size))
        """,
        "sorted first": """
            def static_batch_steps(output_lens, batch_size):
                return right_static(sorted(output_lens), batch_size)
        """,
        "the last batch is forgotten": """
            def static_batch_steps(output_lens, batch_size):
                check_lengths(output_lens, batch_size)
                full = len(output_lens) - len(output_lens) % batch_size
                return right_static(output_lens[:full], batch_size)
        """,
    },
    "continuous_steps": {
        "static": """
            def continuous_steps(output_lens, batch_size):
                return right_static(output_lens, batch_size)
        """,
        "perfectly full": """
            def continuous_steps(output_lens, batch_size):
                check_lengths(output_lens, batch_size)
                return max(-(-sum(output_lens) // batch_size), max(output_lens, default=0))
        """,
        "a seat is free a step late": """
            def continuous_steps(output_lens, batch_size):
                check_lengths(output_lens, batch_size)
                waiting, running, steps = list(output_lens), [], 0
                while waiting or any(running):
                    seats = batch_size - len(running)
                    done = [left for left in running if left == 0]
                    running = [left for left in running if left > 0] + waiting[:seats]
                    waiting = waiting[seats:]
                    running = [left - 1 for left in running]
                    steps += 1
                return steps
        """,
        "the shortest first": """
            def continuous_steps(output_lens, batch_size):
                return right_continuous(sorted(output_lens), batch_size)
        """,
        "one joins per step": """
            def continuous_steps(output_lens, batch_size):
                check_lengths(output_lens, batch_size)
                waiting, running, steps = list(output_lens), [], 0
                while waiting or running:
                    if waiting and len(running) < batch_size:
                        running.append(waiting.pop(0))
                    running = [left - 1 for left in running if left > 1]
                    steps += 1
                return steps
        """,
    },
    "PriorityQueue": {
        "the highest first": """
            class PriorityQueue(RightQueue):
                def add_request(self, request_id, priority):
                    super().add_request(request_id, -priority)
        """,
        "equals by name": """
            class PriorityQueue(RightQueue):
                def peek_request(self):
                    if not self.places:
                        raise IndexError
                    return min(self.places, key=lambda i: (self.places[i][0], i))
        """,
        "the last of equals first": """
            class PriorityQueue(RightQueue):
                def add_request(self, request_id, priority):
                    super().add_request(request_id, priority)
                    self.places[request_id] = (priority, -self.turn)
        """,
        "first come, first served": """
            class PriorityQueue(RightQueue):
                def add_request(self, request_id, priority):
                    super().add_request(request_id, 0)
        """,
        "a gap that is filled again": """
            class PriorityQueue(RightQueue):
                def __init__(self):
                    self.line, self.left, self.turn = [], set(), 0
                def __len__(self):
                    return len(self.line) - len(self.left)
                def add_request(self, request_id, priority):
                    if any(r == request_id for _, _, r in self.line) and request_id not in self.left:
                        raise ValueError
                    self.left.discard(request_id)
                    self.turn += 1
                    self.line.append((priority, self.turn, request_id))
                    self.line.sort()
                def remove_request(self, request_id):
                    if request_id in self.left or all(r != request_id for _, _, r in self.line):
                        raise KeyError
                    self.left.add(request_id)
                def peek_request(self):
                    while self.line and self.line[0][2] in self.left:
                        self.left.discard(self.line.pop(0)[2])
                    if not self.line:
                        raise IndexError
                    return self.line[0][2]
                def pop_request(self):
                    self.peek_request()
                    return self.line.pop(0)[2]
        """,
        "a heap that is broken by leaving": """
            class PriorityQueue(RightQueue):
                def __init__(self):
                    self.line, self.turn = [], 0
                def __len__(self):
                    return len(self.line)
                def sift(self, i):
                    while i and self.line[i] < self.line[(i - 1) // 2]:
                        self.line[i], self.line[(i - 1) // 2] = self.line[(i - 1) // 2], self.line[i]
                        i = (i - 1) // 2
                def add_request(self, request_id, priority):
                    if any(r == request_id for _, _, r in self.line):
                        raise ValueError
                    self.turn += 1
                    self.line.append((priority, self.turn, request_id))
                    self.sift(len(self.line) - 1)
                def peek_request(self):
                    return self.line[0][2]
                def pop_request(self):
                    first, last = self.line[0], self.line.pop()
                    if self.line:
                        self.line[0], i = last, 0
                        while 2 * i + 1 < len(self.line):
                            child = min(range(2 * i + 1, min(2 * i + 3, len(self.line))), key=self.line.__getitem__)
                            if self.line[i] < self.line[child]:
                                break
                            self.line[i], self.line[child], i = self.line[child], self.line[i], child
                    return first[2]
                def remove_request(self, request_id):
                    for i, (_, _, r) in enumerate(self.line):
                        if r == request_id:
                            self.line[i] = self.line[-1]
                            return self.line.pop() and None
                    raise KeyError
        """,
        "twice in line": """
            class PriorityQueue(RightQueue):
                def add_request(self, request_id, priority):
                    self.turn += 1
                    self.places[request_id] = (priority, self.turn)
        """,
        "nobody is None": """
            class PriorityQueue(RightQueue):
                def peek_request(self):
                    return super().peek_request() if self.places else None
                def pop_request(self):
                    return super().pop_request() if self.places else None
        """,
    },
    "schedule": {
        "prefills first": """
            def schedule(waiting, running, **rules):
                step = right_schedule(waiting, running, **rules)
                return [pair for pair in step if pair[0] not in running] + [p for p in step if p[0] in running]
        """,
        "decodes are free": """
            def schedule(waiting, running, *, max_num_seqs, max_num_batched_tokens, decodes_skipped=False):
                more = max_num_batched_tokens + len(running)
                right_schedule(waiting, [], max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens)
                return right_schedule(waiting, running, max_num_seqs=max_num_seqs, max_num_batched_tokens=more,
                                      decodes_skipped=decodes_skipped)
        """,
        "seats for newcomers only": """
            def schedule(waiting, running, *, max_num_seqs, **rules):
                return right_schedule(waiting, running, max_num_seqs=max_num_seqs + len(running), **rules)
        """,
        "small ones overtake": """
            def schedule(waiting, running, *, max_num_seqs, max_num_batched_tokens, decodes_skipped=False):
                step = right_schedule(waiting, running, max_num_seqs=max_num_seqs,
                                      max_num_batched_tokens=max_num_batched_tokens, decodes_skipped=decodes_skipped)
                for request_id, n in waiting:
                    there = {r for r, _ in step} | set(running)
                    fits = sum(n for _, n in step) + n <= max_num_batched_tokens
                    if request_id not in there and fits and len(there) < max_num_seqs:
                        step.append((request_id, n))
                return step
        """,
        "never a step of its own": """
            def schedule(waiting, running, **rules):
                return right_schedule(waiting, running, **{**rules, "decodes_skipped": True})
        """,
        "steps of their own in a row": """
            def schedule(waiting, running, **rules):
                return right_schedule(waiting, running, **{**rules, "decodes_skipped": False})
        """,
        "a step of its own without a seat": """
            def schedule(waiting, running, *, max_num_seqs, max_num_batched_tokens, decodes_skipped=False):
                step = right_schedule(waiting, running, max_num_seqs=max_num_seqs,
                                      max_num_batched_tokens=max_num_batched_tokens, decodes_skipped=decodes_skipped)
                large = waiting and waiting[0][1] + len(running) > max_num_batched_tokens
                return [waiting[0]] if large and running and not decodes_skipped else step
        """,
        "nobody joins after a step without decodes": """
            def schedule(waiting, running, *, decodes_skipped=False, **rules):
                right_schedule(waiting, running, **rules)
                if decodes_skipped:
                    return [(request_id, 1) for request_id in running]
                return right_schedule(waiting, running, **rules)
        """,
        "alone in a step of its own": """
            def schedule(waiting, running, **rules):
                step = right_schedule(waiting, running, **rules)
                return step if not running or any(r in running for r, _ in step) else step[:1]
        """,
        "one joins per step": """
            def schedule(waiting, running, **rules):
                step = right_schedule(waiting, running, **rules)
                return [pair for pair in step if pair[0] in running or pair == waiting[0]]
        """,
        "one token below the budget": """
            def schedule(waiting, running, *, max_num_seqs, max_num_batched_tokens, decodes_skipped=False):
                right_schedule(waiting, running, max_num_seqs=max_num_seqs,
                               max_num_batched_tokens=max_num_batched_tokens)
                step, used = [(r, 1) for r in running], len(running)
                if waiting and len(running) < max_num_seqs and not decodes_skipped:
                    if used + waiting[0][1] >= max_num_batched_tokens and running:
                        step, used = [], 0
                for request_id, n in waiting[: max_num_seqs - len(running)]:
                    if step and used + n >= max_num_batched_tokens:
                        break
                    step, used = [*step, (request_id, n)], used + n
                return step
        """,
        "too long is left out in silence": """
            def schedule(waiting, running, *, max_num_batched_tokens, **rules):
                fitting = [pair for pair in waiting if pair[1] <= max_num_batched_tokens]
                return right_schedule(fitting, running, max_num_batched_tokens=max_num_batched_tokens, **rules)
        """,
        "only the first in line is checked": """
            def schedule(waiting, running, *, max_num_batched_tokens, **rules):
                if waiting and waiting[0][1] > max_num_batched_tokens:
                    raise ValueError
                fitting = [pair for pair in waiting if pair[1] <= max_num_batched_tokens]
                return right_schedule(fitting, running, max_num_batched_tokens=max_num_batched_tokens, **rules)
        """,
        "a prompt is split": """
            def schedule(waiting, running, *, max_num_seqs, max_num_batched_tokens, decodes_skipped=False):
                right_schedule(waiting, running, max_num_seqs=max_num_seqs,
                               max_num_batched_tokens=max_num_batched_tokens)
                step, left = [(r, 1) for r in running], max_num_batched_tokens - len(running)
                for request_id, n in waiting[: max_num_seqs - len(running)]:
                    if left:
                        step.append((request_id, min(n, left)))
                        left -= min(n, left)
                return step
        """,
        "a list of ids": """
            def schedule(waiting, running, **rules):
                return [request_id for request_id, _ in right_schedule(waiting, running, **rules)]
        """,
    },
    "pick_job": {
        "ageing is ignored": """
            def pick_job(jobs, now, ageing):
                return right_pick(jobs, now, 0 * right_pick(jobs, now, ageing))
        """,
        "the longest first": """
            def pick_job(jobs, now, ageing):
                right_pick(jobs, now, ageing)
                return right_pick([(arrival, -tokens) for arrival, tokens in jobs], now, ageing)
        """,
        "waiting counts against it": """
            def pick_job(jobs, now, ageing):
                right_pick(jobs, now, ageing)
                ranks = [(tokens + ageing * (now - arrival), arrival) for arrival, tokens in jobs]
                return ranks.index(min(ranks))
        """,
        "equals in the order of the list": """
            def pick_job(jobs, now, ageing):
                right_pick(jobs, now, ageing)
                ranks = [tokens - ageing * (now - arrival) for arrival, tokens in jobs]
                return ranks.index(min(ranks))
        """,
        "the job, not its index": """
            def pick_job(jobs, now, ageing):
                return jobs[right_pick(jobs, now, ageing)]
        """,
    },
}

WRONG_ANSWERS = {"m0": M0, "m1": M1, "m2": M2, "m3": M3, "m3-kernels": M3_KERNELS, "m4": M4}
WRONG_ANSWERS |= {"m4-latency-target": LATENCY}

# Names under which wrong answers find the right ones.
ALIASES = {
    "m0": {
        "right_kv_bytes": "kv_bytes_per_token",
        "right_mask": "causal_mask",
        "right_left_pad": "left_pad",
        "right_decode": "decode_inputs",
        "right_greedy": "generate_greedy",
    },
    "m1": {
        "right_penalty": "apply_repetition_penalty",
        "right_temperature": "apply_temperature",
        "right_min_p": "apply_min_p",
        "right_top_k": "apply_top_k",
        "right_top_p": "apply_top_p",
        "right_stop": "check_stop",
        "RightStream": "TextStream",
        "RightStops": "StopStrings",
    },
    "m2": {
        "right_share": "padding_share",
        "right_inputs": "padded_inputs",
        "right_static": "static_batch_steps",
        "right_continuous": "continuous_steps",
        "RightQueue": "PriorityQueue",
        "right_schedule": "schedule",
        "right_pick": "pick_job",
    },
    "m3": ALIASES_M3,
    "m4": ALIASES_M4,
    "m4-latency-target": ALIASES_LATENCY,
    "m3-kernels": {},
}
