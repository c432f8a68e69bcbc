"""What the policy computes: the token layout, the ZAYA network over it, its checkpoints, and its conversion to block
diffusion.

Knows tensors, tokens and files. Does not know requests, sampling, Ray or sockets.

| file | holds |
|---|---|
| `layout` | `TokenLayout`: what one forward pass runs |
| `visibility` | `Visibility`: the layout's rule, worked out once for every backend |
| `policy`, `cca`, `experts`, `linear` | the network |
| `plan`, `paged` | plans of a layout: for torch, and for kernels on pages |
| `rotary` | rotary embeddings and activations |
| `state` | what a plan needs of a cache |
| `backends` | the ways to run the network; one is chosen when a policy is placed |
| `scoring`, `vocabulary`, `packing` | log-probabilities of given tokens; bounds on logits; packs of bounded size |
| `checkpoint` | a policy's directory, read and written |
| `config`, `tensor_files`, `tokenizer_files` | its parts: config.json, tensors, the tokenizer, checked before they are used |
| `weights`, `tokenizer` | tensors from elsewhere; a tokenizer for policies trained here |
| `arguments` | checks of what callers of the library give |
| `shipped`, `tasks` | policies that come along; texts with verifiers |
| `conversion` | training |
"""
