"""ConversionConfig: the policy to start from, the data, and a list of stages.

Invariants: sections are frozen and strict (`settings.Config`); every quantity carries its unit in its description.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from ...errors import ConfigError, DataError
from ...seeds import MAX_SEED
from ...settings import Config
from ..device import NAMES, is_name
from ..tasks import Task, make_tasks
from ..tasks.own_config import TaskSource

MAX_PARAMETERS = 2**31
"""Parameters of a policy trained from nothing: 8.6 GB in float32, before gradients and optimiser states."""
MAX_DIFFICULTY = 1000
"""Largest size of an option of a family: tasks of so many terms or digits fit no policy."""
MAX_POOL = 1 << 20
"""Records sorted or shuffled together, which are held in memory."""
MAX_TOKENS = 2**50
"""Tokens of a stage; a thousand times what the largest models are trained on."""
MAX_PACK = 2**28
"""Tokens of a pack."""


class Architecture(Config):
    """Dimensions of a ZAYA policy trained from nothing."""

    vocab_size: int = Field(320, ge=260, le=2**20, description="most tokens of the tokenizer")
    hidden_size: int = Field(192, ge=8, le=2**16)
    layers: int = Field(6, ge=1, le=1024)
    heads: int = Field(6, ge=1, le=1024)
    kv_heads: int = Field(2, ge=1, le=1024)
    head_dim: int = Field(32, ge=4, le=1024)
    experts: int = Field(4, ge=1, le=1024)
    expert_size: int = Field(320, ge=8, le=2**16, description="inner width of an expert")
    router_size: int = Field(48, ge=4, le=2**14)
    max_position_embeddings: int = Field(512, ge=16, le=2**24, description="longest sequence, tokens")
    rope_theta: float = Field(10_000.0, ge=1, le=1e12)

    @model_validator(mode="after")
    def _sizes(self) -> Architecture:
        if self.heads % self.kv_heads:
            raise ConfigError("kv_heads", f"{self.kv_heads} does not divide heads, {self.heads}", "use a divisor of heads")
        if self.head_dim % 4:
            raise ConfigError("head_dim", f"{self.head_dim} is no multiple of 4", "half of it is rotated, in pairs")
        inner = self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        layer = self.hidden_size * (inner + self.router_size + 3 * self.experts * self.expert_size)
        parameters = self.vocab_size * self.hidden_size + self.layers * layer
        if parameters > MAX_PARAMETERS:
            raise ConfigError("layers", f"{self.layers} of these sizes make about {parameters:.2g} parameters, more than "
                              f"{MAX_PARAMETERS:.2g}", "lower the sizes, or name a parent")  # fmt: skip
        return self


class Source(Config):
    """Where documents come from."""

    weight: float = Field(1.0, ge=1e-6, le=1e6, description="share of this source's records among those of all sources")


class Tasks(Source):
    """reasoning-gym tasks of the training split, written as question, steps, answer."""

    kind: Literal["tasks"] = "tasks"
    families: tuple[str, ...] = Field((), description="families to draw from; empty for all")
    difficulty: dict[str, dict[str, int]] = Field(
        {}, description="by family, options of its reasoning-gym data set that replace the family's own"
    )
    unworked: float = Field(0.0, ge=0, lt=1, description="share of the documents that give the answer without its steps")

    @model_validator(mode="after")
    def _drawable(self) -> Tasks:
        make_tasks("train", 0, only=self.families, difficulty=self.difficulty)
        if self.families and (idle := sorted(self.difficulty.keys() - set(self.families))):
            raise ConfigError("difficulty", f"{idle[0]!r} is none of families", "add it there, or leave its difficulty out")
        for family, options in self.difficulty.items():
            for name, value in options.items():
                if not name.isidentifier() or not -MAX_DIFFICULTY <= value <= MAX_DIFFICULTY:
                    raise ConfigError("difficulty", f"{family} cannot take {name}: {value}",
                                      f"name an option of the family, with a value of at most {MAX_DIFFICULTY} in size")
        for family in self.difficulty:
            self.make(1, seed=0, only=(family,))  # the data set checks its options when it is asked
        return self

    def make(self, count: int, seed: int, only: Sequence[str] = ()) -> list[Task]:
        """`count` different tasks of the training split; of the families `only`, or of the source's."""
        try:
            return make_tasks("train", count, seed, only=only or self.families, difficulty=self.difficulty)
        except DataError as error:
            if error.field != "count":
                raise
            raise DataError("difficulty", error.problem, "lower `pool`, or let the tasks be larger") from error


