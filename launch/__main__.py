"""`python -m launch ...` is the `triptych` command, for jobs whose PATH does not have it."""

from launch.cli import main

main()
