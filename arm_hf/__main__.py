"""`python -m arm_hf` is the command line `arm-hf`."""

from .cli import main

if __name__ == "__main__":
    main()