class Files(Source):
    """Records of files."""

    epochs: int | None = Field(None, ge=1, description="times the records are read; none for as often as the stage asks")
    format: Literal["text", "completion", "messages"] = Field(
        "text", description="text: all of it is learned. completion: what follows a prompt is. messages: a conversation, of "
        "which the assistant's answers are, in the tokenizer's chat template or, without one, as `role: content` lines"
    )  # fmt: skip
    columns: dict[Literal["text", "prompt", "completion", "messages"], str] = Field(
        {}, description="names in the files of the fields text, prompt, completion, messages, where they differ"
    )


class JsonLines(Files):
    """JSON-lines files."""

    kind: Literal["jsonl"]
    paths: tuple[str, ...] = Field(min_length=1, description="files, patterns, or directories of .jsonl and .json files")


class Parquet(Files):
    """Parquet files; their row groups are shuffled, and the rows of each."""

    kind: Literal["parquet"]
    paths: tuple[str, ...] = Field(min_length=1, description="files, patterns, or directories of .parquet files")


class HuggingFace(Files):
    """A data set that `datasets.save_to_disk` wrote, or a directory of Parquet or JSON-lines files."""

    kind: Literal["huggingface"]
    path: str
    split: str | None = Field(None, description="of a data set saved with several splits")


class Rollouts(Source):
    """The policy's own answers, as `blockroll generate` writes them."""

    kind: Literal["rollouts"]
    paths: tuple[str, ...] = Field(min_length=1, description="files, patterns, or directories of .jsonl files")
    epochs: int | None = Field(None, ge=1, description="times the records are read; none for as often as the stage asks")
    finish_reasons: tuple[str, ...] = Field((), description="answers that ended so are taken; empty for all")


AnySource = Annotated[Tasks | JsonLines | Parquet | HuggingFace | Rollouts, Field(discriminator="kind")]


class Data(Config):
    """Documents, from one source or a mixture."""

    sources: tuple[AnySource, ...] = Field((Tasks(),), min_length=1)
    seed: int = Field(0, ge=0, le=MAX_SEED, description="of the order of records")
    pool: int = Field(2048, ge=1, le=MAX_POOL, description="records sorted by length together, so that packs hold little padding")
    shuffle: int = Field(1024, ge=0, le=MAX_POOL, description="records of a file that are shuffled together; parts of so many "
                         "records come in random order. 0 keeps the order of the files")

    @property
    def families(self) -> tuple[str, ...]:
        """Families of the tasks; empty for all."""
        chosen = [source.families for source in self.sources if isinstance(source, Tasks)]
        return () if not all(chosen) else tuple(dict.fromkeys(name for families in chosen for name in families))


class DraftLoss(Config):
    """Loss of the mask rows: ce * CE(target) + tv * TV(p, q) + kl * KL(p || q), p without gradient. All weights are pure
    numbers beside losses in nats (TV: a probability)."""

    ce: float = Field(1.0, ge=0, description="weight of the cross-entropy of the document's token (arXiv 2511.08923)")
    tv: float = Field(0.0, ge=0, description="weight of the total variation between q and the policy's own p, the chance "
                      "that a draft is rejected at temperature 1 (arXiv 2607.05722, 2607.05147)")
    kl: float = Field(0.0, ge=0, description="weight of KL(p || q) (arXiv 2607.05722)")
    slot_decay: float = Field(1.0, gt=0, le=1, description="weight of slot i is slot_decay ** i: early slots decide how "
                              "far a block is accepted (arXiv 2607.05147)")
    slots: Literal["all", "reached", "accepted"] = Field(
        "all", description="which slots count. `reached`: each with the chance that all drafts before it are accepted, the "
        "product of the overlaps of p and q there: the positions up to accepted + 1 (arXiv 2607.05722), in expectation. "
        "`accepted`: the same for drafts that are the document's tokens, the product of min(1, q / p)"
    )  # fmt: skip
    sampled: float = Field(0.0, ge=0, description="weight of the same loss where p follows drafts sampled from q, one block "
                           "per document, instead of the document's tokens; costs one more pass over the documents")


