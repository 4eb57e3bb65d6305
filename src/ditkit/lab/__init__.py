"""Experiments and measurements on whole models."""
