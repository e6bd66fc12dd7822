"""The command line: parse, call the library, print. `nicecp.cli.main` is the entry point."""
