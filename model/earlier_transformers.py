"""ZAYA's configuration for a transformers that does not know the architecture (5.5 to 5.16).

A test compares it with transformers' own class: fields, defaults and what is derived of them.
"""

# Without postponed annotations: `strict` reads the types of the fields when the class is made.
from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

_ROPE_THETA = {"hybrid": 5_000_000.0, "hybrid_sliding": 10_000.0}
"""Base of the rotary frequencies of each kind of layer."""


@strict
class ZayaConfig(PreTrainedConfig):
    """The fields of `transformers.ZayaConfig`, with the defaults of ZAYA1-8B."""

    model_type = "zaya"

    vocab_size: int = 262272
    hidden_size: int = 2048
    num_hidden_layers: int = 40
    num_attention_heads: int = 8
    num_key_value_heads: int = 2
    hidden_act: str = "silu"
    max_position_embeddings: int = 131072
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5
    use_cache: bool = True
    tie_word_embeddings: bool = True
    rope_parameters: dict | None = None
    sliding_window: int | None = None
    attention_dropout: float | int = 0.0
    moe_intermediate_size: int = 2048
    num_experts_per_tok: int = 1
    num_experts: int = 16
    output_router_logits: bool = False
    layer_types: list[str] | None = None
    pad_token_id: int | None = 0
    bos_token_id: int | None = 2
    eos_token_id: int | list[int] | None = 106
    head_dim: int = 128
    attention_bias: bool = False
    lm_head_bias: bool = False
    router_hidden_size: int = 256
    cca_time0: int = 2
    cca_time1: int = 2

    def __post_init__(self, **kwargs):
        self.layer_types = ["hybrid"] * self.num_hidden_layers if self.layer_types is None else list(self.layer_types)
        if self.rope_parameters is None:
            self.rope_parameters = {
                kind: {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": 0.5}
                for kind, theta in _ROPE_THETA.items()
            }
        super().__post_init__(**kwargs, ignore_keys_at_rope_validation=set(_ROPE_THETA))

    def convert_rope_params_to_dict(self, **kwargs):
        """Files on the Hugging Face Hub hold a kind beside the sections; the sections have their own."""
        (self.rope_parameters or {}).pop("rope_type", None)
        return kwargs

    def validate_rope(self):
        """Adds the kind to the sections that lack it. `read_config` checks the rest. transformers' own method would take a
        section without layers for parameters."""
        for section in (self.rope_parameters or {}).values():
            if isinstance(section, dict):
                section.setdefault("rope_type", "default")
