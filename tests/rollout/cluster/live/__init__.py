"""Tests of a pool of two engines that runs for all of them."""
