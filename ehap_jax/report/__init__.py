"""Tables, plots and the self-contained HTML page of a run."""

from ehap_jax.report.accuracy_plots import accuracy_against_cost, accuracy_curves, accuracy_per_stage
from ehap_jax.report.layer_plots import kept_channels, sensitivity_per_layer
from ehap_jax.report.page import write_comparison, write_report
from ehap_jax.report.run_data import Convergence, RunData, read_run, score_arrays
from ehap_jax.report.tables import stage_html, stage_markdown, stage_rows, stage_table
from ehap_jax.report.trace_plots import cost_bars, score_scatter, trace_convergence

__all__ = [
    "Convergence",
    "RunData",
    "accuracy_against_cost",
    "accuracy_curves",
    "accuracy_per_stage",
    "cost_bars",
    "kept_channels",
    "read_run",
    "score_arrays",
    "score_scatter",
    "sensitivity_per_layer",
    "stage_html",
    "stage_markdown",
    "stage_rows",
    "stage_table",
    "trace_convergence",
    "write_comparison",
    "write_report",
]
