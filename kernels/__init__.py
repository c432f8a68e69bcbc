"""The operations of the policy: one folder per op, a plain torch reference beside each fast path.

Knows tensors and nothing else: it imports nothing from outside this folder (transformers probes a package named
`kernels` when the working directory is on `sys.path`, so importing it must be cheap and safe).
"""