class Stage(Config):
    """One stretch of training.

    `ar` trains clean rows alone; `diffusion` trains the doubled pack: (alpha * L_AR + L_draft) / (1 + alpha).
    """

    name: str = Field(pattern=r"^\w[\w .+-]{0,63}$", description="of its directory: letters, digits and ` ._+-`, at most 64")
    kind: Literal["ar", "diffusion"]
    tokens: int = Field(ge=1, le=MAX_TOKENS, description="clean tokens to train on")
    skip: bool = Field(False, description="pass over this stage")
    repeat: int = Field(1, ge=1, le=1000, description="times the stage runs, each time on other data; later runs are NAME-2, ...")
    pack_tokens: int = Field(8192, ge=1, le=MAX_PACK, description="most clean tokens of a pack, which one process computes at "
                             "once")
    sequence_tokens: int | None = Field(None, ge=2, description="longest document, tokens; none takes pack_tokens")
    too_long: Literal["error", "split", "drop"] = Field(
        "error", description="what becomes of a longer document: an error that names it, several documents, or nothing"
    )
    data: Data | None = Field(None, description="documents of this stage; none takes the run's")
    packs_per_step: int = Field(1, ge=1, le=2**20, description="packs of one optimiser step, over all processes")
    optimizer: Literal["adamw", "sgd"] = "adamw"
    betas: tuple[float, float] = Field((0.9, 0.98), description="decay per step of the gradient's mean and of its square; "
                                       "sgd takes the first as momentum")
    epsilon: float = Field(1e-8, ge=1e-30, le=1, description="added to the root of the mean square of a gradient")
    learning_rate: float = Field(2e-3, gt=0, le=1)
    final_learning_rate: float = Field(1e-4, ge=0, le=1, description="reached along the schedule at the stage's last token")
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="of the learning rate, over tokens")
    warmup_steps: int = Field(50, ge=0, description="optimiser steps over which the rate rises from zero")
    weight_decay: float = Field(0.05, ge=0, description="per step, times the learning rate; matrices alone decay")
    clip: float = Field(1.0, gt=0, description="largest gradient norm, over all processes")
    alpha: float = Field(1.0, ge=0, description="weight of the AR loss beside the draft loss")
    ar_target: Literal["data", "parent"] = Field(
        "data", description="what clean rows learn: the data's next token (cross-entropy), or p of the policy "
        "that the first diffusion stage started from (KL divergence), which converts a policy without changing what it says"
    )  # fmt: skip
    draft: DraftLoss = DraftLoss()
    block_length: tuple[int, int] = Field((16, 16), description="shortest and longest mask block")
    random_offset: bool = Field(True, description="the first block of a document has a random length")
    masked_copies: int = Field(1, ge=1, le=1024, description="times a document is cut into mask blocks beside its clean rows; "
                               "with random offsets or lengths each copy is cut elsewhere, and clean rows are paid for once")
    markov_rank: int = Field(0, ge=0, le=1024, description="rank of the head that conditions a draft on the token before it "
                             "(arXiv 2607.05147), added where the policy has none; 0 adds none and trains one that is there")
    balance_rate: float = Field(1e-3, ge=0, description="change per step of a balancing bias, in units of router "
                                "probability (arXiv 2408.15664)")
    autocast: Literal["float32", "bfloat16"] | None = Field(
        None, description="dtype of products; parameters, gradients and optimiser states are float32. None takes bfloat16 on an "
        "accelerator and float32 on a CPU, where bfloat16 is several times as slow"
    )
    activation_checkpointing: bool = Field(False, description="keep only each layer's input for the backward pass and compute "
                                           "the layer again there: about a third more time, a fraction of the memory")
    report_steps: int = Field(20, ge=1, description="optimiser steps between lines of the log")
    checkpoint_steps: int = Field(500, ge=1, description="optimiser steps between checkpoints")

    def on(self, device: str) -> Stage:
        """The stage with what depends on the type of the device (`cpu`, `cuda`) chosen."""
        return self.model_copy(update={"autocast": self.autocast or ("float32" if device == "cpu" else "bfloat16")})

    @property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return self.sequence_tokens or self.pack_tokens

    @model_validator(mode="after")
    def _lengths(self) -> Stage:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError("betas must be two numbers from 0 to below 1")
        low, high = self.block_length
        if not 2 <= low <= high <= 64:
            raise ValueError("block_length must be two numbers with 2 <= shortest <= longest <= 64")
        if self.longest > self.pack_tokens:
            raise ValueError(f"sequence_tokens must be at most pack_tokens, {self.pack_tokens}: a document is never cut "
                             "between packs")
        if self.ar_target == "parent" and self.kind == "ar":
            raise ValueError("ar_target: parent holds p where it is, so an `ar` stage would learn nothing; use data")
        return self


