"""Benchmarks: one runner (`python -m benchmarks.run`), one results format (`benchmarks/results/<name>.json`).

A benchmark is a module in this folder with ``NAME``, ``COLUMNS`` (key, heading and formatter of each
printed column) and ``run(quick) -> list of rows``, a row being a dict of plain values. `run` finds it by
its presence.
"""
