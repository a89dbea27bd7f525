"""The HTTP server and the command line, on top of the runtime `edgellm`."""
