"""Brings the whole rollout service up and down: Ray, engines, gateway.

Knows the parts of a service and their order. Does not know trainers or how tokens are made.

`lifecycle`: a service for as long as a `with` block lasts.
"""
