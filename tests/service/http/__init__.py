"""Tests of the HTTP face: one live service for its files."""
