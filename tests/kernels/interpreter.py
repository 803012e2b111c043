"""Makes Triton 3.6's interpreter work with numpy 2.4, which no longer turns one-element arrays into loop bounds."""

from typing import Any

from miinb.kernels.dispatch import INTERPRETED

if INTERPRETED:
    import triton.runtime.interpreter as interpreter

    patch_lang_tensor = interpreter._patch_lang_tensor

    def _patch_lang_tensor(tensor: type, scope: Any) -> None:
        patch_lang_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = _patch_lang_tensor
