"""The configuration of a rollout service. Sections are frozen and strict; every quantity carries its unit.

Imports neither torch nor Ray, so that commands that only talk to a service start at once.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from ..errors import InvalidInput, TransportError
from ..rollout.params import SamplerName
from ..rollout.schedule import Schedule
from ..settings import Config
from ..trainer_bridge.wire.limits import MAX_CLIENT_SAMPLES, MAX_ENGINES, MAX_REQUEST_SAMPLES
from ..trainer_bridge.wire.sockets import check_address, is_local

Device = str
_DEVICES = "auto, cpu, cuda or cuda:N"


class Engines(Config):
    """How many engines there are, and what each process gets. Give `count`, or `min` and `max`."""

    count: int | None = Field(None, ge=1, le=MAX_ENGINES, description="engines at the start; `blockroll scale` changes it. None: "
                              "2, or 1 on one core, or `min`")
    min: int | None = Field(None, ge=1, le=MAX_ENGINES, description="with max: the number of engines follows the queue within "
                            "these bounds")
    max: int | None = Field(None, ge=1, le=MAX_ENGINES)
    idle_seconds: float = Field(120.0, gt=0, description="with bounds: an engine leaves when fewer have sufficed for so long")
    device: Device = Field("auto", description="auto, cpu, cuda or cuda:N. A ROCm GPU is cuda. auto: cuda where Ray gives the "
                           "engine a GPU (num_gpus), else cpu")
    dtype: Literal["float32", "bfloat16", "float16", "float64"] | None = Field(None, description="of the weights; none for "
        "bfloat16 on a GPU and float32 on a CPU")
    num_cpus: float = Field(1.0, gt=0, lt=1e6, description="CPU cores of an engine, as Ray counts them; on a CPU its threads too")
    num_gpus: float = Field(0.0, ge=0, lt=1e6, description="GPUs of an engine, as Ray counts them")
    resources: dict[str, float] = Field({}, description="custom Ray resources of an engine, such as {MI300X: 1}")
    placement: Literal["pack", "spread"] = Field("pack", description="fill one node first, or use as many nodes as there are")
    env: dict[str, str] = Field({}, description="environment variables of the engine processes")
    oversubscribe: bool = Field(False, description="allow more engines than this machine has cores")
    batch: int = Field(32, ge=1, le=1 << 16, description="most samples an engine decodes at once")
    block_size: int | None = Field(None, ge=2, le=64, description="mask rows per block; none for the policy's own")
    draft_temperature: float | None = Field(None, ge=0.1, le=2, description="temperature of the drafts as a multiple of the "
                                            "request's; none for the policy's own")
    pages: int | None = Field(None, ge=1, lt=1 << 31, description="pages of the K/V pool; none: for `batch` samples of 512 "
                              "positions")
    kv_memory: float | str | None = Field(None, description="instead of pages: share of the memory that is free once the policy "
                                          "is loaded, such as 0.9, or a size, such as 40GB")
    page_size: int = Field(32, ge=1, le=1 << 16, description="positions per page")
    prefill_rows: int | None = Field(None, ge=1, le=1 << 24, description="most prompt rows of one step; none: 512 on a CPU, 2048 "
                                     "on a GPU")
    enable_prefix_caching: bool = Field(True, description="a request reuses the K/V of earlier ones that begin alike")
    batch_invariant: bool = Field(False, description="on a GPU: results of a request do not depend on what shares its batch")

    @model_validator(mode="after")
    def _checked(self) -> Engines:
        kind, colon, number = self.device.partition(":")
        if kind not in ("auto", "cpu", "cuda") or (colon and (kind != "cuda" or not number.isdecimal())):
            raise InvalidInput("device", f"unknown device {self.device!r}", f"use {_DEVICES}")
        if (self.min is None) != (self.max is None):
            raise InvalidInput("max" if self.max is None else "min", "only one bound is given", "give min and max, or count")
        if kind == "cuda" and not self.num_gpus:
            raise InvalidInput("num_gpus", f"0 GPUs for an engine on {self.device}", "give each engine one: num_gpus: 1")
        if self.kv_memory is not None and self.pages is not None:
            raise InvalidInput("kv_memory", f"{self.kv_memory} beside {self.pages} pages", "give one of the two")
        if self.min is not None and self.max is not None:
            if self.count is not None:
                raise InvalidInput("count", f"{self.count} beside the bounds min and max", "give count, or min and max")
            if self.min > self.max:
                raise InvalidInput("min", f"{self.min} is greater than max {self.max}", "give min <= max")
        return self

    @property
    def at_start(self) -> int:
        """Engines that the service starts with."""
        return self.min or self.count or min(2, cores())

    @property
    def most(self) -> int:
        """Engines that a Ray of its own has room for."""
        return max(self.at_start, self.max or 0, int(cores() / self.num_cpus), 2 * self.at_start if self.oversubscribe else 0)

    @property
    def follows_queue(self) -> bool:
        """Whether the number of engines follows the queue."""
        return self.min is not None and self.min != self.max


class ScheduleOptions(Config):
    """What a decode step runs."""

    kind: Literal["auto", "ar", "two_pass", "fused"] = "fused"
    levels: tuple[int, ...] = Field(Schedule().levels, description="fused: acceptance lengths that a step drafts for")
    repeatable: bool = Field(False, description="auto: choose by stored step times alone, so that a run repeats")

    @model_validator(mode="after")
    def _checked(self) -> ScheduleOptions:
        self.schedule()
        return self

    def schedule(self) -> Schedule:
        """As the engine takes it."""
        return Schedule(self.kind, levels=self.levels)


class Ray(Config):
    """The Ray cluster that engines run in."""

    address: str | None = Field(None, description="HOST:PORT of a Ray cluster, or auto for the one this machine belongs to; none "
                                "starts one on this machine for the life of the service")


class Sampling(Config):
    """What a request gets where it names no value of its own. A client of the bridge always names them."""

    sampler: SamplerName = "coupled"
    temperature: float = Field(1.0, ge=0, lt=1e4)
    max_tokens: int = Field(1024, ge=1, le=1 << 31)


class Dispatch(Config):
    """Which engine gets which work, and when an engine counts as lost."""

    mode: Literal["continuous", "ordered"] = Field("continuous", description="continuous: a request joins an engine between two "
        "steps, where the least work waits. ordered: a batch is dealt by its order, so that lossless and mixed repeat to the bit")
    heartbeat_seconds: float | None = Field(None, gt=0, description="an engine whose process has not answered for so long counts "
                                            "as hung; none for the cluster's own limit")
    answer_seconds: float = Field(600.0, gt=0, description="most time an engine may take to load, or to take, a weight version, "
                                  "and for one step")
    max_in_flight: int = Field(4096, ge=1, le=1 << 24, description="samples that engines hold at once")


class Delivery(Config):
    """The ledger, and who may connect."""

    ledger: str = Field("runs/service/ledger.sqlite", description="SQLite file; the weight version that serves is kept beside it")
    max_ledger_bytes: int | None = Field(None, ge=1 << 20, lt=1 << 62, description="size the ledger may reach, without "
                                         "the weights")
    keep_requests: int = Field(200_000, ge=0, le=1 << 40, description="wholly acknowledged requests that the ledger "
                               "recognises again")
    lease_seconds: float | None = Field(None, gt=0, description="work of which no sample came for so long is leased again; none: "
                                        "leases do not expire")
    client_grace_seconds: float | None = Field(600.0, gt=0, description="time a client may be gone before its unfinished work "
                                               "waits until it is back; none: it goes on")
    max_request_samples: int = Field(MAX_REQUEST_SAMPLES, ge=1, le=65_536, description="most samples of one request")
    max_client_samples: int = Field(MAX_CLIENT_SAMPLES, ge=1, le=1 << 40, description="most unfinished samples of one client")
    disk_patience_seconds: float | None = Field(None, gt=0, description="most time the disk may stay full before the service "
                                                "ends; none: the service waits")
    bind: str = Field("tcp://127.0.0.1:*", description="address of the gateway: tcp://HOST:PORT (port * for any free one) or "
                      "ipc://PATH")
    keys: str | None = Field(None, description="directory of CURVE keys, made at the first start; needed beyond loopback")

    @model_validator(mode="after")
    def _checked(self) -> Delivery:
        try:
            check_address(self.bind, has_keys=True)
        except TransportError as error:
            remedy = "use tcp://HOST:PORT, tcp://127.0.0.1:* or ipc://PATH"
            raise InvalidInput("bind", f"{self.bind!r} is not an address", remedy) from error
        if self.bind.startswith("inproc://"):
            raise InvalidInput("bind", f"{self.bind} can be reached from its own process only", "use tcp://127.0.0.1:* or ipc://PATH")
        if self.keys is None and not is_local(self.bind):
            raise InvalidInput("keys", f"missing, and {self.bind} is not an address that only this machine can reach",
                               "name a directory for keys, or bind to tcp://127.0.0.1:*")
        return self


class Weights(Config):
    """How a weight version reaches the engines."""

    transport: Literal["ray", "shared_memory", "torch_distributed"] = Field(
        "ray", description="ray: through Ray's object store; shared_memory: engines on the gateway's host map its memory; "
                           "torch_distributed: a broadcast, between GPUs by NCCL or RCCL")


class Http(Config):
    """The HTTP face of the service: OpenAI's routes, and those of trainers. A section without keys (`http: {}`) turns it on."""

    host: str = Field("127.0.0.1", description="address of the interface that answers")
    port: int = Field(0, ge=0, le=65535, description="0 for any free port; `blockroll status --json` says which")
    api_key: str | None = Field(None, description="file that holds the key of every route, or env:NAME; needed beyond loopback")
    control_key: str | None = Field(None, description="file that holds the key of the routes that change the service (weights, "
                                    "pause), or env:NAME; beyond loopback such a route is refused without one")
    model_name: str | None = Field(None, min_length=1, max_length=256, description="what clients give as `model`; none for the "
                                   "policy as it is named here")
    chat_template: str | None = Field(None, description="file of a chat template (Jinja); none for the tokenizer's own")
    max_body_bytes: int = Field(8 << 20, ge=1024, le=1 << 30, description="largest body of a request")
    max_samples: int = Field(1024, ge=1, le=65_536, description="most samples of one HTTP request: its prompts times `n`")
    max_logprobs: int = Field(20, ge=0, le=32_767, description="most alternatives recorded per token")
    search_functions: tuple[str, ...] = Field((), description="functions, `module:function`, that the field `search` of a "
                                              "request may name as `scorer` or `answer`; no other is loaded")
    max_unfinished: int = Field(65_536, ge=1, le=1 << 24, description="samples that HTTP clients may wait for at once; further "
                                "requests are answered with 429")

    @model_validator(mode="after")
    def _checked(self) -> Http:
        if not self.is_local and self.api_key is None:
            raise InvalidInput("api_key", f"missing, and {self.host} is not an address that only this machine can reach",
                               "name a file that holds a key, or bind to 127.0.0.1")
        return self

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach it."""
        return is_local(f"tcp://{self.host}:{self.port}")


class Metrics(Config):
    """Prometheus metrics of the gateway and its engines."""

    port: int | None = Field(None, ge=0, le=65535, description="none for no metrics, 0 for any free port")
    host: str = Field("127.0.0.1", description="address of the interface that answers")


class Logging(Config):
    """What the service writes about itself: one line per lease, commit, restart, retry and refusal."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["text", "json"] = "text"
    file: str | None = Field(None, description="none for standard error, which is service.log beside the ledger of a detached "
                             "service")


