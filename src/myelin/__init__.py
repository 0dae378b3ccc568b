"""Myelin trains and serves models inside attested enclaves.

What people use most is here by name; each name is loaded when it is first used, so that verifying a
receipt loads no compiler.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from myelin import errors, grant, nn, receipt, seal
    from myelin.evidence import appraise
    from myelin.evidence.simulator import World
    from myelin.features import Features
    from myelin.grant import Ledger
    from myelin.image import Image
    from myelin.job import ImageReference, Job
    from myelin.optimizer import SGD, Adam
    from myelin.party import Party, PublicParty
    from myelin.policy import Policy
    from myelin.privacy import Privacy
    from myelin.recipe import build, rebuild
    from myelin.service import Service
    from myelin.weights import pack, unpack

__all__ = [
    "SGD",
    "Adam",
    "Features",
    "Image",
    "ImageReference",
    "Job",
    "Ledger",
    "Party",
    "Policy",
    "Privacy",
    "PublicParty",
    "Service",
    "World",
    "appraise",
    "build",
    "errors",
    "grant",
    "nn",
    "pack",
    "rebuild",
    "receipt",
    "seal",
    "unpack",
]

_MODULES = {
    "SGD": "optimizer",
    "Adam": "optimizer",
    "Features": "features",
    "Image": "image",
    "ImageReference": "job",
    "Job": "job",
    "Ledger": "grant",
    "Party": "party",
    "Policy": "policy",
    "Privacy": "privacy",
    "PublicParty": "party",
    "Service": "service",
    "World": "evidence.simulator",
    "appraise": "evidence",
    "build": "recipe",
    "pack": "weights",
    "rebuild": "recipe",
    "unpack": "weights",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'myelin' has no attribute {name!r}")
    if name not in _MODULES:
        return importlib.import_module(f"myelin.{name}")
    return getattr(importlib.import_module(f"myelin.{_MODULES[name]}"), name)
