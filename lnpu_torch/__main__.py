"""`python -m lnpu_torch` is the command `lnpu`."""

from lnpu_torch.cli.app import main

main()