class ServiceConfig(Config):
    """One rollout service: `blockroll up`."""

    policy: str = Field(description="policy to start from: a shipped name or a directory that every node can read")
    engines: Engines = Engines()
    schedule: ScheduleOptions = ScheduleOptions()
    sampling: Sampling = Sampling()
    ray: Ray = Ray()
    dispatch: Dispatch = Dispatch()
    delivery: Delivery = Delivery()
    weights: Weights = Weights()
    http: Http | None = None
    metrics: Metrics = Metrics()
    logging: Logging = Logging()

    @model_validator(mode="after")
    def _fits_this_machine(self) -> ServiceConfig:
        check_cores(self.engines, self.engines.max or self.engines.at_start, self.ray.address)
        return self

    @property
    def ledger(self) -> Path:
        """The ledger's file."""
        return Path(self.delivery.ledger)


def check_cores(engines: Engines, count: int, ray_address: str | None) -> None:
    """Raises InvalidInput for more engines than this machine has cores, unless the configuration allows that. The nodes of a
    Ray cluster count their own cores: there an engine without a place waits."""
    if ray_address is None and not engines.oversubscribe and count * engines.num_cpus > cores():
        each = f"{engines.num_cpus:g} core{'' if engines.num_cpus == 1 else 's'} each"
        raise InvalidInput("engines", f"{count} engines of {each} on a machine with {cores()}",
                           "give fewer, or set engines.oversubscribe: true")


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
