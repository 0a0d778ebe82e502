"""What is installed here: `version`."""

import sys

from lcexport.cli.app import app


@app.command()
def version() -> None:
    """Show the version."""
    import lcexport

    sys.stdout.write(f"lcexport {lcexport.__version__}\n")
