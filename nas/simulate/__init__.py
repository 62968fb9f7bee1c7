"""Searches without training: tables of results, replayed on a virtual clock through the real loop. For tests and plans.

    space = decisions_space()
    found = simulate(space, SyntheticTable(space), ["random", "nsga2"], trials=1000, workers=100)
    found.frame, found.makespan_s, found.utilisation, found.best_over_time()

`simulate` is the whole (run.py); `SimulatedExecutor` the engine (engine.py), with groups of workers and faults (cluster.py);
tables come from runs and files (files.py), or are invented (synthetic.py).
"""

from nas.simulate.cluster import Faults, Group
from nas.simulate.engine import SimulatedExecutor, Stay
from nas.simulate.files import from_file, from_frame, from_run, macro_space, macro_table, made_curve
from nas.simulate.run import Simulation, simulate
from nas.simulate.synthetic import SyntheticTable, counted, decisions_space
from nas.simulate.table import KnownTable, Result, Table

__all__ = [
    "Faults",
    "Group",
    "KnownTable",
    "Result",
    "SimulatedExecutor",
    "Simulation",
    "Stay",
    "SyntheticTable",
    "Table",
    "counted",
    "decisions_space",
    "from_file",
    "from_frame",
    "from_run",
    "macro_space",
    "macro_table",
    "made_curve",
    "simulate",
]
