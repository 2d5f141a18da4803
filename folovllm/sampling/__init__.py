"""From logits to token ids."""

from folovllm.sampling.batch import SamplingBatch, SamplingState
from folovllm.sampling.sampler import Sampler, SamplerOutput

__all__ = ["Sampler", "SamplerOutput", "SamplingBatch", "SamplingState"]
