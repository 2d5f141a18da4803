"""Random weights from a config alone (`load_format="dummy"`), in the spirit of vLLM's `DummyModelLoader`.

Speed and memory do not depend on the values of the weights, so a model of any published shape can be measured without
a download. Its tokens are noise, but must be usable in tests: finite, and not one token repeated.

**The scale.** Every matrix is N(0, 1/n), n its last dimension: the fan-in of a linear layer, the width of an
embedding. After an RMSNorm a linear layer then gives values of size 1, and logits have a standard deviation of 1, for
any depth and width. The MLP's last matrix is four times larger. Otherwise two effects would repeat one token for ever:

* With tied weights a token's own logit grows with the share of its embedding in the residual stream. At Hugging
  Face's `initializer_range` of 0.02 the layers add next to nothing, so the input token wins. Here the embedding has
  length 1 and each MLP adds a vector of length about 2.4 √n: the own logit leads by less than one standard deviation.
* With random queries and keys attention is close to a plain average, which changes little from one token to the next.
  The MLP depends most on the current token, so it must outweigh attention.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import transformers
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, PretrainedConfig

_MLP_OUTPUT_GAIN = 4.0


def build_dummy_model(
    config: PretrainedConfig, dtype: torch.dtype, device: torch.device, seed: int, attn_implementation: str | None
) -> transformers.PreTrainedModel:
    """A model of `config` with the weights of `fill_dummy_`, allocated once, in `dtype` on `device`.

    It is not built on the meta device, so that buffers which no checkpoint holds (RoPE's inverse frequencies) get their
    values. Only the random fills of the constructors are skipped. The global random state is neither read nor changed.
    """
    with device, _SkipRandomFills():
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attn_implementation, trust_remote_code=False
        )
    for name, parameter in model.named_parameters():
        fill_dummy_(name, parameter.data, seed)
    return model


def fill_dummy_(name: str, tensor: torch.Tensor, seed: int) -> None:
    """Fill the parameter `name` in place: the same values for the same name, shape, dtype, seed and device.

    Each tensor has its own generator, so the values do not depend on the order of filling. Biases become 0; other
    vectors (norm weights) keep the value of their constructor, for which the norm only normalises.
    """
    if tensor.ndim >= 2:
        generator = torch.Generator(tensor.device).manual_seed(zlib.crc32(name.encode(), seed & 0xFFFFFFFF))
        gain = _MLP_OUTPUT_GAIN if "down_proj" in name else 1.0
        tensor.normal_(0.0, gain / math.sqrt(tensor.shape[-1]), generator=generator)
    elif name.endswith("bias"):
        tensor.zero_()


class _SkipRandomFills(TorchFunctionMode):
    """Makes `tensor.normal_()` and similar fills skip a matrix and zero a vector.

    They make an ordinary constructor slow: 600 million values would be filled twice. Untouched pages take no memory.
    """

    # By name: the same fill is called as `Tensor.normal_`, `nn.init.normal_` or transformers' own wrapper.
    _FILLS = frozenset(
        {"normal_", "uniform_", "trunc_normal_", "random_", "exponential_", "log_normal_", "orthogonal_", "erfinv_"}
        | {"kaiming_normal_", "kaiming_uniform_", "xavier_normal_", "xavier_uniform_"}
    )

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if getattr(func, "__name__", "") in self._FILLS:
            tensor: torch.Tensor = args[0] if args else (kwargs or {})["tensor"]
            if tensor.ndim < 2:
                tensor.data.zero_()
            return tensor
        return func(*args, **(kwargs or {}))
