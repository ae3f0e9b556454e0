"""Conversion of a dense model into a sparse artifact: jobs, their settings by effort, plans and estimates."""

from rtpurbo.conversion.options import JobOptions, SettingsOptions
from rtpurbo.conversion.plan import Plan
from rtpurbo.conversion.run import calibrate, convert, distill, plan_conversion, train_indexer

__all__ = [
    "JobOptions",
    "Plan",
    "SettingsOptions",
    "calibrate",
    "convert",
    "distill",
    "plan_conversion",
    "train_indexer",
]
