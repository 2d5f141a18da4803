"""From logits to token ids."""

from folovllm.sampling.sampler import Sampler, SamplerOutput, SamplingState

__all__ = ["Sampler", "SamplerOutput", "SamplingState"]
