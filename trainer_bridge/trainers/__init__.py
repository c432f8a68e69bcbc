"""Trainers that ship with blockroll. Each one is given the address of a rollout service and talks to it through
`client` alone."""
