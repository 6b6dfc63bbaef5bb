"""The same program as `--module distill`, for people who type a script: `deepspeed distill/train.py --config ...`."""

import sys

from distill.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
