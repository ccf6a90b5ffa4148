"""`hf-lsam`: the commands, each in a module of its own that is imported when it is called."""

from __future__ import annotations

from importlib import import_module

import click

# What `hf-lsam --help` says about each; a command is the function of that name in the module of that name.
COMMANDS = {
    "doctor": "Says what would happen with a launch, before it happens.",
    "monitor": "Shows a run in the terminal, while it goes on or after.",
    "report": "Writes a run's report as one HTML page.",
    "card": "Writes a run's model card for the Hub.",
}


class LazyGroup(click.Group):
    """Knows its commands by name, and imports only the module of the one that is called."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        command: click.Command = getattr(import_module(f".{name}", __name__), name)
        return command

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.command(cls=LazyGroup)
@click.version_option(package_name="hf-lsam")
def main() -> None:
    """Asynchronous distributed training with LSAM for Hugging Face."""
