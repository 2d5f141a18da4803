"""Wrong answers that learners give, per milestone and exercise: a name, and code that replaces the reference answer.

They run in the namespace of `solution.py`. The grader has to catch each of them.
"""

from __future__ import annotations

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

WRONG_ANSWERS = {"m0": M0, "m1": M1}

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
}
