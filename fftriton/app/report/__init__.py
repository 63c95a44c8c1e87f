"""HTML reports: one file each, which needs no network and nothing beside it."""

from .pages import write_calibration_page, write_inspection_page, write_run_page

__all__ = ["write_calibration_page", "write_inspection_page", "write_run_page"]
