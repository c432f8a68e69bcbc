"""A policy as a model that verl trains: name this module as `actor_rollout_ref.model.external_lib`.

`python -m blockroll.trainer_bridge.adapters.verl.model POLICY DIRECTORY` writes the directory for `actor_rollout_ref.model.path`.
"""

from __future__ import annotations

import sys

from ..policy_model import PolicyModel as PolicyModel
from ..policy_model import model_directory

if __name__ == "__main__":
    print(model_directory(sys.argv[1], sys.argv[2]))
