"""From a trained network to files that need nothing of this project: `export_module`; failures are `ExportError`."""

from nas.export.errors import ExportError
from nas.export.export import export_module

__all__ = ["ExportError", "export_module"]
