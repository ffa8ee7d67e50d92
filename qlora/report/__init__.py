"""What a finished run looks like: report.html, plots, model card."""
