"""The operations of the policy: one folder per op, a plain torch reference beside each fast path.

Knows tensors and nothing else: it imports nothing from outside this folder. transformers imports a package of the name
`kernels`, Hugging Face's; where the working directory is on `sys.path` and is this repository, that name finds this
folder. It then steps aside for the installed package, so that `import transformers` works there too.
"""

if __name__ == "kernels":
    import importlib.util
    import os
    import sys
    from importlib.machinery import PathFinder

    _here = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
    _spec = PathFinder.find_spec(__name__, [entry for entry in sys.path if os.path.realpath(entry) != _here])
    if _spec is not None and _spec.loader is not None:
        # The import system returns whatever stands in sys.modules once this file has run.
        sys.modules[__name__] = importlib.util.module_from_spec(_spec)
        _spec.loader.exec_module(sys.modules[__name__])
