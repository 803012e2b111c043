"""The compiled library of the operators on a CPU, loaded with ctypes."""

from __future__ import annotations

import ctypes
import functools

from miinb.kernels import cpu_build

_P, _I, _F, _C = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
_ARGUMENTS = {
    "miinb_linear": [_P] * 6 + [_I] * 3 + [_C] * 3,
    "miinb_norm": [_P] * 6 + [_I] * 2 + [_F, _C, _C],
    "miinb_rope_append": [_P] * 10 + [_I] * 5 + [_F, _C, _C],
    "miinb_argmax": [_P] * 3 + [_I] * 2 + [_C],
    "miinb_attention": [_P] * 6 + [_I] * 7 + [_F, _F, _P, _C],
    "miinb_blocked_linear": [_P] * 5 + [_I] * 3 + [_C, _C],
    "miinb_bf16": [],
    "miinb_packed_attention": [_P] * 3 + [_I] * 4 + [_F, _C, _C],
}


@functools.cache
def load_library() -> ctypes.CDLL:
    """The compiled library, with its functions' arguments declared.

    Raises:
        cpu_build.Unavailable: it cannot be made on this machine.
    """
    try:
        library = ctypes.CDLL(str(cpu_build.build()))
    except OSError as error:
        raise cpu_build.Unavailable(f"the compiled library does not load ({error})") from error
    for name, arguments in _ARGUMENTS.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, None
    library.miinb_bf16.restype = _C
    return library
