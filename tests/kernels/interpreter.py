"""Makes Triton 3.6's interpreter work with numpy 2.4, which no longer turns one-element arrays into loop bounds.

And fp8 is as GPUs have it: the interpreter's own rounding to it loses a carry into the exponent, and NaN; the way back
makes a number of NaN.
"""

from typing import Any

import torch

from miinb.kernels.dispatch import INTERPRETED

if INTERPRETED:
    import triton.language as tl
    import triton.runtime.interpreter as interpreter

    patch_lang_tensor = interpreter._patch_lang_tensor
    convert_float = interpreter._convert_float

    def _patch_lang_tensor(tensor: type, scope: Any) -> None:
        patch_lang_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def _convert_float(numbers: Any, source: Any, target: Any, rounding: Any) -> Any:
        if (source, target) == (tl.float32, tl.float8e4nv):
            return torch.from_numpy(numbers).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        if (source, target) == (tl.float8e4nv, tl.float32):
            return torch.from_numpy(numbers).view(torch.float8_e4m3fn).float().view(torch.uint32).numpy()
        return convert_float(numbers, source, target, rounding)

    interpreter._patch_lang_tensor = _patch_lang_tensor
    interpreter._convert_float = _convert_float
