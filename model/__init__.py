"""What the policy computes: the token layout, the ZAYA network over it, its checkpoints, and its conversion to block
diffusion.

Knows tensors, tokens and files. Does not know requests, sampling, Ray or sockets.

`layout` says what a forward pass runs, `policy` is the network over it, of `cca`, `experts` and `linear`; `state` is
what it asks of a cache, `paged` what a layout asks of kernels on the cache's pages. `packed` is the same network for
small policies on a CPU. `scoring` gives log-probabilities of given tokens, `vocabulary` bounds the logits that exist at
once. `weights` checks tensors from elsewhere, `checkpoint` and `tokenizer` are files, `shipped` policies that come
along, `tasks` texts with verifiers, `conversion` training.
"""
