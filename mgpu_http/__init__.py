"""The façade and the command line."""
