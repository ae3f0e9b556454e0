"""Entry point of `python -m rtpurbo`."""

from rtpurbo.cli import main

if __name__ == "__main__":
    main()
