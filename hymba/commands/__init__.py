"""The subcommands of `hymba`, a file each. None imports torch before it is called."""
