"""poolreg completion: the script that teaches a shell the commands, options and names."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from .options import examples


@click.command(
    epilog=examples(
        'eval "$(poolreg completion bash)"     in ~/.bashrc',
        'eval "$(poolreg completion zsh)"      in ~/.zshrc',
        "poolreg completion fish > ~/.config/fish/completions/poolreg.fish",
    )
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the script that makes SHELL complete commands and names."""
    script = get_completion_class(shell)
    if script is not None:
        click.echo(script(ctx.find_root().command, {}, "poolreg", "_POOLREG_COMPLETE").source())
