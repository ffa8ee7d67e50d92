"""From a file to micro-batches: read, formats, template, dataset, batch."""
