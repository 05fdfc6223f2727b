"""`python -m diffusers_dino COMMAND`, and `accelerate launch -m diffusers_dino COMMAND` for many processes."""

from .cli import main

if __name__ == "__main__":
    main()
