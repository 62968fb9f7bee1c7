"""Run an exported network in a process that has only torch and safetensors. Started as a file by `verify`, never imported.

    python -I fresh_process.py FOLDER QUESTIONS ANSWERS

Imports network.py from FOLDER, loads its weights, answers each list of inputs in QUESTIONS (torch.save format), writes the
outputs to ANSWERS and runs the file's own smoke test. Neither this project nor what else it needs can be imported here.
"""

import contextlib
import importlib.util
import io
import runpy
import sys
import warnings

FORBIDDEN = (
    "nas",
    "ops",
    "search_spaces",
    "hw_models",
    "numpy",
    "scipy",
    "pandas",
    "sklearn",
    "numba",
    "onnx",
    "onnxruntime",
    "optuna",
)


class _Refuse:
    """A finder that knows the packages an exported network must not need."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> None:
        if name.partition(".")[0] in FORBIDDEN:
            raise ModuleNotFoundError(
                f"an exported network may import torch and safetensors only, not {name}", name=name
            )


def main(folder: str, questions: str, answers: str) -> None:
    """Answer the questions and run the smoke test."""
    sys.meta_path.insert(0, _Refuse)
    sys.dont_write_bytecode = True
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
        import torch

        torch.set_num_threads(1)
        spec = importlib.util.spec_from_file_location("network", f"{folder}/network.py")
        if spec is None or spec.loader is None:
            raise SystemExit(f"no network.py in {folder}")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        network = module.load(folder)
        with torch.no_grad():
            torch.save([network(*inputs) for inputs in torch.load(questions, weights_only=True)], answers)
        with contextlib.redirect_stdout(io.StringIO()):
            runpy.run_path(f"{folder}/network.py", run_name="__main__")
    present = sorted({name.partition(".")[0] for name in sys.modules} & set(FORBIDDEN))
    if present:
        raise SystemExit(f"modules that an exported network must not need were imported: {', '.join(present)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
