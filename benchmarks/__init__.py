"""Benchmarks: one registry of operations and steps, each measured against its competitors in the same run.

`python -m benchmarks list` names them, `python -m benchmarks NAME` measures one, appends rows with provenance to
`benchmarks/results/NAME.csv` and prints a table with ratios. `pytest benchmarks --benchmark-only` runs the same
registry through pytest-benchmark.
"""
