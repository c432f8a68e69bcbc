"""Policies that come with blockroll: one folder each, a Hugging Face directory with its recipe, training log, figures and
card. `load_policy(NAME)` finds them by the folder's name."""
