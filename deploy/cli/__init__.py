"""The `kvatlas` command: its entry point, help and what subcommands share."""
