"""Runs that are kept in a folder: they survive the end of their process, go on, and are forked."""
