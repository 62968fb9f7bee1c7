"""A run in Optuna's terms: its trials as an Optuna study, to be looked at with optuna-dashboard or kept in a file of Optuna's.

    study.py    trials of a run -> trials of Optuna
    server.py   `nas dashboard RUN`: the pages, on this machine, kept up to date while the run goes on
    export.py   `nas dashboard RUN --export FILE`: an Optuna storage file, for other tools

One study holds the whole run, all searchers in it: they search the same space for the same objectives, the front is one of all, and
importances are the better the more trials they rest on. Who proposed a trial is its user attribute `searcher`, by which the
pages can filter. Nothing here writes to the run. Needs nothing but Optuna for the export, and `sparse-nas[watch]` for the pages.
"""
