"""From logits to token ids."""

from folovllm.sampling.sampler import Logprob, Sampler, SamplerOutput, SamplingState

__all__ = ["Logprob", "Sampler", "SamplerOutput", "SamplingState"]
