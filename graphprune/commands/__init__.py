"""The command line, command by command: options are read, functions of the package are called, results are printed."""
