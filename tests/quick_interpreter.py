"""Triton's interpreter, with what it makes again and again made once: its patches of `triton.language`, types and shapes.

On tiles as small as those of the tests that is more than half of its time. Kernels compute what they compute without it.
"""

from __future__ import annotations

from typing import Any


def install() -> None:
    """For all kernels that this process interprets. Interpreters before Triton 3.6 are built otherwise, and stay as they are."""
    from triton.language import core, semantic
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_LangPatchScope"):
        return
    patch, numpy_of = interpreter._patch_lang, interpreter._get_np_dtype
    block, tensor = core.block_type.__init__, core.tensor.__init__
    broadcast = semantic.TritonSemantic.broadcast_impl_value
    patched: set[Any] = set()
    blocks: dict[Any, tuple[Any, int, str]] = {}
    shapes: dict[str, tuple[Any, Any]] = {}
    dtypes: dict[str, Any] = {}

    def patch_once(function: Any) -> Any:
        """The patches stay behind a launch. Triton makes them also at each call of a function inside a kernel."""
        if function not in patched:
            patch(function)
            patched.add(function)
        return interpreter._LangPatchScope()

    def block_of(self: Any, element_ty: Any, shape: Any) -> None:
        key = element_ty.name, *(size.value if isinstance(size, core.constexpr) else size for size in shape)
        if key not in blocks:
            block(self, element_ty, shape)
            blocks[key] = self.shape, self.numel, self.name
        self.element_ty = element_ty
        self.shape, self.numel, self.name = blocks[key]

    def tensor_of(self: Any, handle: Any, type: Any) -> None:
        if type.name not in shapes:
            tensor(self, handle, type)
            shapes[type.name] = self.shape, self.numel
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = shapes[type.name]

    def numpy_once(dtype: Any) -> Any:
        if dtype.name not in dtypes:
            dtypes[dtype.name] = numpy_of(dtype)
        return dtypes[dtype.name]

    def broadcast_where_shapes_differ(self: Any, lhs: Any, rhs: Any) -> Any:
        left, right = getattr(lhs.type, "shape", None), getattr(rhs.type, "shape", None)
        same = left is right if left is None or right is None else left.values == right.values
        return (lhs, rhs) if same else broadcast(self, lhs, rhs)

    interpreter._patch_lang, interpreter._get_np_dtype = patch_once, numpy_once
    core.block_type.__init__, core.tensor.__init__ = block_of, tensor_of
    semantic.TritonSemantic.broadcast_impl_value = broadcast_where_shapes_differ
