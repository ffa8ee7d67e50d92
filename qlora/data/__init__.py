"""From a file to micro-batches: sources, read, formats, template, dataset, batch."""
