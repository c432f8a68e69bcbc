"""A policy as a model that verl trains: name this module as `actor_rollout_ref.model.external_lib`.

`python -m blockroll.trainer_bridge.adapters.verl.model POLICY DIRECTORY` writes the directory for `actor_rollout_ref.model.path`.
"""

from __future__ import annotations

import sys

from transformers import AutoModel

from ..policy_model import PolicyConfig, PolicyModel, model_directory
from .engine import DraftingEngine as DraftingEngine

AutoModel.register(PolicyConfig, PolicyModel)  # verl asks it for architectures whose names do not end in ForCausalLM

if __name__ == "__main__":
    print(model_directory(sys.argv[1], sys.argv[2]))
