"""Tests of the routes that trainers call, against one live service."""
