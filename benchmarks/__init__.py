"""Benchmarks of every op against its alternatives, measured in one run.

`registry` defines a case, one file per family holds its cases, `measure` times the contenders of a case in turn (`gpu`
on a GPU), `run` is the command, `report` and `plots` write the table, the JSON and the plots.
"""
