"""A repeatable study of the optimizers: declared runs, one table of results, rendered documents."""
