"""What a launcher of several processes starts: the command line, as the installed script does."""

from diffattn.cli import main

main()
