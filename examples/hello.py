"""Ten lines: the bundled model answers a question."""

from folovllm import LLM, SamplingParams

llm = LLM("folo-tiny")
params = SamplingParams(temperature=0, max_tokens=256)
messages = [{"role": "user", "content": "What is a KV cache?"}]

for output in llm.chat(messages, params):
    print(output.outputs[0].text)
