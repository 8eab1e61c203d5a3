"""Every op beside what people would otherwise use, measured in one run.

`registry` says what a case is, one file per family holds its cases, `measure` times the contenders of a case in turn
(`gpu` on a GPU), `run` is the command, `report` makes the table, the JSON and the plots.
"""
