"""The stages of a conversion on the workers of Ray Train.

Invariants:
- Ray places processes and joins them into a process group; what they run is `model.conversion.train.run`, as under torchrun.
- A worker that fails ends the run; the last checkpoint stays in force and the same command goes on from it.

Every worker must see the output directory (one machine, or a shared file system): that is where results and checkpoints are
kept. Ray keeps nothing that a later run needs.
"""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError
from ray.util.queue import Empty, Queue

from ...errors import BlockrollError, ClusterError
from ...files import make_directory
from ...model.conversion.config import ConversionConfig
from ...model.conversion.train import run


def run_on_ray(
    config: ConversionConfig, report: Callable[[dict[str, Any]], None], before_export: Callable[[], None]
) -> None:
    """Run every stage on `config.launcher.workers` workers and write the policy.

    Args:
        report: called here with the figures of each reported step.
        before_export: called by the first worker before the output directory is replaced.

    Raises:
        BlockrollError: what a worker was refused; ClusterError where one was lost.
    """
    launcher = config.launcher
    own, before = not ray.is_initialized(), signal.getsignal(signal.SIGTERM)
    if own:
        ray.init(address=launcher.address, include_dashboard=False, log_to_driver=False, configure_logging=False,
                 num_cpus=None if launcher.address else max(launcher.workers + 1, os.cpu_count() or 1))  # fmt: skip
        if before is not None:
            signal.signal(signal.SIGTERM, before)  # Ray's own handler ends the process at once
    output = Path(config.output).absolute()
    scratch = make_directory(output.with_name(f".{output.name}.ray"))
    rows = Queue(actor_options={"num_cpus": 0})
    forwarding = threading.Thread(target=_forward, args=(rows, report), daemon=True)
    forwarding.start()
    gpu = config.device != "cpu" and torch.cuda.is_available()
    trainer = TorchTrainer(
        _work,
        train_loop_config={"config": config, "folder": os.getcwd(), "rows": rows, "before_export": before_export},
        scaling_config=ScalingConfig(num_workers=launcher.workers, use_gpu=gpu),
        run_config=RunConfig(storage_path=str(scratch), failure_config=FailureConfig(max_failures=0)),
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if gpu else "gloo", timeout_s=int(launcher.timeout_s)),
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        raise _explained(error) from error
    finally:
        rows.put(None)
        forwarding.join()
        shutil.rmtree(scratch, ignore_errors=True)
        if own:
            ray.shutdown()


def _work(given: dict[str, Any]) -> None:
    """What every worker runs."""
    os.chdir(given["folder"])  # paths of a recipe are relative to where the command was given
    run(given["config"], given["rows"].put, given["before_export"])


def _forward(rows: Queue, report: Callable[[dict[str, Any]], None]) -> None:
    """Hand on rows until a None."""
    while True:
        try:
            row = rows.get(timeout=1.0)
        except Empty:
            continue
        if row is None:
            return
        report(row)


def _explained(error: TrainingFailedError) -> BlockrollError:
    """The error of ours that a worker met; that it lost another only where nothing else is known."""
    failures = error.worker_failures.values() if isinstance(error, WorkerGroupError) else []
    causes = [getattr(failure, "_base_exc", failure) for failure in failures]  # Ray wraps what a worker raised
    ours = [cause for cause in causes if isinstance(cause, BlockrollError)]
    if ours:
        return min(ours, key=lambda cause: isinstance(cause, ClusterError))
    return ClusterError(f"training: a worker failed ({str(error).strip().splitlines()[-1]}); see Ray's logs, and run the "
                        "command again to go on from the last checkpoint")
