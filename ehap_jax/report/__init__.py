"""Tables, plots and the self-contained HTML page of a run."""

from ehap_jax.report.page import write_comparison, write_report
from ehap_jax.report.plots import accuracy_per_stage, kept_channels, score_scatter, sensitivity_per_layer
from ehap_jax.report.run_data import RunData, read_run
from ehap_jax.report.tables import stage_rows, stage_table

__all__ = [
    "RunData",
    "accuracy_per_stage",
    "kept_channels",
    "read_run",
    "score_scatter",
    "sensitivity_per_layer",
    "stage_rows",
    "stage_table",
    "write_comparison",
    "write_report",
]
