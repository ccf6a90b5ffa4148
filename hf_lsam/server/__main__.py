"""`python -m hf_lsam.server --run_dir DIR`: the server process of one run.

Started by hand, in a new or empty folder, it waits for workers that join with `server_address=DIR`, any number of them
and for as long as they like. It ends on SIGTERM or Ctrl-C, or after `--idle_timeout` seconds without a worker, and
keeps its last snapshot; the same command with `--resume` continues from there.

With `--listen` it also serves the relays of other machines; with `--connect` it is such a relay. A relay is restarted
with the same command, however the previous one ended. The secret file, which `hf_lsam.transport.secret.new_secret`
writes, decides which machines take part.
"""

import argparse
import functools
import logging
import sys
from collections.abc import Callable
from pathlib import Path

from ..transport.mailbox import RunFolder
from ..transport.ownership import missing_here
from ..transport.secret import read_secret
from .lifetime import run_server
from .relay import Relay
from .role import Role
from .root import Root, listen, refuse_taken_port


def address(text: str) -> tuple[str, int]:
    """Parses HOST:PORT into (host, port); an IPv6 address may be in brackets.

    Raises:
        argparse.ArgumentTypeError: if there is no port number.
    """
    host, colon, port = text.rpartition(":")
    if not colon or not port.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT")
    return host.strip("[]"), int(port)


parser = argparse.ArgumentParser(prog="python -m hf_lsam.server", description="Aggregates the anchor of one LSAM run.")
parser.add_argument("--run_dir", type=Path, required=True, help="run folder; new or empty for a run that others join")
parser.add_argument(
    "--resume",
    type=Path,
    nargs="?",
    const=True,
    help="go on from the folder's newest snapshot, or begin with the server state in this file",
)
parser.add_argument("--idle_timeout", type=float, default=600.0, help="seconds without a worker until it ends")
across = parser.add_mutually_exclusive_group()
across.add_argument("--listen", type=address, metavar="HOST:PORT", help="serve other machines as well; port 0: any")
across.add_argument("--connect", type=address, metavar="HOST:PORT", help="be the relay to the global server there")
parser.add_argument("--secret_file", type=Path, help="the secret of the run, mode 0600; the same on all machines")
parser.add_argument("--allow_remote", action="store_true", help="listen beyond this machine")
parser.add_argument("--parent", type=int, help=argparse.SUPPRESS)
arguments = parser.parse_args()
if missing := missing_here():
    sys.exit(missing)
if (arguments.listen or arguments.connect) and not arguments.secret_file:
    parser.error("--listen and --connect need --secret_file: it decides which machines take part")
if arguments.connect and isinstance(arguments.resume, Path):
    parser.error("--resume FILE is for the server of all machines: a relay begins with the anchor that it has")
logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
try:
    make_role: Callable[[RunFolder], Role] = Root
    if arguments.listen:
        refuse_taken_port(arguments.listen)
        secret = read_secret(arguments.secret_file)

        def listening(folder: RunFolder) -> Root:
            return Root(folder, listen(folder, arguments.listen, secret, arguments.allow_remote))

        make_role = listening
    elif arguments.connect:
        make_role = functools.partial(Relay, address=arguments.connect, secret=read_secret(arguments.secret_file))
    run_server(
        arguments.run_dir,
        arguments.resume,
        idle_timeout=arguments.idle_timeout,
        parent=arguments.parent,
        make_role=make_role,
        keeps_state=not arguments.connect,
    )
except (RuntimeError, ValueError) as error:
    sys.exit(str(error))
