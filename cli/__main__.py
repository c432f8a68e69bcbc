"""`python -m blockroll.cli`: for launchers that start modules, such as torchrun."""

from . import main

if __name__ == "__main__":
    main()
