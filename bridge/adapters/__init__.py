"""One module per engine: its wire format as a table of fields."""
