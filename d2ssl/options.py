"""Options that several commands have; importing this needs no torch."""

import argparse


def add_register(parser: argparse.ArgumentParser, when: str = "") -> None:
    """``--register``: a list of MODULE:FUNCTION, empty where it is not given.

    Args:
        when: what to say about the moment of the call, after a comma.
    """
    parser.add_argument(
        "--register",
        action="append",
        default=[],
        metavar="MODULE:FUNCTION",
        help=f"a function of yours that registers data sets{when}; may be given several times",
    )
