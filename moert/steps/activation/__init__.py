"""Gate and up projections [.., I] -> the intermediate [.., I] of an expert."""

from moert.steps.activation.reference import activate_reference

__all__ = ["activate_reference"]
