"""Every kernel compiles for the GPUs it is meant for, on a machine without one.

The wrappers run on CPU tensors with Triton's launch replaced by its compiler, so what is compiled is what they launch.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.runtime.jit import JITFunction, mangle_type  # noqa: E402

from miinb.kernels import activation, attention, dispatch, head, linear, norm, rope, sample  # noqa: E402

OPERATORS = (activation, attention, head, linear, norm, rope, sample)


def t(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def ids(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def packed(n: int, k: int, bias: bool) -> linear.PackedLinear:
    return linear.PackedLinear(t(n, k), t(n) if bias else None)


def rope_call(heads: int, kv_heads: int, size: int, **options: Any) -> Callable[[], Any]:
    cache, table = t(4, 16, kv_heads, size), t(64, size // 2, dtype=torch.float32)
    tables = (None, None) if options.pop("plain", False) else (table, table)
    options = {"rotary_dim": size} | options | {"heads": heads, "kv_heads": kv_heads, "head_size": size}
    tokens = ids(1, dtype=torch.int64)
    return lambda: rope.rope_append(
        t(1, (heads + 2 * kv_heads) * size), tokens, *tables, cache, cache, tokens, **options
    )


def attention_call(heads: int, kv_heads: int, size: int, max_query: int, **options: Any) -> Callable[[], Any]:
    q, cache = t(max_query, heads, size), t(4, 16, kv_heads, size)
    return lambda: attention.paged_attention(
        q, cache, cache, ids(1, 4), ids(2), ids(1), scale=0.1, max_query=max_query, **options
    )


CALLS: dict[str, Callable[[], Any]] = {
    "rms_norm": lambda: norm.rms_norm(t(1, 4096), t(4096), 1e-5, t(1, 4096)),
    "layer_norm": lambda: norm.layer_norm(t(1, 768), t(768), t(768), 1e-5, t(1, 768)),
    "gemv": lambda: linear.linear(t(1, 4096), packed(4096, 4096, False), residual=t(1, 4096)),
    "gemv bias": lambda: linear.linear(t(1, 768), packed(3072, 768, True), activation="gelu_tanh"),
    "gemv gated": lambda: linear.gated_linear(t(1, 4096), packed(2 * 14336, 4096, False), "silu"),
    "gated": lambda: linear.gated_linear(t(3, 64), packed(2 * 2048, 64, False), "silu"),
    "rope": rope_call(32, 8, 128),
    "rope norm": rope_call(16, 8, 128, q_norm=t(128), k_norm=t(128)),
    "rope interleaved": rope_call(16, 16, 256, interleaved=True, rotary_dim=64),
    "append": rope_call(12, 12, 64, plain=True),
    "decode": attention_call(32, 8, 128, 1),
    "decode window": attention_call(9, 3, 80, 1, window=100),
    "decode alibi": attention_call(16, 16, 64, 1, alibi=t(16, dtype=torch.float32)),
    "decode wide": attention_call(16, 16, 256, 1),
    "prefill": attention_call(32, 8, 128, 200),
    "prefill alibi": attention_call(16, 16, 64, 200, alibi=t(16, dtype=torch.float32)),
    "prefill softcap": attention_call(8, 4, 256, 200, softcap=50.0, window=4096),
    "sample": lambda: sample.sample(
        t(1, 128256),
        *(ids(1, dtype=torch.int64),) * 2,
        t(1, dtype=torch.float32),
        ids(1),
        *(t(1, dtype=torch.float32),) * 2,
    ),
    "argmax": lambda: head.argmax(t(1, 128256)),
}


def compile_instead(function: Any, args: tuple[Any, ...], given: dict[str, Any], target: GPUTarget) -> Any:
    """Compile a kernel for the arguments of a launch."""
    options = {name: given[name] for name in ("num_warps", "num_stages", "launch_pdl") if name in given}
    values = dict(zip(function.arg_names, args, strict=False)) | {k: v for k, v in given.items() if k not in options}
    signature, constants, attributes = {}, {}, {}
    for place, parameter in enumerate(function.params):
        value = values[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name], constants[(place,)] = "constexpr", value
            continue
        signature[parameter.name] = mangle_type(value)
        if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(function, signature, constants, attributes)
    return triton.compile(source, target=target, options=options)


@pytest.mark.parametrize(
    ("name", "capability"), [*((name, 90) for name in CALLS), ("gemv gated", 80), ("decode", 80), ("argmax", 80)]
)
def test_compiles(name: str, capability: int, monkeypatch: pytest.MonkeyPatch) -> None:
    target, compiled = GPUTarget("cuda", capability, 32), []
    pdl = {"PDL": True, "launch_pdl": True} if capability >= 90 else {"PDL": False}
    for module in OPERATORS:
        monkeypatch.setattr(module, "use_triton", lambda x: True)
        monkeypatch.setattr(module, "launch_options", lambda x: pdl)

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **given: Any) -> None:
        compiled.append(compile_instead(self, args, given, target))

    monkeypatch.setattr(JITFunction, "run", run)
    CALLS[name]()
    assert compiled
    for kernel in compiled:
        assert kernel.asm["cubin"]
        assert kernel.metadata.shared <= 160 * 1024  # of the 163 KiB that a program may have on sm_80


def test_weights_are_read_16_bytes_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    monkeypatch.setattr(linear, "use_triton", lambda x: True)
    monkeypatch.setattr(
        JITFunction,
        "run",
        lambda self, *args, grid, warmup, **given: compiled.append(
            compile_instead(self, args, given, GPUTarget("cuda", 90, 32))
        ),
    )
    CALLS["gemv"]()
    assert "ld.global.v4.b32" in compiled[0].asm["ptx"]
    assert dispatch.INTERPRETED is False
