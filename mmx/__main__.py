"""`python -m mmx`, and so `accelerate launch -m mmx train ...`."""

from mmx.cli.app import main

if __name__ == "__main__":
    main()
