"""The Python API: what commands do, as functions, which `pvrt` exports.

Importing it is cheap. Beside the command line, this room alone looks up to tune and server: inside
functions, when they run.
"""
