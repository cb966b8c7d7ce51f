"""`bmkit duplex`: a sub-command a file."""

import typer

from bmkit_cli.commands.duplex import build, chat, eval, replay, serve

app = typer.Typer(
    help="A model that listens while it speaks.", no_args_is_help=True, rich_markup_mode=None
)
app.command()(build.build)
app.command()(replay.replay)
app.command("eval")(eval.evaluate)
app.command()(chat.chat)
app.command()(serve.serve)
