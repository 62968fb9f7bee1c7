"""Neural architecture search for sparse networks.

from nas import search, load_run
run = search("runs/configs/quickstart.toml")
front = run.pareto()
model = run.build(front.trial.iloc[0])
run.export(front.trial.iloc[0], "exported/")
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nas.deploy import runtime
    from nas.driver import search
    from nas.run import Run, load_run

__all__ = ["Run", "load_run", "runtime", "search"]


def __getattr__(name: str) -> Any:
    """Import the heavy parts (torch, Optuna) only when they are asked for."""
    if name == "search":
        from nas.driver import search

        return search
    if name == "runtime":
        from nas.deploy import runtime

        return runtime
    if name in ("Run", "load_run"):
        import nas.run

        return getattr(nas.run, name)
    raise AttributeError(f"module 'nas' has no attribute {name!r}; it has: {', '.join(__all__)}")
