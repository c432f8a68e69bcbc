"""Trainers that ship with blockroll. Each one talks to a rollout service through `client` alone."""
