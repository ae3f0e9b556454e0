"""The sections of the report: one file each, which makes a section or says why there is none."""
