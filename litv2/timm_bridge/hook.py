# SPDX-License-Identifier: Apache-2.0
"""Registers the models with timm as soon as timm is imported, before or after litv2.

timm takes seconds to import and offers no entry point for models of other packages. An import hook therefore waits for timm: it
finds the module as Python would and runs the registration once the module is loaded. Without timm nothing happens.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec

__all__ = ["register_with_timm"]


class _TimmFinder(MetaPathFinder):
    """Import hook that stays first on ``sys.meta_path`` until timm has been imported."""

    def find_spec(self, name: str, path=None, target=None) -> ModuleSpec | None:
        if name != "timm":
            return None
        specs = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module) -> None:
                execute(module)  # an error in timm itself propagates; the next import tries again
                if module.__name__ == "timm" and self in sys.meta_path:  # a loader may be shared by several modules
                    sys.meta_path.remove(self)
                    _register()

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def _register() -> None:
    try:
        importlib.import_module("litv2.timm_bridge.litv2")
    except Exception as error:  # importing timm must not fail because of LITv2
        version = getattr(sys.modules["timm"], "__version__", "of unknown version")
        warnings.warn(f"LITv2's models are not registered with timm {version}: {error!r}", stacklevel=2)


def register_with_timm() -> None:
    """Registers the models now if timm is already imported, otherwise as soon as it is."""
    if sys.modules.get("timm") is not None:
        _register()
    else:
        sys.meta_path.insert(0, _TimmFinder())
