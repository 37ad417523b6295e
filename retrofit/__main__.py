"""``python -m retrofit`` is the command ``retrofit``."""

from retrofit.cli import main

if __name__ == "__main__":
    main()