def _device_name(name: str) -> str:
    if not is_name(name):
        raise ValueError(f"it should be {NAMES}")
    return name


DeviceName = Annotated[str, AfterValidator(_device_name)]
DtypeName = Literal["float32", "bfloat16", "float16"]


class Launcher(Config):
    """Which processes train. `local` is this one; under torchrun, whatever the kind, the ones that torchrun started."""

    kind: Literal["local", "torchrun", "ray"] = "local"
    workers: int = Field(1, ge=1, le=100_000, description="processes, one per accelerator")
    address: str | None = Field(None, description="ray: address of a running cluster; none starts one on this machine")
    timeout_s: float = Field(600.0, ge=1, le=1e6, description="seconds a process waits for one that does not answer")

    @model_validator(mode="after")
    def _one_is_local(self) -> Launcher:
        if self.kind == "local" and self.workers > 1:
            raise ValueError("kind: local is one process; use torchrun or ray for several workers")
        return self


class ConversionConfig(Config):
    """One run of `blockroll convert`."""

    output: str = Field(description="directory the converted policy is written to")
    parent: str | None = Field(None, description="AR policy to convert: a name or directory; none trains one first")
    mask_token: int | None = Field(None, ge=0, description="id that mask rows carry; none takes the tokenizer's mask token")
    architecture: Architecture = Architecture()
    data: Data = Data()
    block_size: int | None = Field(None, ge=2, le=64, description="mask rows of a block in decoding; none takes the parent's, "
                                   "which is 16 for a parent that was not converted")
    draft_temperature: float | None = Field(None, ge=0.1, le=2, description="temperature of the drafts in decoding, as a "
                                            "multiple of the samples' own; none takes the parent's, or 1. Training does not "
                                            "use it: compare some with `blockroll eval --draft-temperatures`")
    stages: tuple[Stage, ...] = Field(min_length=1)
    seed: int = Field(0, ge=0, le=MAX_SEED)
    launcher: Launcher = Launcher()
    save_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    device: DeviceName = Field("auto", description="where it trains and is measured: auto, cpu, cuda or cuda:N; of several "
                               "processes each has a GPU of its own")
    dtype: DtypeName | None = Field(None, description="of the policy when it is measured; none takes bfloat16 on a GPU and "
                                    "float32 on a CPU. `stages.autocast` is that of training")
    evaluation_tasks: int = Field(0, ge=0, le=100_000, description="held-out tasks for the figures of the card")
    evaluation_samples: int = Field(4, ge=1, le=65_536, description="samples of each; pass@k is measured up to as many")
    evaluation_source: TaskSource | None = Field(None, description="tasks of one's own, in place of reasoning-gym's")
    evaluation_documents: JsonLines | Parquet | HuggingFace | None = Field(
        None, discriminator="kind", description="documents of one's own on which the AR loss of policy and parent is measured")

    @model_validator(mode="after")
    def _names(self) -> ConversionConfig:
        if Path(self.output).name in ("", ".."):
            raise ConfigError("output", f"{self.output!r} names no directory of its own", "name one, such as runs/policy")
        names = [stage.name for stage in self.runs]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two stages are named {twice[0]!r}; results are kept by name, so give each its own")
        if not names:
            raise ValueError("every stage has skip: true; leave one in")
        return self

    @property
    def runs(self) -> tuple[Stage, ...]:
        """The stages as they are run: skipped ones left out, repeated ones under names of their own."""
        return tuple(
            stage if turn == 1 else stage.model_copy(update={"name": f"{stage.name}-{turn}"})
            for stage in self.stages if not stage.skip
            for turn in range(1, stage.repeat + 1)
        )
