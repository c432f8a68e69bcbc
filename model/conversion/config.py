"""What a conversion run is: a policy to start from, data, and a list of stages.

Invariants: sections are frozen and strict (`settings.Config`); every quantity carries its unit in its description.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from ...settings import Config


class Architecture(Config):
    """Dimensions of a ZAYA policy trained from nothing."""

    vocab_size: int = Field(320, ge=260, description="most tokens of the tokenizer")
    hidden_size: int = Field(192, ge=8)
    layers: int = Field(6, ge=1)
    heads: int = Field(6, ge=1)
    kv_heads: int = Field(2, ge=1)
    head_dim: int = Field(32, ge=4)
    experts: int = Field(4, ge=1)
    expert_size: int = Field(320, ge=8, description="inner width of an expert")
    router_size: int = Field(48, ge=4)
    max_position_embeddings: int = Field(512, ge=16, description="longest sequence, tokens")
    rope_theta: float = Field(10_000.0, gt=0)


class Data(Config):
    """Documents: reasoning-gym tasks of the training split, written as question, steps, answer."""

    families: tuple[str, ...] = Field((), description="families to draw from; empty for all")
    seed: int = Field(0, ge=0)
    pool: int = Field(2048, ge=1, description="documents sorted by length together, so that packs hold little padding")


class DraftLoss(Config):
    """Loss of the mask rows: ce * CE(target) + tv * TV(p, q) + kl * KL(p || q), p without gradient."""

    ce: float = Field(1.0, ge=0)
    tv: float = Field(0.0, ge=0)
    kl: float = Field(0.0, ge=0)
    slot_decay: float = Field(1.0, gt=0, le=1, description="weight of slot i is slot_decay ** i; early slots decide")


class Stage(Config):
    """One stretch of training.

    `ar` trains clean rows alone; `diffusion` trains the doubled pack: (alpha * L_AR + L_draft) / (1 + alpha).
    """

    name: str
    kind: Literal["ar", "diffusion"]
    tokens: int = Field(ge=1, description="clean tokens to train on")
    pack_tokens: int = Field(8192, ge=1, description="clean tokens per optimiser step")
    learning_rate: float = Field(2e-3, gt=0)
    final_learning_rate: float = Field(1e-4, ge=0, description="reached along a cosine")
    warmup_steps: int = Field(50, ge=0)
    weight_decay: float = Field(0.05, ge=0)
    clip: float = Field(1.0, gt=0, description="largest gradient norm")
    alpha: float = Field(1.0, ge=0, description="weight of the AR loss beside the draft loss")
    ar_target: Literal["data", "parent"] = Field(
        "data", description="what clean rows learn: the data's next token (cross-entropy), or p as it was when the stage "
        "began (KL divergence), which converts a policy without changing what it says"
    )  # fmt: skip
    draft: DraftLoss = DraftLoss()
    block_length: tuple[int, int] = Field((16, 16), description="shortest and longest mask block")
    random_offset: bool = Field(True, description="the first block of a document has a random length")
    masked_copies: int = Field(1, ge=1, description="times a document is cut into mask blocks beside its clean rows; with "
                               "random offsets or lengths each copy is cut elsewhere, and clean rows are paid for once")
    balance_rate: float = Field(1e-3, ge=0, description="step of the balancing biases (arXiv 2408.15664)")
    autocast: Literal["float32", "bfloat16"] = "bfloat16"

    @model_validator(mode="after")
    def _lengths(self) -> Stage:
        low, high = self.block_length
        if not 2 <= low <= high <= 64:
            raise ValueError("block_length must be two numbers with 2 <= shortest <= longest <= 64")
        if self.ar_target == "parent" and self.kind == "ar":
            raise ValueError("ar_target: parent holds p where it is, so an `ar` stage would learn nothing; use data")
        return self


class ConversionConfig(Config):
    """One run of `blockroll convert`."""

    output: str = Field(description="directory the converted policy is written to")
    parent: str | None = Field(None, description="AR policy to convert: a name or directory; none trains one first")
    architecture: Architecture = Architecture()
    data: Data = Data()
    block_size: int = Field(16, ge=2, le=64)
    stages: tuple[Stage, ...] = Field(min_length=1)
    seed: int = Field(0, ge=0)
    save_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    evaluation_tasks: int = Field(0, ge=0, description="held-out tasks for the figures of the card")
