"""`python -m pvrt` is `pvrt`."""

from pvrt.cli import main

main()
