"""The name under which verl's registry of training engines knows ours. Imports nothing."""

VENDOR = "blockroll"
"""The value of VERL_ENGINE_VENDOR."""
