"""One module per benchmark: add_arguments(parser), run(args) yielding result objects."""
