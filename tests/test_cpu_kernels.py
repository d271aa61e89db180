"""vLLM's C++ kernels say what torch says, and are what a decoder on a CPU runs."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed (pip install garserve[cpu] or garserve[gpu])")
pytestmark = pytest.mark.vllm

EPSILON = 1e-5


@pytest.fixture(scope="module", autouse=True)
def on_a_cpu() -> None:
    import vllm._custom_ops  # noqa: F401  loads the kernels
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        pytest.skip("vLLM's kernels for a CPU are in its CPU build only")


def _truth(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = x.double()
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPSILON) * weight.double()


@pytest.mark.parametrize("shape", [(1, 192), (7, 2048)], ids=str)
def test_norm_is_as_near_to_the_truth_as_torch(shape: tuple[int, int]) -> None:
    from vllm import ir

    from garserve.vllm_plugin.cpu_kernels import rms_norm

    generator = torch.Generator().manual_seed(0)
    x, residual, weight = (torch.randn(*size, generator=generator) for size in (shape, shape, shape[1:]))
    norm: Any = SimpleNamespace(weight=SimpleNamespace(data=weight), variance_epsilon=EPSILON)
    plain, truth = ir.ops.rms_norm.impls["native"].impl_fn(x, weight, EPSILON), _truth(x, weight)
    limit = 1.5 * (plain.double() - truth).abs().max() + torch.finfo(x.dtype).eps
    assert (rms_norm(norm, x).double() - truth).abs().max() <= limit
    both = x + residual
    normed, kept = rms_norm(norm, x.clone(), residual.clone())
    assert torch.equal(kept, both)
    assert (normed.double() - _truth(both, weight)).abs().max() <= 2 * limit


def test_activation() -> None:
    from garserve.vllm_plugin.cpu_kernels import silu_and_mul

    x = 3 * torch.randn(5, 2 * 96, generator=torch.Generator().manual_seed(0))
    truth = torch.nn.functional.silu(x[:, :96].double()) * x[:, 96:].double()
    assert torch.allclose(silu_and_mul(x).double(), truth, rtol=1e-6, atol=1e-6)


def test_in_bfloat16_torch_computes() -> None:
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.layernorm import RMSNorm

    from garserve.vllm_plugin.cpu_kernels import rms_norm, silu_and_mul

    with set_current_vllm_config(VllmConfig()):
        norm = RMSNorm(64, eps=EPSILON, dtype=torch.bfloat16)
    x, residual = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    normed, kept = rms_norm(norm, x.clone(), residual.clone())
    assert torch.equal(kept, x + residual)
    assert torch.equal(normed, norm.forward_native(x.clone(), residual.clone())[0])
    assert torch.equal(silu_and_mul(x), torch.nn.functional.silu(x[:, :32]) * x[:, 32:])


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "compiled"])
def test_a_decoder_runs_them_unless_it_is_compiled(eager: bool) -> None:
    from vllm.config import CompilationMode, VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.activation import SiluAndMul
    from vllm.model_executor.layers.layernorm import RMSNorm

    from garserve.vllm_plugin.cpu_kernels import silu_and_mul, use_cpu_kernels

    config = VllmConfig()
    with set_current_vllm_config(config):
        decoder = torch.nn.Sequential(RMSNorm(8), SiluAndMul())
    before = decoder[0]._forward_method, decoder[1]._forward_method
    mode = CompilationMode.NONE if eager else CompilationMode.VLLM_COMPILE
    use_cpu_kernels(decoder, SimpleNamespace(compilation_config=SimpleNamespace(mode=mode)))
    assert (decoder[1]._forward_method is silu_and_mul) == eager
    assert (decoder[0]._forward_method != before[0]) == eager
